"""Features of frozen towers: computed in the first epoch, read from files in later ones.

Without augmentation, a frozen tower gives a clean image the same features in every epoch: the
student's tower in a linear probe, no-mask's teacher, WiSE-KD's second teacher. With augmentation,
only the features of held-out images are stored. In the first epoch each rank computes its part of
every batch as usual, and the main rank gathers and writes all parts. Samples that this epoch did
not visit are computed at its end. Later batches come with their stored rows, and without images if
no tower needs them.

A row is only used if its forward had the same number of images, the same precision and the same
kind of device; on a CPU it then equals its own batch's result bit for bit.

Shapes: B batch, E embedding.
"""

import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from rft import dist
from rft.clip.classifier import tower_identity
from rft.config import Config
from rft.device import autocast, to_cpu, to_device
from rft.evaluate.forward import Kept
from rft.loading import read
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import Batch
from rft.loading.features import FeatureFile, FeatureFolder, computed_by, record_bytes
from rft.loading.order import rank_slice
from rft.runs import filenames
from rft.train.job import Job

PROBED = 64  # rows that a rank reads to check that it sees the main rank's file
SCANNED = 4096  # rows checked at a time

log = logging.getLogger(__name__)


def folder(config: Config) -> FeatureFolder:
    """Open the folder in which a run stores features."""
    loader = config.loader
    path = (
        Path(loader.features_dir) if loader.features_dir else Path(config.run, filenames.FEATURES)
    )
    return FeatureFolder(path, int(loader.features_gb * 1e9))


def keeps(job: Job) -> bool:
    """Whether the run reads training images' features from files.

    True with frozen towers and several epochs of identical pixels.
    """
    return _lasts(job) and job.config.loader.augment == "none" and bool(job.objective.frozen)


def _lasts(job: Job) -> bool:
    """Whether stored features would be read in a later epoch."""
    return job.config.optim.epochs > 1 and job.config.loader.features_gb > 0


def in_words(job: Job) -> list[str]:
    """Describe the features that a run stores, for `--dry-run`."""
    if job.config.loader.augment != "none" and _lasts(job) and job.objective.frozen:
        return ["stores no features of training images, because each epoch augments them anew"]
    if not keeps(job):
        return []
    towers, where = job.objective.frozen, folder(job.config)
    each = record_bytes(job.student.architecture.embed_dim)
    count = len(job.batches.packed) * len(towers) + len(job.held_out) * ("student" in towers)
    if count * each > where.limit:
        return [
            f"stores no features of the frozen image tower: {decimal(count * each)} exceed "
            "--loader.features-gb"
        ]
    after = "reads no images" if "student" in towers else "its forward is not repeated"
    return [
        f"stores the features of the frozen {' and '.join(towers)}, {decimal(count * each)} in "
        f"{where.path}: after the first epoch {after}"
    ]


def held_out(job: Job) -> Kept | None:
    """Open the stored features of the held-out images; None if their tower is trained."""
    if not (_lasts(job) and "student" in job.objective.frozen and len(job.held_out)):
        return None
    return Kept.of(folder(job.config), [job.student])


