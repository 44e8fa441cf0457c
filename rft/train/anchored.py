"""Optimizers that draw AdamW's steps back towards the pre-trained weights (`--optim.optimizer`).

The mathematics is in rft/method/weight_space.py. theta_0 is not part of their state: it belongs to
the pre-trained model, which every run loads anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rft.method import weight_space
from rft.method.weight_space import Radii

# FTP's state besides AdamW's: the unprojected step, and the radius with its two moments
STEP = "free_step"
RADII = (RADIUS, RADIUS_AVG, RADIUS_AVG_SQ) = ("radius", "radius_avg", "radius_avg_sq")


class Anchored(torch.optim.AdamW):
    """AdamW in which each weight is paired with its theta_0."""

    def __init__(self, parameters: list[Tensor], anchors: list[Tensor], **options: Any) -> None:
        super().__init__(parameters, **options)
        # kept out of the parameter group, which checkpoints store
        self._pairs = list(zip(parameters, anchors, strict=True))

    def _learning(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Collect the weights that have a gradient, their theta_0, and the gradients."""
        found = [(p, anchor, p.grad) for p, anchor in self._pairs if p.grad is not None]
        parameters, anchors, gradients = map(list, zip(*found, strict=True))
        return parameters, anchors, gradients

    def extra_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Describe a weight's state besides AdamW's: by name, a tensor of that shape and type."""
        return {}


class SelectiveProjectionDecay(Anchored):
    """AdamW with selective projection decay; raises the errors of AdamW."""

    def __init__(
        self,
        parameters: list[Tensor],
        anchors: list[Tensor],
        strength: float,
        **options: Any,
    ) -> None:
        super().__init__(parameters, anchors, **options)
        self._strength = strength

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step of AdamW, then draw back the tensors whose gradient points outwards."""
        parameters, anchors, gradients = self._learning()
        before = weight_space.moved(parameters, anchors, gradients)
        super().step(closure)
        weight_space.decay_selectively(parameters, anchors, before, self._strength)


class FastTrainableProjection(Anchored):
    """AdamW with fast trainable projection; raises the errors of AdamW."""

    def __init__(
        self,
        parameters: list[Tensor],
        anchors: list[Tensor],
        k: float,
        **options: Any,
    ) -> None:
        super().__init__(parameters, anchors, **options)
        self._k = k

    def extra_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Describe the unprojected step, the radius and its moments."""
        scalar = torch.zeros((), device=parameter.device)
        return {STEP: torch.empty_like(parameter), **dict.fromkeys(RADII, scalar)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step of AdamW, learn the radii, then project each row onto its ball."""
        parameters, anchors, gradients = self._learning()
        states = [self.state[parameter] for parameter in parameters]
        slopes_T = None
        if states[0]:
            # uses the gradient at the current weights, before the step moves them
            slopes_T = weight_space.slopes(gradients, [state[STEP] for state in states])
        super().step(closure)
        if slopes_T is None:
            for parameter, state in zip(parameters, states, strict=True):
                state[STEP] = torch.empty_like(parameter)
        steps = [state[STEP] for state in states]
        # reuse the memory of the previous step, which is no longer needed
        torch._foreach_copy_(steps, parameters)
        torch._foreach_sub_(steps, anchors)
        norms = [weight_space.row_norms(step) for step in steps]
        radii = self._learnt(states, slopes_T, torch.stack([norm.max() for norm in norms]))
        weight_space.project(parameters, anchors, steps, norms, radii.gamma_T)
        for name, values_T in zip(RADII, radii, strict=True):
            for state, value in zip(states, values_T.unbind(), strict=True):
                # clone: a view would keep, and a checkpoint would save, the values of all tensors
                state[name] = value.clone()

    def _learnt(
        self, states: Sequence[dict[str, Tensor]], slopes_T: Tensor | None, largest_T: Tensor
    ) -> Radii:
        if slopes_T is None:
            return weight_space.first_radii(len(largest_T), largest_T.device)
        before = Radii(*(torch.stack([state[name] for state in states]) for name in RADII))
        step_T = torch.stack([state["step"] for state in states])
        return weight_space.learnt_radii(before, slopes_T, largest_T, step_T, self._k)
