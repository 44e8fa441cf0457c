"""rft: robust fine-tuning of CLIP on counterfactual images (Xiao et al., CVPR 2023)."""

from rft import start

__version__ = "0.1.0"

if start.is_command():
    start.watch_imports()
