"""Randomness that is addressed, not stored.

A generator is named by what it is for: `keyed(seed, "fill", epoch, step, rank)`. The same address
gives the same numbers in any process, at any time, so nothing random is ever saved or restored and
any step can be replayed alone.
"""

import hashlib
import typing

import numpy as np

if typing.TYPE_CHECKING:
    import torch


def derive(*address: int | str) -> int:
    """Return the 63-bit seed of an address; the type of each part counts (1 is not "1")."""
    # Python's own integers alone: NumPy's have a different repr, and would give another seed
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    # torch's seeds are signed; Python's own hash() differs from process to process
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(*address: int | str) -> np.random.Generator:
    """Return the numpy (Philox) generator of an address."""
    return np.random.Generator(np.random.Philox(key=derive(*address)))


def torch_generator(*address: int | str) -> "torch.Generator":
    """Return the torch generator of an address.

    It lives on the CPU so that every device draws the same numbers.
    """
    import torch  # here, because packing needs the numpy half without torch's two seconds

    return torch.Generator().manual_seed(derive(*address))
