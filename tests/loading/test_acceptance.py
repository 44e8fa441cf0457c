"""Requirements on a data plane: T1 to T6 and T11 to T13 of the list in docs/peers.md.

T7 and T8 need servers and are in test_remote.py; T9 and T10 are about packing, in
tests/packing/test_pack_processes.py and tests/packing/test_pack.py.
"""

import gc
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.waiting import until
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import PackedDataset
from rft.loading.order import EpochOrder
from rft.loading.read import read_batches
from rft.packing.pack import Options, pack
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.train import command as train_command
from tests import tiny
from tests.ranks import loading
from tests.ranks.loading import CPU, batches_of, plan_of

LABELS = LabelSpace(ids=("n01", "n02", "n03"), names=("one", "two", "three"), templates=("{c}",))
SLOW = pytest.mark.slow  # where loader processes start
PER_CLASS = 23  # 69 samples: not divisible by any number of batches, ranks or shards
BATCH = 8


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, PackedDataset]:
    """The same images in shards of a few samples, as files and as pixels."""
    root = tmp_path_factory.mktemp("acceptance")
    rng = np.random.default_rng(0)
    for wnid in LABELS.ids:
        (root / "train" / wnid).mkdir(parents=True)
        for number in range(PER_CLASS):
            base = rng.integers(0, 256, 3)
            pixels = np.clip(base + rng.normal(0, 40, (30, 37, 3)), 0, 255).astype(np.uint8)
            path = root / "train" / wnid / f"{wnid}_{number}.JPEG"
            Image.fromarray(pixels).save(path, "JPEG")
    found = {}
    for encoding in ("original", "pixels"):
        options = Options(encoding=encoding, size=24, shard_mb=0.012, workers=1)
        pack("imagenet-train", str(root), str(root / encoding), LABELS, options)
        found[encoding] = PackedDataset(str(root / encoding / "imagenet-train"))
        assert len(found[encoding].manifest.shards) > 5
    return found


def global_batches(
    packed: PackedDataset, plan, world_size: int, workers: int, steps: range
) -> list[tuple[list[int], torch.Tensor]]:
    """Ids and images of the global batches, combined from all ranks."""
    ranks = [
        [
            (batch.samples_B.tolist(), batch.images_BCHW.clone())
            for batch in read_batches(
                batches_of(packed, plan, rank, world_size), steps, workers=workers, device=CPU
            )
        ]
        for rank in range(world_size)
    ]
    return [
        (
            list(chain.from_iterable(rank[step][0] for rank in ranks)),
            torch.cat([rank[step][1] for rank in ranks]),
        )
        for step in range(len(steps))
    ]


@pytest.mark.parametrize(("streams", "block_shards"), [(1, 0), (4, 2)])
@pytest.mark.parametrize(
    ("world_size", "workers"),
    [
        (2, 0),
        (4, 0),
        (8, 0),
        *(pytest.param(*case, marks=SLOW) for case in ((1, 1), (2, 3), (1, 8), (4, 1))),
    ],
)
def test_t1_the_same_ordered_global_batches(packed, world_size, workers, streams, block_shards):
    dataset = packed["original"]
    plan = plan_of(dataset, BATCH, streams, block_shards)
    steps = range(plan.steps_per_epoch - 2, plan.steps_per_epoch + 3)  # across an epoch's end
    expected = global_batches(dataset, plan, 1, 0, steps)
    found = global_batches(dataset, plan, world_size, workers, steps)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]


@pytest.mark.parametrize("encoding", ["original", "pixels"])
@pytest.mark.parametrize(("world_size", "workers"), [(4, 0), pytest.param(2, 3, marks=SLOW)])
def test_t2_the_same_tensors(packed, encoding, world_size, workers):
    dataset = packed[encoding]
    plan = plan_of(dataset, BATCH, 2, 2)
    found = global_batches(dataset, plan, world_size, workers, range(7))
    for ids, images_BCHW in found:
        for sample, image_CHW in zip(ids, images_BCHW, strict=True):
            assert torch.equal(image_CHW, torch.from_numpy(dataset.image(sample, 24)))
    # and both encodings contain the same data
    by_key = {packed["pixels"].key(s): packed["pixels"].image(s, 24) for s in range(len(dataset))}
    for sample in range(len(dataset)):
        key = packed["original"].key(sample)
        assert (packed["original"].image(sample, 24) == by_key[key]).all()


