"""The weighted moving teacher against TRACER's (HesamAsad/TRACER, src/models).

Its beta_moving_average.py needs torch and SciPy and is imported unchanged.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from benchmarks import parities
from rft.config import MethodConfig
from rft.method import moving_average

REPOSITORY = "HesamAsad/TRACER"
VARIABLE = "RFT_PEER_WMA"
STEPS = 50


def measure(checkout: Path) -> dict[str, float]:
    """Move both teachers over the same random walk of a small model's weights."""
    theirs = parities.load(checkout / "src/models/beta_moving_average.py")
    draw = torch.Generator().manual_seed(0)
    model = nn.Linear(64, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    weight = theirs.create_beta_weight_function(0.5, STEPS)
    peer = theirs.GeneralMovingAverage(model, weight)
    teacher = copy.deepcopy(model)
    found = {}
    for step, share in enumerate(moving_average.shares(MethodConfig(teacher="wma"), STEPS), 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        moving_average.follow(teacher.parameters(), model.parameters(), share)
        peer.update()
        if step in (1, STEPS):
            parts = zip(teacher.parameters(), peer.moving_avg.parameters(), start, strict=True)
            # relative to the teacher's movement, which is smaller than its weights
            found[f"{step} of {STEPS} steps: T - theta_0"] = max(
                parities.difference((ours - first).detach(), (other - first).detach())
                for ours, other, first in parts
            )
    return found
