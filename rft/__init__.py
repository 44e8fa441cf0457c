"""rft: robust fine-tuning of CLIP on counterfactual images (Xiao et al., CVPR 2023).

`rft.load` loads a model for use from Python; its types are in `rft/__init__.pyi`.
"""

import importlib
from typing import Any

from rft import start

__version__ = "0.1.0"
_API = ("load", "Model", "Prediction")

if start.is_command():
    start.watch_imports()


def __getattr__(name: str) -> Any:
    """Import the public API on first access, because importing torch takes seconds.

    The module is imported by name: low-level packages import this one, and a plain import would
    pull in the top-level code with it.
    """
    if name in _API:
        return getattr(importlib.import_module("rft.predict.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
