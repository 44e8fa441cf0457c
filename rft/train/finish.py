"""A run from lock to last file: train, complete the run folder, print the next command."""

import logging
from dataclasses import asdict
from pathlib import Path

from rft import cli, dist, recipes
from rft import next_steps as commands
from rft.clip.classifier import build_classifier, load_state
from rft.config import Config, load_config
from rft.dist import World
from rft.runs import filenames
from rft.runs.filenames import SELECTED
from rft.runs.folder import weights_record
from rft.runs.records import Training
from rft.start import STOPPED
from rft.storage import files
from rft.train import pictures
from rft.train.build import inputs_fingerprint
from rft.train.job import Job
from rft.train.loop import train
from rft.train.run import Finished, RunFolder, finished
from rft.train.stop import StopRequest

log = logging.getLogger(__name__)


def run_job(job: Job, request: StopRequest, *, profile: bool = False) -> int:
    """Train one run to its end and complete its run folder.

    Returns:
        The exit code: 0, or `STOPPED` after a stop request before the end.
    """
    config, world = job.config, job.world
    # nodes may have different GPUs, on which auto chooses differently
    advice = "name one for all of them, e.g. --precision fp32"
    dist.require_agreement(world, "precision", config.precision, advice)
    dist.require_agreement(world, "data fingerprint", job.fingerprint)
    run = RunFolder(config)
    with run.taken(world, request):
        # the job that held the folder until now may have finished the run
        if done := dist.from_main(world, dist.on_main(world, lambda: finished(config))):
            tell_finished(config, done, world)
            return 0
        traces = run.path / filenames.PROFILE if profile and world.is_main else None
        progress = train(job, request, traces)
        if progress.step < job.total_steps:
            return STOPPED
        dist.on_main(world, run.require_there)
        dist.on_main(world, lambda: write_run_gallery(job))
        if world.is_main:
            record = Training(
                steps=progress.step,
                best_step=progress.best_step,
                world_size=world.size,
                manifest_sha256=job.fingerprint["manifest_sha256"],
                inputs=inputs_fingerprint(config),
                weights_sha256=weights_record(run.path),
            )
            # checked again, because a gallery takes a while
            run.require_there()
            # last, because this file marks the run as complete
            files.write_json(str(run.path / filenames.TRAINING), asdict(record))
            log.info(f"run finished: {config.run} ({job.chosen(progress.best_step)})")
            # include other finished seeds next to it
            runs = commands.with_seeds([run.path], filenames.TRAINING)
            ranks = world.local_size
            cli.say_next(commands.evaluation(runs, config.data, config.train_set, ranks=ranks))
    return 0


def write_run_gallery(job: Job) -> None:
    """Write the gallery: the selected model's masks and fills of held-out images."""
    packed, folder = job.batches.packed, RunFolder(job.config).path
    shown = pictures.gallery_samples(job)
    if len(shown):
        # from the file: the student in memory is the last model, not the selected one
        saved = load_state(folder / SELECTED)
        model = build_classifier(saved.state, saved.architecture)
        frames = pictures.kept_frames(job, job.total_steps + 1)
        url = str(folder / filenames.GALLERY)
        pictures.write_gallery(url, model, packed, shown, recipes.MASKED, frames)
        (folder / filenames.FRAMES).unlink(missing_ok=True)


def tell_finished(config: Config, done: Finished, world: World) -> None:
    """Report that a run is finished.

    Raises:
        ValueError: if it was built on other weights than those named now.
    """
    # checked here, because the identity leaves out the paths of these weights
    if changed := files.difference(done.record.inputs, inputs_fingerprint(config)):
        raise ValueError(
            f"{config.run} is a finished run that was built on other weights: "
            f"{'; '.join(changed)}. Name those weights, or choose another --run-dir "
            "(docs/training.md#stop-and-resume)"
        )
    if world.is_main:
        notes = [f"in {load_config(Path(config.run)).precision}"]
        if done.uncompared:
            notes.append(f"its data could not be compared: {done.uncompared}")
        log.info(f"run already finished: {config.run} ({'; '.join(notes)})")