@pytest.mark.slow
def test_t3_killed_and_resumed_on_another_world_size(packed, tmp_path):
    dataset = packed["pixels"]
    plan = plan_of(dataset, 8, 2, 2)
    expected = batches_of(dataset, plan, 0, 1)
    chance = random.Random(0)
    seen: dict[int, list[int]] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rft.loading.read", "tests.ranks.loading"])
    for world_size in (2, 1, 4):
        start = len(seen)
        enough = start + chance.randrange(3, 9)
        logs = [tmp_path / f"{world_size}-{rank}.txt" for rank in range(world_size)]
        for rank, log in enumerate(logs):
            log.touch()
            process = context.Process(
                target=loading.log_ids, args=(dataset.url, str(log), start, rank, world_size)
            )
            process.start()
            try:
                until(
                    lambda log=log, missing=enough - start: log.read_text().count("\n") >= missing
                )
            finally:
                process.kill()  # its loader processes end with it
                process.join()
        ranks = [
            {
                int(line.split()[0]): [int(word) for word in line.split()[1:]]
                for line in log.read_text().splitlines(keepends=True)
                if line.endswith("\n")
            }
            for log in logs
        ]
        # a step counts when every rank has finished it
        for step in sorted(set.intersection(*(set(rank) for rank in ranks))):
            seen[step] = list(chain.from_iterable(rank[step] for rank in ranks))
    assert sorted(seen) == list(range(len(seen)))
    assert len(seen) >= 9
    assert all(seen[step] == expected.global_samples(step).tolist() for step in seen)


@pytest.mark.parametrize(("streams", "block_shards"), [(1, 0), (2, 1), (4, 3)])
def test_t4_an_epoch_has_every_sample_once(packed, streams, block_shards):
    dataset = packed["pixels"]
    plan = plan_of(dataset, BATCH, streams, block_shards)
    left_out = []
    for epoch in range(3):
        first = epoch * plan.steps_per_epoch
        steps = range(first, first + plan.steps_per_epoch)
        batches = global_batches(dataset, plan, 2, 0, steps)
        ids = list(chain.from_iterable(ids for ids, _ in batches))
        assert len(ids) == len(set(ids)) == len(dataset) // BATCH * BATCH
        left_out.append(frozenset(range(len(dataset))) - set(ids))
        assert len(left_out[-1]) == len(dataset) % BATCH  # the declared tail
    assert len(set(left_out)) > 1  # a different one each epoch


@pytest.mark.slow
def test_t5_evaluation_counts_every_sample_once(packed, tmp_path):
    url = packed["pixels"].url
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rft.loading.read", "tests.ranks.loading"])
    told = set()
    for world_size in (1, 3, 7, 8):
        out = tmp_path / str(world_size)
        out.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            context.Process(target=loading.count, args=(rank, world_size, port, url, str(out)))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        told.update((out / f"{rank}.txt").read_text() for rank in range(world_size))
    assert len(told) == 1
    correct, total = map(int, told.pop().split())
    assert total == packed["pixels"].manifest.samples
    assert 0 < correct < total


def damaged_copy(dataset: PackedDataset, folder: Path) -> tuple[PackedDataset, Path, int]:
    """A copy of a set, one of its shards, and a sample in that shard's middle."""
    shutil.copytree(dataset.url, folder / "copy")
    number = 2
    sample = int(dataset.shard_ends[number - 1]) + 1
    shard = folder / "copy" / dataset.manifest.shards[number].name
    return PackedDataset(str(folder / "copy")), shard, sample


