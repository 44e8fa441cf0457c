"""Batches go from shared memory to a GPU without an extra copy, and are never overwritten early.

The GPU is simulated: queued work of a stream runs as late as its order permits, or as early. So a
missing ordering always shows in the pixels. tests/gpu repeats this on a real GPU.
"""

import contextlib
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rft import device
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import PackedDataset
from rft.loading.read import read_batches
from tests.tiny import unstamped

CUDA = torch.device("cuda", 0)
BATCH = 3
REFUSED = 2


class Mark:
    """A point in a stream's work, reached after all earlier work has run."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.reached = stream, False


class Stream:
    """Work in order; a Mark in it is waited for, unless it is the stream's own."""

    def __init__(self, gpu: "Gpu", *, eager: bool) -> None:
        self.gpu, self.eager = gpu, eager
        self.work: list[Callable[[], object] | Mark] = []
        gpu.streams.append(self)

    def submit(self, work: Callable[[], object] | Mark) -> None:
        self.work.append(work)
        self.gpu.hurry()

    def step(self) -> None:
        work = self.work[0]
        if isinstance(work, Mark) and work.stream is not self:
            work.stream.reach(work)
        del self.work[0]
        if not isinstance(work, Mark):
            work()
        elif work.stream is self:
            work.reached = True

    def reach(self, mark: Mark) -> None:
        while not mark.reached:
            self.step()

    @property
    def is_blocked(self) -> bool:
        head = self.work[0]
        return isinstance(head, Mark) and head.stream is not self and not head.reached

    def wait_event(self, event: "Event") -> None:
        if event.mark is not None:
            self.submit(event.mark)

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = Event()
        event.record(self)
        event.synchronize()


class Event:
    """Like CUDA's: an event that was never recorded does not block."""

    mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        self.mark = Mark(stream)
        self.mark.reached = not stream.work
        if stream.work:
            stream.submit(self.mark)

    def synchronize(self) -> None:
        if self.mark is not None:
            self.mark.stream.reach(self.mark)
            self.mark.stream.gpu.hurry()


