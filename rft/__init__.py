"""rft: robust fine-tuning of CLIP on counterfactual images (Xiao et al., CVPR 2023)."""

__version__ = "0.1.0"
