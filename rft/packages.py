"""Import single modules of installed packages without their `__init__`.

Importing timm, open_clip or webdataset imports torch, which costs seconds and hundreds of megabytes
per process. The parts that packing uses need no torch: lists of classes, and the tar writer.
"""

import importlib
import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def folder(package: str) -> Path:
    """Locate an installed package without importing it.

    Raises:
        ValueError: if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    # without an origin it is only a folder of that name (a namespace package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {package} is not installed; reinstall rft")
    return Path(spec.origin).parent


@cache
def part(package: str, module: str) -> ModuleType:
    """Import one module of a package without executing the package's `__init__`.

    The module is put into an empty package of a different name: its imports from its own package
    are found, and the real package can still be imported.

    Raises:
        ValueError: if the package is not installed.
    """
    name = f"rft_part_of_{package}"
    # without a loader no `__init__` runs, but submodules are found in the folder
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder(package))]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{name}.{module}")
