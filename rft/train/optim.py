"""AdamW and its learning rate, a function of the step (appendix A.1)."""

import math

import torch
from torch import nn

from rft.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over every trainable parameter, weight decay on all of them."""
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step` (0-based).

    Linear warm-up to the peak over `warmup_steps`, then a half cosine to zero: WiSE-FT's formula.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
