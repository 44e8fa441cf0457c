"""One module per published method, which compares rft with the released code on equal numbers.

A module names the REPOSITORY of the released code (`owner/name`) and the environment VARIABLE with
the folder of its checkout. `measure(checkout)` runs both on the same random weights and returns
their `difference` by compared quantity. `python -m benchmarks.parity` runs all modules. A module
imports the released code only inside `measure`.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from torch import Tensor


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Divide the largest difference of two tensors by the largest number of the second.

    Raises:
        ValueError: if their shapes differ, which broadcasting would hide, or if the second one is
            zero everywhere, with which nothing is compared.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"a tensor of {tuple(ours.shape)} is compared with {tuple(theirs.shape)}")
    largest = theirs.abs().max()
    if largest == 0:
        raise ValueError("a tensor is compared with zeros, with which any scale agrees")
    return float((ours - theirs).abs().max() / largest)


def load(path: Path) -> ModuleType:
    """Import one file of a checkout by its path; raises FileNotFoundError where it is missing.

    Its package is not imported: the released codes import data sets and plots there.
    """
    spec = importlib.util.spec_from_file_location(f"parity_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
