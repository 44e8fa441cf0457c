"""Selective projection decay against AdamSPD (GT-RIPL/Selective-Projection-Decay, adamSPD.py).

The file needs only torch and is imported unchanged.
"""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks import parities
from rft.train.anchored import SelectiveProjectionDecay

REPOSITORY = "GT-RIPL/Selective-Projection-Decay"
VARIABLE = "RFT_PEER_SPD"
STEPS = 30
SHAPES = ((16, 3, 4, 4), (48, 16), (48,), (16, 64), (17, 16), (1,))
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def measure(checkout: Path) -> dict[str, float]:
    """Train the same random weights with both on the same random gradients."""
    their_class = parities.load(checkout / "adamSPD.py").AdamSPD
    found = {}
    # from theta_0, and as after --model.start, from elsewhere; a strength that draws back in part
    for start, strength in (("pre-trained", 1.0), ("pre-trained", 0.3), ("other", 1.0)):
        anchors = weights(0)
        first = anchors if start == "pre-trained" else weights(1)
        ours, theirs = copied(first), copied(first)
        our_optimizer = SelectiveProjectionDecay(
            ours, anchors, strength, weight_decay=0.0, **OPTIONS
        )
        their_optimizer = their_class(
            [{"params": theirs, "pre": anchors}], weight_decay=strength, **OPTIONS
        )
        steps(ours, theirs, our_optimizer, their_optimizer)
        name = f"{STEPS} steps, lambda {strength:g}, from {start} weights"
        # relative to the change by training, which is smaller than the weights
        found[f"{name}: theta - theta_0"] = changed(ours, theirs, anchors)
    return found


def weights(seed: int) -> list[Tensor]:
    """Draw weights of CLIP's size."""
    draw = torch.Generator().manual_seed(seed)
    return [0.05 * torch.randn(shape, generator=draw) for shape in SHAPES]


def copied(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies that can learn."""
    return [tensor.clone().requires_grad_() for tensor in tensors]


def steps(
    ours: list[Tensor],
    theirs: list[Tensor],
    our_optimizer: torch.optim.Optimizer,
    their_optimizer: torch.optim.Optimizer,
) -> None:
    """Take the same steps on both sides; gradients change their sign now and then."""
    draw = torch.Generator().manual_seed(7)
    drifts = [torch.randn(tensor.shape, generator=draw) for tensor in ours]
    for step in range(STEPS):
        # the loss falls in some steps and rises in others, so that both branches run
        sign = 1 if step % 10 < 6 else -1
        for own, their, drift in zip(ours, theirs, drifts, strict=True):
            noise = torch.randn(own.shape, generator=draw)
            own.grad = sign * drift + 0.3 * noise
            their.grad = own.grad.clone()
        our_optimizer.step()
        their_optimizer.step()


def changed(ours: list[Tensor], theirs: list[Tensor], anchors: list[Tensor]) -> float:
    """Return the largest difference in the change by training, over all tensors."""
    return max(
        parities.difference((own - anchor).detach(), (their - anchor).detach())
        for own, their, anchor in zip(ours, theirs, anchors, strict=True)
    )
