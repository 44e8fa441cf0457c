"""Randomness that is addressed, not stored.

A generator is addressed by its purpose: `torch_generator(seed, "fill", epoch, step, rank)`. The
same address gives the same numbers in any process at any time, so no random state is ever saved or
restored, and any step can be replayed on its own.
"""

import hashlib
import typing

import numpy as np

if typing.TYPE_CHECKING:
    import torch


def derive(*address: int | str) -> int:
    """Derive the 63-bit seed of an address; the type of each part counts (1 is not "1")."""
    # Python integers only: NumPy's have a different repr, and would give a different seed
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    # torch's seeds are signed; not Python's hash(), which differs between processes
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(*address: int | str) -> np.random.Generator:
    """Make the numpy (Philox) generator of an address."""
    return np.random.Generator(np.random.Philox(key=derive(*address)))


def torch_generator(*address: int | str) -> "torch.Generator":
    """Make the torch generator of an address.

    It is on the CPU, so that every device draws the same numbers.
    """
    import torch  # here, because packing uses only numpy and should not wait two seconds for torch

    return torch.Generator().manual_seed(derive(*address))
