"""Fine-tuning held to the pre-trained weights theta_0: L2-SP, SPD and FTP.

- L2-SP (Li et al. 2018): lambda / 2 |theta - theta_0|^2 is added to the loss.
- Selective projection decay (Tian et al., NeurIPS 2024): after an optimizer step, each tensor that
  had moved too far according to its gradient, <g, theta - theta_0> > 0, is drawn back by the share
  of its distance that the step added.
- Fast trainable projection (Tian et al., NeurIPS 2023): after an optimizer step, each row of a
  tensor is projected into an L1 ball around theta_0, whose radius gamma is learnt per tensor.

All functions take the trained weights and theta_0 as lists of tensors in the same order, and work
in place. Nothing waits for the device. If theta_0 is subtracted, both are fp32, because the changes
of fine-tuning are smaller than the rounding of bf16.

Shapes: T tensors; a row is one index of a tensor's first dimension, or a complete vector.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-8  # smallest radius, which is also the first one; added to a row's norm
RATE, BETA1, BETA2, EPS = 1e-2, 0.9, 0.999, 1e-8  # of the Adam that learns the radii

Tensors = list[Tensor]


@torch.no_grad()
def add_l2_sp(parameters: Tensors, anchors: Tensors, strength: float) -> None:
    """Add the gradient of strength / 2 |theta - theta_0|^2 to the gradients of `parameters`."""
    gradients = [own.grad for own in parameters if own.grad is not None]
    assert len(gradients) == len(parameters), "a weight that learns has no gradient"
    # subtract first: with strength * theta the small difference would be lost in rounding
    deltas = torch._foreach_sub(parameters, anchors)
    torch._foreach_add_(gradients, deltas, alpha=strength)


class Moved(NamedTuple):
    """How far each tensor had moved away from theta_0 before a step."""

    aligned_T: Tensor
    """<g, theta - theta_0>; positive if the loss rises with the distance."""
    distance_T: Tensor
    """|theta - theta_0|."""


@torch.no_grad()
def moved(parameters: Tensors, anchors: Tensors, gradients: Tensors) -> Moved:
    """Measure distances before the optimizer step, for `decay_selectively`."""
    deltas = torch._foreach_sub(parameters, anchors)
    distance_T = torch.stack(torch._foreach_norm(deltas))
    torch._foreach_mul_(deltas, gradients)
    return Moved(torch.stack([delta.sum() for delta in deltas]), distance_T)


@torch.no_grad()
def decay_selectively(
    parameters: Tensors, anchors: Tensors, before: Moved, strength: float
) -> None:
    """Draw tensors back towards theta_0 by SPD's share of their distance, after the optimizer step.

    That is strength * clamp((|theta' - theta_0| - |theta - theta_0|) / |theta' - theta_0|, 0, 1)
    for tensors with <g, theta - theta_0> > 0, nothing for others.
    """
    deltas = torch._foreach_sub(parameters, anchors)
    distance_T = torch.stack(torch._foreach_norm(deltas))
    added_T = ((distance_T - before.distance_T) / distance_T).clamp(0, 1)
    # selected, not multiplied, because a tensor that never moved gives 0 / 0
    share_T = torch.where(before.aligned_T > 0, strength * added_T, 0.0)
    torch._foreach_mul_(deltas, share_T.unbind())
    torch._foreach_sub_(parameters, deltas)


class Radii(NamedTuple):
    """FTP's constraints, and the moments of the Adam that learns them."""

    gamma_T: Tensor
    average_T: Tensor
    average_sq_T: Tensor


def first_radii(tensors: int, device: torch.device) -> Radii:
    """Make the radii of the first step, which projects onto theta_0 up to `TINY`."""
    zeros_T = torch.zeros(tensors, device=device)
    return Radii(zeros_T + TINY, zeros_T, zeros_T)


@torch.no_grad()
def slopes(gradients: Tensors, steps: Tensors) -> Tensor:
    """Compute the loss's slope along each radius, (T,): the sum of <g_r, c_r> / |c_r|_1 over rows.

    `steps` are the c of the previous step before its projection.
    """
    found = []
    for gradient, step in zip(gradients, steps, strict=True):
        along = (gradient * step).sum(dim=_in_rows(step), keepdim=True)
        found.append((along / row_norms(step)).sum())
    return torch.stack(found)


@torch.no_grad()
def learnt_radii(
    radii: Radii, slopes_T: Tensor, largest_T: Tensor, step_T: Tensor, k: float
) -> Radii:
    """Take a step of Adam on the radii, and keep each between `TINY` and its largest row norm.

    Args:
        radii: of the previous step.
        slopes_T: from `slopes`. Positive slopes, which shrink a ball, are multiplied by k.
        largest_T: the largest row norm of this step's c, per tensor.
        step_T: number of this optimizer step, from 1. The first one has no slope, but Adam's bias
            correction counts it, as in the released code.
        k: from 0, which never tightens, to 1.
    """
    slopes_T = torch.where(slopes_T > 0, k * slopes_T, slopes_T)
    average_T = BETA1 * radii.average_T + (1 - BETA1) * slopes_T
    average_sq_T = BETA2 * radii.average_sq_T + (1 - BETA2) * slopes_T**2
    # in fp64, because 1 - 0.999^2 would lose four digits in fp32
    counted_T = step_T.double()
    first_T, second_T = average_T / (1 - BETA1**counted_T), average_sq_T / (1 - BETA2**counted_T)
    gamma_T = (radii.gamma_T - RATE * first_T / (second_T.sqrt() + EPS)).to(radii.gamma_T.dtype)
    return Radii(gamma_T.clamp(min=TINY).minimum(largest_T), average_T, average_sq_T)


@torch.no_grad()
def project(
    parameters: Tensors, anchors: Tensors, steps: Tensors, norms: Tensors, gamma_T: Tensor
) -> None:
    """Set the parameters to theta_0 + min(gamma / |c_r|_1, 1) c_r, row by row.

    `steps` are c = theta' - theta_0 after the optimizer step, `norms` their `row_norms`.
    """
    shares = [
        (gamma / norm).clamp(max=1) for gamma, norm in zip(gamma_T.unbind(), norms, strict=True)
    ]
    torch._foreach_copy_(parameters, anchors)
    torch._foreach_addcmul_(parameters, steps, shares)


def row_norms(tensor: Tensor) -> Tensor:
    """Compute the L1 norm of every row plus `TINY`, in a shape that broadcasts over the tensor."""
    return torch.linalg.vector_norm(tensor, 1, dim=_in_rows(tensor), keepdim=True) + TINY


def _in_rows(tensor: Tensor) -> tuple[int, ...]:
    """List the dimensions inside a row; a vector, such as a bias, is one row."""
    return tuple(range(1, tensor.ndim)) or (0,)
