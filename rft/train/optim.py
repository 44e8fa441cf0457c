"""Optimizers, and their schedules as functions of the step (appendix A.1)."""

import math
from typing import Any, assert_never

import torch
from torch import nn

from rft.config import OptimConfig
from rft.train.anchored import FastTrainableProjection, SelectiveProjectionDecay
from rft.train.objective import Objective

REACHED = 0.99  # of the peak rate: in a short run, OneCycle's peak lies between two steps


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build the optimizer of all trainable parameters, with weight decay on all of them.

    Optimizers other than AdamW need an `Objective`, which holds the pre-trained weights.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "adamw":
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(learning, **options)
    assert isinstance(module, Objective), "nothing has the pre-trained weights"
    learning, anchors = module.anchored()
    match config.optimizer:
        case "spd":
            return SelectiveProjectionDecay(learning, anchors, config.spd, **options)
        case "ftp":
            return FastTrainableProjection(learning, anchors, config.ftp_k, **options)
        case _:
            assert_never(config.optimizer)


def set_schedule(
    optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: OptimConfig
) -> float:
    """Set learning rate and beta1 of optimizer step `step` (0-based); return the learning rate."""
    lr, beta1 = _rates(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = lr, (beta1, config.beta2)
    return lr


def _rates(step: int, total_steps: int, config: OptimConfig) -> tuple[float, float]:
    """Compute learning rate and beta1."""
    if config.schedule == "one-cycle":
        return one_cycle(step, total_steps, config)
    return learning_rate(step, total_steps, config), config.beta1


def schedule_warning(total_steps: int, config: OptimConfig) -> str:
    """Warn of a schedule that hardly trains at its peak rate: a message, or nothing.

    That is a warm-up of half the run or more, or a peak that no step has.
    """
    if total_steps == 0:
        return ""
    warmup, other = config.warmup_steps, f"--optim.warmup-steps {total_steps // 10}"
    if config.schedule == "one-cycle":
        warmup, other = 0, "--optim.schedule cosine"
    advice = f"use {other}, a smaller batch or more epochs"
    highest = max(_rates(step, total_steps, config)[0] for step in range(total_steps))
    run = f"the run has {total_steps:,} step{'s' if total_steps > 1 else ''}"
    if highest < REACHED * config.lr:
        cause = f", its warm-up {warmup:,}" if warmup else ""
        return (
            f"{run}{cause}: the peak learning rate {config.lr:g} is never reached (the highest is "
            f"{highest:g}); {advice}"
        )
    if warmup > 1 and 2 * warmup >= total_steps:
        return f"{run}, {warmup:,} of them warm-up, half or more; {advice}"
    return ""


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Compute the learning rate of optimizer step `step` (0-based).

    Linear warm-up to the peak over `warmup_steps`, then a half cosine to zero: WiSE-FT's formula.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def one_cycle(step: int, total_steps: int, config: OptimConfig) -> tuple[float, float]:
    """Compute learning rate and beta1 of torch's OneCycleLR as the released code uses it.

    Along a cosine the rate rises from lr / 25 to lr over 2% of the steps and falls to lr / 250,000,
    while beta1 does the opposite between 0.95 and 0.85 (the scheduler's default, which overrides
    the optimizer's own beta1).
    """
    low, high = config.lr / 25, config.lr
    # where torch's own phases end; below 50 steps the peak lies before the first of them
    peak, end = 0.02 * total_steps - 1, total_steps - 1
    if step <= peak:
        done = step / peak if peak else 1.0  # 2% of 50 steps is the first one
        return _cosine(low, high, done), _cosine(0.95, 0.85, done)
    done = (step - peak) / (end - peak)
    return _cosine(high, low / 1e4, done), _cosine(0.85, 0.95, done)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))