def read_batches(job: Job, steps: range) -> Generator[Batch]:
    """Yield this rank's batches of `steps`, with features of frozen towers if they are stored.

    Ranks must take each batch together. Raises the errors of `rft.loading.read.read_batches`.
    """
    with ExitStack() as stack:
        rows = Rows.open(job, stack) if keeps(job) and steps else None
        rest = steps
        if rows is not None:
            if not rows.complete:
                epoch_end = -(-(steps.start + 1) // rows.per_epoch) * rows.per_epoch
                filling = range(steps.start, min(epoch_end, steps.stop))
                for step, batch in zip(filling, _stream(job, filling, stack), strict=True):
                    yield rows.computed(step, batch)
                rest = range(filling.stop, steps.stop)
            if rest and rows.finish():
                yield from rows.read(rest, stack)
                return
        yield from _stream(job, rest, stack)


def _stream(job: Job, steps: range, stack: ExitStack) -> Generator[Batch]:
    workers = job.config.loader.workers
    batches = read.read_batches(job.batches, steps, workers=workers, device=job.device)
    return stack.enter_context(closing(batches))


class Rows:
    """The files of a job's frozen towers; row n is sample n of the set. All ranks call it alike."""

    def __init__(self, job: Job, opened: Mapping[str, FeatureFile], have: np.ndarray) -> None:
        self._job, self._opened, self._have = job, opened, have
        self.per_epoch = job.batches.plan.steps_per_epoch
        # features of the previous batch, being copied from the device while it computes on
        self._pending: tuple[np.ndarray, dict[str, Callable[[], Tensor]]] | None = None

    @classmethod
    def open(cls, job: Job, stack: ExitStack) -> "Rows | None":
        """Open the files and find the rows they have; None if a rank cannot store any."""
        config, world, packed = job.config, job.world, job.batches.packed
        keys = {
            name: {
                "manifest_sha256": packed.manifest.sha256,
                "forward": config.micro_batch(world.size),
                "precision": config.precision,
                "layers": job.objective.kernels.choice.layers,
                "computed_by": computed_by(job.device),
                "tower": tower_identity(model),
            }
            for name, model in job.objective.frozen.items()
        }
        opened = {}
        # the main rank's keys, in case the ranks' GPUs have different names
        for name, key in dist.from_main(world, keys).items():
            width = job.student.architecture.embed_dim
            file = folder(config).open(key, len(packed), width)
            if file is not None:
                stack.callback(file.close)
                opened[name] = file
        if dist.largest(world, int(len(opened) < len(keys))):
            return None

        def find() -> np.ndarray:
            have = np.zeros(len(packed), dtype=bool)
            for start in range(0, len(packed), SCANNED):
                numbers = np.arange(start, min(start + SCANNED, len(packed)))
                have[numbers] = np.all([file.read(numbers)[1] for file in opened.values()], axis=0)
            return np.packbits(have)

        packed_bits = dist.from_main(world, dist.on_main(world, find))
        have = np.unpackbits(packed_bits, count=len(packed)).astype(bool)
        rows = cls(job, opened, have)
        if rows.complete:
            log.info(f"reading features from {folder(config).path}")
        return rows

    @property
    def complete(self) -> bool:
        """Whether every training sample has its rows."""
        return bool(self._have[self._job.batches.samples].all())

    def computed(self, step: int, batch: Batch) -> Batch:
        """Compute and store a batch's features."""
        began = time.perf_counter()
        features = self._forward(batch.images_BCHW)
        self._keep(self._job.batches.global_samples(step), features)
        return batch._replace(features=features, computing=time.perf_counter() - began)

    def finish(self) -> bool:
        """Compute the missing rows; False if a rank cannot read all of them."""
        job, world, files = self._job, self._job.world, self._opened.values()
        # the warning was logged when it failed
        if dist.largest(world, int(any(file.failed for file in files))):
            return False
        missing = job.batches.samples[~self._have[job.batches.samples]]
        images = job.config.micro_batch(world.size)
        together = images * world.size
        # padded to full batches by repetition: a smaller forward may give different last bits
        missing = np.resize(missing, -(-len(missing) // together) * together)
        mine = missing.reshape(-1, world.size, images)[:, world.rank].reshape(-1)
        batches = EvaluationBatches(
            job.batches.packed, mine, image_size=job.batches.image_size, batch_size=images
        )
        numbers = range(len(batches))
        workers = job.config.loader.workers
        with closing(
            read.read_batches(batches, numbers, workers=workers, device=job.device)
        ) as stream:
            for number, batch in zip(numbers, stream, strict=True):
                part = missing[number * together : (number + 1) * together]
                self._keep(part, self._forward(batch.images_BCHW))
        dist.on_main(world, self._flush)
        samples = job.batches.samples
        probed = samples[:: max(1, len(samples) // PROBED)]
        seen = all(not file.failed and file.read(probed)[1].all() for file in files)
        if dist.largest(world, int(not seen)):
            log.warning(
                f"not every rank can read the features in {folder(job.config).path}, so they are "
                "recomputed in each epoch; do all nodes see that folder?"
            )
            return False
        return True

    def read(self, steps: range, stack: ExitStack) -> Generator[Batch]:
        """Yield the batches of `steps` with their rows; without images if no tower needs them."""
        job = self._job
        if "student" not in self._opened:
            for batch in _stream(job, steps, stack):
                samples = batch.samples_B.numpy()
                yield batch._replace(features=self._read(samples, batch.images_BCHW))
            return
        for step in steps:
            samples = rank_slice(
                job.batches.global_samples(step), job.world.rank, job.world.size
            ).astype(np.int64)
            labels_B = torch.from_numpy(job.batches.packed.index.label[samples].astype(np.int64))
            yield Batch(
                torch.empty(len(samples), 0, dtype=torch.uint8, device=job.device),
                to_device(labels_B, job.device),
                torch.from_numpy(samples),
                features=self._read(samples),
            )

    def _read(self, samples: np.ndarray, images_BCHW: Tensor | None = None) -> dict[str, Tensor]:
        """Read the rows of this rank's samples; recompute them if one is damaged."""
        features = {}
        for name, file in self._opened.items():
            rows_BE, whole_B = file.read(samples)
            if not whole_B.all():
                break
            features[name] = to_device(torch.from_numpy(rows_BE), self._job.device)
        else:
            return features
        if images_BCHW is None:
            batches = self._job.batches
            images = batches.packed.batch(samples, batches.image_size).images_BCHW
            images_BCHW = to_device(images, self._job.device)
        features = self._forward(images_BCHW)
        for name, file in self._opened.items():
            file.keep(samples, features[name].cpu().numpy())
        return features

    def _forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Compute the features of each tower in fp32, with one forward per micro-batch."""
        job, size = self._job, self._job.config.micro_batch(self._job.world.size)
        with autocast(job.device, job.config.precision):
            parts = [job.objective.frozen_features(part) for part in images_BCHW.split(size)]
        # fp32 represents bf16 exactly, and every loss is computed in fp32
        return {name: torch.cat([part[name].float() for part in parts]) for name in self._opened}

    def _keep(self, samples: np.ndarray, features: Mapping[str, Tensor]) -> None:
        """Have the main rank write the features that all ranks computed for a global batch."""
        world = self._job.world
        # on every rank, because gathering needs all of them
        rows = {name: dist.gather_rows(world, rows_BE) for name, rows_BE in features.items()}
        self._have[samples] = True
        if not world.is_main:
            return
        self._write()
        # copied while the step computes: waiting here would leave the GPU idle
        self._pending = samples, {name: to_cpu(rows_BE) for name, rows_BE in rows.items()}

    def _write(self) -> None:
        if self._pending is None:
            return
        samples, arriving = self._pending
        for name, file in self._opened.items():
            file.keep(samples, arriving[name]().numpy())
        self._pending = None

    def _flush(self) -> None:
        self._write()
        for file in self._opened.values():
            file.sync()
