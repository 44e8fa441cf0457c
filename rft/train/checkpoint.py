"""Checkpoints to resume from: atomic, only the newest few kept, loaded without running any code.

A checkpoint holds weights, optimizer state, the step, the best held-out count so far and the data
fingerprint. There is no random state in it: randomness is addressed by step (rft/rng.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rft import files
from rft.clip.classifier import Classifier


@dataclass
class Progress:
    """How far a run is and which of its models is the best so far."""

    step: int = 0
    best_step: int = -1
    best_correct: int = -1


def save(
    folder: Path,
    student: Classifier,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fingerprint: dict[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of `progress.step`, then delete all but the newest `keep`."""
    content = {
        "model": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
        "fingerprint": fingerprint,
    }
    with files.publish(str(folder / f"step-{progress.step:08d}.pt")) as path:
        torch.save(content, path)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()


def resume(
    folder: Path,
    student: Classifier,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
) -> Progress:
    """Load the newest checkpoint into `student` and `optimizer`; without one, start at step 0.

    Raises:
        ValueError: if the checkpoint was made on other data or another sample order.
    """
    saved = sorted(folder.glob("step-*.pt"))
    if not saved:
        return Progress()
    content = torch.load(saved[-1], map_location="cpu", weights_only=True)
    if changed := files.difference(content["fingerprint"], fingerprint):
        raise ValueError(
            f"{saved[-1]} was made on other data, the samples would not go on where they stopped: "
            f"{'; '.join(changed)}. Restore the data or use a new run folder"
        )
    student.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return Progress(**content["progress"])