@pytest.mark.parametrize("encoding", ["original", "pixels"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=SLOW)])
def test_t6_damage_is_an_error_with_shard_key_and_offset(packed, encoding, workers, tmp_path):
    dataset, shard, sample = damaged_copy(packed[encoding], tmp_path)
    offset = int(dataset.index.offset[sample])
    whole = shard.read_bytes()
    rest = np.arange(sample, len(dataset))  # the first one that is read is the damaged one
    batches = EvaluationBatches(dataset, rest, image_size=24, batch_size=BATCH)

    def message() -> str:
        """The error of reading the sample; a batch with it must give the same one."""
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are judged below
            dataset.payload(sample)
        with pytest.raises(ValueError, match=f"^{re.escape(str(caught.value))}$"):
            list(read_batches(batches, range(len(batches)), workers=workers, device=CPU))
        return str(caught.value)

    flipped = bytearray(whole)
    flipped[offset + 150] ^= 4
    shard.write_bytes(flipped)
    assert f"{shard.name}, sample '{dataset.key(sample)}', offset {offset}" in message()
    assert "damaged bytes (crc32 mismatch)" in message()

    previous = int(dataset.index.offset[sample - 1] + dataset.index.length[sample - 1])
    boundary = -(-previous // 512) * 512
    shard.write_bytes(whole[:boundary])  # as left by a killed copy
    assert f"short read: 0 of {dataset.index.length[sample]} bytes at" in message()
    assert dataset.key(sample) in message()

    shard.unlink()
    dataset.shards.close()
    assert "missing shard" in message()
    assert shard.name in message()

    index = Path(dataset.url) / "index.npz"
    flipped = bytearray(index.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    index.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"index\.npz does not have the sha256 in its manifest"):
        PackedDataset(dataset.url)


def test_t6_a_damaged_header_costs_no_sample(packed, tmp_path):
    # tar readers stop or skip there, but samples are found by their offsets
    dataset, shard, sample = damaged_copy(packed["pixels"], tmp_path)
    flipped = bytearray(shard.read_bytes())
    flipped[int(dataset.index.offset[sample]) - 512] ^= 255
    shard.write_bytes(flipped)
    for number in range(len(dataset)):
        assert (dataset.image(number, 24) == packed["pixels"].image(number, 24)).all()


def descriptors(at_most: int) -> int:
    """Number of open descriptors of this process, after those of ended workers are collected."""

    def count() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    until(lambda: count() <= at_most, f"at most {at_most} descriptors")
    return count()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_t11_memory_and_descriptors_stay_flat(packed, workers):
    dataset = packed["pixels"]
    plan = plan_of(dataset, BATCH, 2, 2)
    training = batches_of(dataset, plan, 0, 1)
    after = []
    for epoch in range(8):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        for batch in read_batches(training, steps, workers=workers, device=CPU):
            assert batch.images_BCHW.shape == (BATCH, 3, 24, 24)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        at_most = after[2][1] if len(after) > 2 else sys.maxsize
        after.append((pages * resource.getpagesize(), descriptors(at_most)))
    settled = after[2:]  # the first two start permanent resources: the fork server, open shards
    memory = [size for size, _ in settled]
    assert max(memory) <= 1.05 * memory[0]
    assert max(count for _, count in settled) == settled[0][1]


@pytest.mark.slow
def test_t11_a_plan_for_400_million_samples():
    script = (
        "from pathlib import Path;"
        "from rft.loading.order import EpochOrder, Plan;"
        "plan = Plan(shard_sizes=(1000,) * 400_000, batch_size=1024, seed=0, streams=64,"
        " block_shards=4);"
        "assert len(set(EpochOrder(plan, 3).batch(100_000).tolist())) == 1024;"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    # not getrusage: its peak counts the process that this one was forked from
    assert int(result.stdout) * 1024 < 1e9


@pytest.mark.slow
def test_t12_nothing_of_the_parent_reaches_the_workers(packed):
    """Workers are forked from a server that has opened nothing, never from the trainer."""
    dataset = PackedDataset(packed["pixels"].url)
    dataset.image(0, 24)
    assert dataset.shards._descriptors
    state = dataset.shards.__getstate__()
    assert set(state) == {"url", "shards", "cache"}
    training: Any = _Watching(dataset)
    stream = read_batches(training, range(2), workers=2, device=CPU)
    for batch in stream:
        parent, descriptors, clients = batch.samples_B.tolist()
        assert parent != os.getpid()
        assert descriptors == clients == 0


class _Watching:
    """Batches whose sample numbers encode properties of the process that reads them."""

    image_size, largest = 24, 3

    def __init__(self, packed: PackedDataset) -> None:
        self.packed = _Told(packed)

    def samples_of(self, number: int) -> np.ndarray:
        import fsspec.asyn

        shards = self.packed.shards
        shards._enter_process()
        return np.array(
            [os.getppid(), len(shards._descriptors), int(fsspec.asyn.iothread[0] is not None)]
        )

    def read(self, number: int, out_BCHW: torch.Tensor):
        return self.packed.batch(self.samples_of(number), self.image_size, out_BCHW)


class _Told:
    def __init__(self, packed: PackedDataset) -> None:
        self.packed, self.shards = packed, packed.shards

    def batch(self, samples: np.ndarray, size: int, out_BCHW: torch.Tensor):
        real = self.packed.batch(np.arange(3), size, out_BCHW)
        return real._replace(samples_B=torch.from_numpy(samples))


@pytest.mark.slow
def test_t13_another_manifest_or_plan_is_refused_with_the_difference(
    tiny_data, tiny_clip, tmp_path, refused
):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(tiny_data, data)
    size = ["--loader.batch-size", "12", "--loader.held-out", "8", "--device", "cpu"]
    size += ["--optim.warmup-steps", "1"]  # of five
    command = ["no-mask", "--scale", "miniature", "--model.clip", tiny_clip, *size]
    command += ["--data", data, "--run-dir", run, "--optim.epochs", "1", "--loader.workers", "0"]
    tiny.call(train_command, *command)
    (run / "training.json").unlink()  # as before its end

    line = refused(train_command, *command, "--loader.streams", "2")
    assert "loader.streams: 1 -> 2" in line
    manifest = json.loads((data / "imagenet-train" / "manifest.json").read_text())
    manifest["plan_hash"] = "0" * 64
    (data / "imagenet-train" / "manifest.json").write_text(json.dumps(manifest))
    before, after = (
        Manifest.load(str(root / "imagenet-train")).sha256 for root in (tiny_data, data)
    )
    line = refused(train_command, *command)
    assert f"manifest_sha256: {before!r} -> {after!r}" in line


def test_resume_is_immediate(packed):
    """The thousandth step costs as much as the first: nothing is read or drawn before it."""
    dataset = packed["pixels"]
    plan = plan_of(dataset, BATCH, 2, 2)
    far = 1000 * plan.steps_per_epoch + 3
    (ids,) = (ids for ids, _ in global_batches(dataset, plan, 1, 0, range(far, far + 1)))
    assert ids == EpochOrder(plan, 1000).batch(3).tolist()
    assert dataset.shards.counters.bytes < 10 * 2**20


@pytest.mark.parametrize("encoding", ["original", "pixels"])
def test_bytes_that_were_read_are_counted(packed, encoding):
    dataset, samples = packed[encoding], np.arange(0, 3 * PER_CLASS, 2)
    assert dataset.batch(samples, 24).reading.bytes == dataset.index.length[samples].sum()


READER = """
import multiprocessing, signal, sys
import numpy as np, torch
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import PackedDataset
from rft.loading.read import read_batches
assert not hasattr(signal, "sigtimedwait")
packed = PackedDataset(sys.argv[1])
batches = EvaluationBatches(packed, np.arange(len(packed)), image_size=24, batch_size=8)
stream = read_batches(batches, range(len(batches)), workers=2, device=torch.device("cpu"))
next(stream)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "ends":
    print(sum(len(batch.labels_B) for batch in stream) + 8)
else:
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_loader_processes_end_with_their_trainer_on_macos(packed, tmp_path, how):
    """On systems without a call for the sender of a signal, simulated in all processes."""
    (tmp_path / "sitecustomize.py").write_text("import signal; del signal.sigtimedwait")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", READER, packed["pixels"].url, how],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        loaders = [Path(f"/proc/{pid}") for pid in process.stdout.readline().split()]
        assert len(loaders) == 2
        if how == "ends":
            assert process.stdout.read() == f"{3 * PER_CLASS}\n"
            assert process.wait() == 0
        else:
            process.kill()
        until(lambda: not any(path.exists() for path in loaders), "the loader processes' end")
