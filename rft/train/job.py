"""A run that is ready to train."""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from rft.classes import Classes
from rft.clip.classifier import Classifier
from rft.config import Config, Precision
from rft.dist import World
from rft.loading.batches import TrainingBatches
from rft.runs.trained_on import TrainedOn
from rft.train.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Job:
    """Models, data and device of a run.

    It holds everything that is fixed from the first step to the last: rft/train/build.py makes it,
    `--dry-run` describes it, the loop trains it. It is one value because a step, the selection and
    the checkpoints each need most of it; other functions take only the parts that they need.
    """

    config: Config
    world: World
    device: torch.device
    objective: Objective
    batches: TrainingBatches
    held_out: np.ndarray
    fingerprint: dict[str, Any]
    start_seen: frozenset[TrainedOn] = frozenset()
    """Sets that the student's first weights were trained on."""

    def __post_init__(self) -> None:
        # an unresolved `auto` would be computed, and recorded, as if it were fp32
        if self.config.precision not in get_args(Precision):
            raise RuntimeError(
                f"a job's precision is {self.config.precision!r}; call resolve_precision first"
            )

    @property
    def must_agree(self) -> dict[str, Any]:
        """Values that must be equal in two jobs, for the second to resume the first."""
        return {"config": self.config.identity(), "data": self.fingerprint}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the full run."""
        return self.config.optim.epochs * self.batches.plan.steps_per_epoch

    @property
    def selects(self) -> bool:
        """Whether held-out images choose among the models of several epochs."""
        return len(self.held_out) > 0 and self.config.optim.epochs > 1

    def chosen(self, step: int) -> str:
        """Describe briefly which model the run keeps, and how it was selected."""
        if self.total_steps == 0:
            return "the model it started with"
        if self.selects:
            return f"model of step {step} selected by {len(self.held_out):,} held-out images"
        why = "one epoch" if len(self.held_out) else "no held-out images"
        return f"the last model, of step {step}: {why}"

    @property
    def classes(self) -> Classes:
        """Classes of the training set and of the head."""
        return self.batches.packed.manifest.label_space

    @property
    def others(self) -> dict[str, nn.Module]:
        """Other modules than the student that change with the steps, by name in a checkpoint."""
        objective, found = self.objective, {}
        if objective.contrast is not None:
            found["text"] = objective.contrast.tower
        if self.config.method.teacher != "frozen":
            # its head is never used
            found["teacher"] = objective.teacher.visual
        return found

    @property
    def student(self) -> Classifier:
        """The model that learns."""
        return self.objective.student