class Gpu:
    """Two streams, and the calls to the driver."""

    def __init__(self, *, copies_early: bool, computes_early: bool) -> None:
        self.streams: list[Stream] = []
        self.copies_early = copies_early
        self.compute = self.current = Stream(self, eager=computes_early)
        self.registered: list[tuple[int, int]] = []
        self.unregistered: list[int] = []
        self.refuses = False
        self.pinned: list[int] = []
        self.copied = 0

    def hurry(self) -> None:
        """Run what eager streams can."""
        for stream in self.streams:
            while stream.eager and stream.work and not stream.is_blocked:
                stream.step()

    @contextlib.contextmanager
    def on(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def register(self, address: int, size: int, _: int) -> int:
        self.registered.append((address, size))
        return REFUSED if self.refuses else 0

    def unregister(self, address: int) -> int:
        assert not any(stream.work for stream in self.streams[1:]), "copies are under way"
        self.unregistered.append(address)
        return 0

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces torch.cuda, with tensors on the CPU."""
        cuda, copy, to, empty = torch.cuda, Tensor.copy_, Tensor.to, torch.empty

        def check(code: int) -> None:
            if code:
                raise RuntimeError(f"operation not supported ({code})")

        def copy_later(target: Tensor, source: Tensor, *, non_blocking: bool = False) -> Tensor:
            assert non_blocking

            def run() -> None:
                copy(target, source)
                self.copied += 1

            self.current.submit(run)
            return target

        def pin_memory(tensor: Tensor) -> Tensor:
            self.pinned.append(tensor.nbytes)
            return tensor.clone()

        def to_here(tensor: Tensor, where, **options) -> Tensor:
            return tensor if torch.device(where) == CUDA else to(tensor, where, **options)

        cudart = types.SimpleNamespace(
            cudaHostRegister=self.register, cudaHostUnregister=self.unregister
        )
        monkeypatch.setattr(cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(cuda, "check_error", check)
        monkeypatch.setattr(cuda, "Stream", lambda _: Stream(self, eager=self.copies_early))
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "stream", self.on)
        monkeypatch.setattr(cuda, "current_stream", lambda _: self.compute)
        monkeypatch.setattr(Tensor, "copy_", copy_later)
        monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(Tensor, "to", to_here)
        monkeypatch.setattr(
            torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options)
        )


@pytest.fixture(params=[(False, False), (True, False), (False, True), (True, True)])
def gpu(request, monkeypatch) -> Gpu:
    copies_early, computes_early = request.param
    found = Gpu(copies_early=copies_early, computes_early=computes_early)
    found.stand_in(monkeypatch)
    return found


@pytest.fixture
def late(monkeypatch) -> Gpu:
    """A GPU on which everything runs as late as possible."""
    found = Gpu(copies_early=False, computes_early=False)
    found.stand_in(monkeypatch)
    return found


@pytest.fixture(scope="module")
def batches(tiny_data) -> EvaluationBatches:
    packed = PackedDataset(str(tiny_data / "imagenet-train"))
    # seven batches, the last one short
    samples = np.arange(6 * BATCH + 1)
    return EvaluationBatches(packed, samples, image_size=16, batch_size=BATCH)


def use(gpu: Gpu, batches: EvaluationBatches, workers: int) -> list[Tensor]:
    """Every batch's images as the computation saw them, without keeping them alive."""
    seen: list[Tensor] = []
    for batch in read_batches(batches, range(len(batches)), workers=workers, device=CUDA):
        images_BCHW = batch.images_BCHW
        gpu.compute.submit(lambda images_BCHW=images_BCHW: seen.append(images_BCHW.clone()))
    gpu.compute.synchronize()
    return seen


def require_whole(seen: list[Tensor], batches: EvaluationBatches) -> None:
    assert len(seen) == len(batches)
    for number, images_BCHW in enumerate(seen):
        expected = batches.packed.batch(batches.samples_of(number), batches.image_size)
        assert torch.equal(images_BCHW, expected.images_BCHW), f"batch {number}"


def test_no_batch_is_overwritten_before_it_was_used(gpu, batches):
    require_whole(use(gpu, batches, workers=0), batches)
    ((address, size),) = gpu.registered
    assert size >= 2 * BATCH * 3 * 16 * 16
    assert gpu.unregistered == [address]
    # labels only: images are not copied on the host
    assert max(gpu.pinned) == 8 * BATCH


@pytest.mark.slow
def test_nor_by_loader_processes(late, batches):
    require_whole(use(late, batches, workers=2), batches)


def test_the_host_waits_for_the_copy_of_the_batch_two_before_alone(late, batches):
    for number, _ in enumerate(read_batches(batches, range(5), workers=0, device=CUDA)):
        assert late.copied == max(number - 1, 0)


def test_a_batch_is_copied_while_the_one_before_it_is_computed_on(late, batches):
    done: list[int] = []
    for number, _ in enumerate(read_batches(batches, range(5), workers=0, device=CUDA)):
        _, copies = late.streams
        copies.synchronize()
        assert late.copied == number + 1
        # its buffer was waited for, but not the work on the batch before
        assert done == list(range(number - 1))
        late.compute.submit(lambda number=number: done.append(number))


def test_the_first_copy_waits_for_what_had_its_memory_before(late, batches):
    done: list[str] = []
    late.compute.submit(lambda: done.append("before"))
    stream = read_batches(batches, range(2), workers=0, device=CUDA)
    next(stream)
    late.streams[1].synchronize()
    assert done == ["before"]
    stream.close()


def test_a_stream_that_is_left_early_unlocks_its_memory(gpu, batches):
    stream = read_batches(batches, range(len(batches)), workers=0, device=CUDA)
    next(stream)
    assert gpu.unregistered == []
    stream.close()
    assert len(gpu.unregistered) == 1


def test_memory_that_cannot_be_locked_is_copied_with_one_warning(gpu, batches, capsys):
    gpu.refuses = True
    device._warn_that_copies_wait.cache_clear()
    require_whole(use(gpu, batches, workers=0), batches)
    assert gpu.unregistered == []
    assert max(gpu.pinned) == BATCH * 3 * 16 * 16
    (line,) = unstamped(capsys.readouterr().err).splitlines()
    assert line.startswith("WARNING: no pinned memory (operation not supported (2)); ")


def test_a_refused_pinned_buffer_is_one_warning(monkeypatch, capsys):
    """For copies from the GPU: kept features do not need pinned memory."""
    device._warn_that_copies_wait.cache_clear()

    def refuse(*_: object, **options: object) -> Tensor:
        assert options == {"device": "cpu", "pin_memory": True}
        raise RuntimeError("out of memory (2)\nmore")

    monkeypatch.setattr(torch, "empty_like", refuse)

    class OnGpu:
        device = CUDA

        def cpu(self) -> Tensor:
            return torch.arange(3)

    arrived: Callable[[], Tensor] = device.to_cpu(OnGpu())  # pyrefly: ignore[bad-argument-type]
    assert arrived().tolist() == [0, 1, 2]
    (line,) = unstamped(capsys.readouterr().err).splitlines()
    assert line.startswith("WARNING: no pinned memory (out of memory (2)); ")
