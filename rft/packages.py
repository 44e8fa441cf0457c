"""Parts of installed packages, without the rest of them.

timm, open_clip and webdataset import torch when they are imported, which costs seconds and hundreds
of megabytes in each process. What packing uses of them needs no torch: lists of classes, and the
writer of tars.
"""

import importlib
import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def folder(package: str) -> Path:
    """Return where an installed package lies, without importing it.

    Raises:
        ValueError: if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    # without an origin it is a mere folder of that name (a namespace package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {package} is not installed; install rft again")
    return Path(spec.origin).parent


@cache
def part(package: str, module: str) -> ModuleType:
    """Return one module of a package, whose own `__init__` is not executed.

    It belongs to an empty package of a different name, so that what it imports from its own package
    is found, and the real one can still be imported.

    Raises:
        ValueError: if the package is not installed.
    """
    name = f"rft_part_of_{package}"
    # no loader, so no `__init__` runs: submodules alone are looked for in the folder
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder(package))]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{name}.{module}")
