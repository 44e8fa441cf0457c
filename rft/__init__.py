"""rft: robust fine-tuning of CLIP on counterfactual images (Xiao et al., CVPR 2023).

`rft.load` gives a model to use from Python; `rft/__init__.pyi` has the types.
"""

import importlib
from typing import Any

from rft import start

__version__ = "0.1.0"
_API = ("load", "Model", "Prediction")

if start.is_command():
    start.watch_imports()


def __getattr__(name: str) -> Any:
    """Import what Python's users need when it is first named: torch takes seconds.

    By its name, because rooms at the bottom import this module, and would import the top with it.
    """
    if name in _API:
        return getattr(importlib.import_module("rft.predict.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
