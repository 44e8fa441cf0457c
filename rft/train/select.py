"""Selection of an epoch's model by held-out accuracy, and its weights file."""

import contextlib

from torch import Tensor

from rft.clip.classifier import load_state, save_state
from rft.evaluate.count import count_correct
from rft.evaluate.forward import Kept
from rft.runs import trained_on
from rft.runs.filenames import SELECTED
from rft.runs.trained_on import TrainedOn
from rft.train import checkpoint
from rft.train.checkpoint import Progress
from rft.train.job import Job
from rft.train.journal import Journal
from rft.train.pictures import keep_frame
from rft.train.run import RunFolder


def select(job: Job, progress: Progress, journal: Journal, kept: Kept | None = None) -> Progress:
    """Count held-out accuracy and keep a frame; select the model if it is strictly the best so far.

    `kept` has the stored features of a frozen tower. A head built from a trained text tower is
    rebuilt first.

    Without held-out images the latest model counts as the best, so the run keeps its last model.
    """
    if job.objective.contrast is not None and progress.step:
        job.objective.contrast.rebuild(job.student.head, job.world)
    if not len(job.held_out):
        return progress.selecting(progress.step)  # steps ascend, so the latest is the best
    (count,) = count_correct(
        [job.student],
        job.batches.packed,
        image_size=job.batches.image_size,
        world=job.world,
        device=job.device,
        samples=job.held_out,
        workers=job.config.loader.workers,
        names=[f"{job.config.run} (step {progress.step}, held-out images)"],
        kept=kept,
    )
    journal.held_out(progress.step, count)
    keep_frame(job, progress.step)
    return progress.selecting(count.correct)


def write_selected(job: Job, best_step: int, state: dict[str, Tensor]) -> None:
    """Write the selected student, `state` after `best_step`, to the run folder."""
    path = RunFolder(job.config).path / SELECTED
    known = metadata(job, best_step)
    save_state(str(path), state, job.student.architecture, known, job.classes)


def restore_selected(
    job: Job, store: checkpoint.Store, own: checkpoint.Own, best_step: int
) -> None:
    """Rewrite the selected model if it is missing in the run folder, or there is a later one.

    A later one remains if its checkpoint was damaged afterwards. It is missing after a kill right
    after the checkpoint, or if only the checkpoints outlived the machine.

    Raises:
        ValueError: if no checkpoint of `best_step` is left to restore it from.
    """
    if best_step < 0:
        return
    # suppressed for missing or damaged weights, which are rewritten
    with contextlib.suppress(ValueError):
        found = load_state(RunFolder(job.config).path / SELECTED)
        if found.metadata["step"] == str(best_step):
            return
    if best_step not in store.steps() or store.damage(best_step):
        raise ValueError(
            f"the run's model, of step {best_step}, is neither in {RunFolder(job.config).path} nor "
            f"intact in {store.url}; restore one, or start anew in a new run folder"
        )
    write_selected(job, best_step, checkpoint.load(store, store.record(best_step), own).model)


def metadata(job: Job, step: int) -> dict[str, str]:
    """Make the header of that step's weights file: recipe, step and training sets."""
    seen = set(job.start_seen)
    # an untrained model has not seen the set
    if step > 0:
        known = job.fingerprint
        split = known["held_out"], known["held_out_seed"], known.get("shots", 0)
        seen.add(TrainedOn(job.config.train_set, known["manifest_sha256"], *split))
    return {"recipe": job.config.recipe, "step": str(step), **trained_on.entries(seen)}
