"""Device memory of one rank's optimizer step.

torch's own tracker counts it over a step of the training loop (rft/train/step.py) on fake tensors,
which have shapes but no data: weights, gradients, the optimizer's state, activations and temporary
tensors. GPU context and allocator fragmentation come on top. The tracker is not public in torch. If
a release lacks it, the memory that autograd keeps for one image and for two is measured on the real
model and extrapolated (`measure`).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode

from rft.clip import vit
from rft.config import Config, MethodConfig
from rft.device import autocast, to_device
from rft.dist import World
from rft.loading.dataset import Batch
from rft.method.counterfactual import StepAddress, draw
from rft.method.relevance import MAP_BYTES
from rft.train.job import Job
from rft.train.kernels import Kernels
from rft.train.objective import Objective
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients, draw_texts

MAPS = 3  # maps of one layer that the CAM holds at once: attention, its gradient, their product
ALONE = World(rank=0, size=1, local_rank=0)


class Needs(NamedTuple):
    """The memory per rank, for several numbers of ranks."""

    totals: list[float]
    """Bytes at the peak of a step."""
    estimated: str
    """Why torch's tracker could not count them; empty if it did."""


def needs(job: Job, ranks: Sequence[int]) -> Needs:
    """Compute the bytes per rank for each number of ranks in `ranks`, which is ascending.

    The job is not changed.
    """
    try:
        return Needs(track(job, ranks), "")
    # the tracker is private to torch, and other releases may raise anything
    except Exception as error:
        reason = f"torch {torch.__version__}'s tracker failed: {type(error).__name__}"
        memory = measure(job)
        return Needs([memory.total(job.config.micro_batch(count)) for count in ranks], reason)


class Unpinned(TorchFunctionMode):
    """Skips the copy to pinned memory, which fake tensors refuse (rft/device.py)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, with a tensor as its own pinned copy."""
        return args[0] if func is Tensor.pin_memory else func(*args, **(kwargs or {}))


def norms_as_on_a_gpu(module: nn.Module) -> None:
    """Compute every norm in fp32, as bf16 autocast does on a GPU but not on a CPU.

    That keeps more memory for the backward pass.
    """
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            norm.register_forward_hook(_to_bf16)


def _to_bf16(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.bfloat16()


def without_values(job: Job) -> tuple[FakeTensorMode, Job]:
    """Copy a job to one rank with fake tensors, and return it with their mode."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        objective = copy.deepcopy(plain_objective(job))
    if job.config.precision == "bf16" and job.device.type == "cpu":
        norms_as_on_a_gpu(objective)
    return mode, replace(job, world=ALONE, objective=objective)


def track(job: Job, ranks: Sequence[int]) -> list[float]:
    """Count the peak of a step on fake tensors, for each number of ranks.

    At most four numbers are counted and the others interpolated, because a count takes a second or
    more and peaks are nearly linear in the number of images.
    """
    mode, fake = without_values(job)
    images = {count: job.config.micro_batch(count) for count in ranks}
    # a single rank keeps no gradients between steps, so it does not fit the line of the others
    ends = sorted({*ranks[:2], ranks[-1], job.world.size} & {*ranks}, reverse=True)
    with mode:
        counted = [peak(fake, count) for count in ends]
    rising = [images[count] for count in ends]
    return np.interp([images[count] for count in ranks], rising, counted).tolist()


def peak(job: Job, ranks: int) -> int:
    """Count the peak bytes of one of `ranks` ranks, in a step after the first.

    Call it under the mode of the job's fake tensors, because it would change real weights.
    """
    # imported here, because it is slow and not in every torch
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed._tools.mod_tracker import ModTracker

    class NoModules(ModTracker):
        """Tracks no modules: the tracker refuses frozen ones, and those run twice per step."""

        def __enter__(self) -> "NoModules":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    config, device, size = countable(job.config, ranks), job.device, job.batches.image_size
    job = replace(job, config=config)
    job = replace(job, objective=plain_objective(job))
    count = config.loader.batch_size
    batch = Batch(
        torch.empty(count, 3, size, size, dtype=torch.uint8, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.zeros(count, dtype=torch.int64),
    )
    optimizer = build_optimizer(job.objective, config.optim)
    for parameter in job.objective.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    if ranks == 1:
        optimizer.zero_grad()
    # otherwise gradients stay, because they are the buffers that ranks exchange
    tracker = MemTracker()
    tracker._mod_tracker = NoModules()
    tracker.track_external(job.objective, optimizer, batch.images_BCHW, batch.labels_B)
    with tracker, Unpinned():
        accumulate_gradients(job, job.objective, batch, step=0)
        optimizer.step()
    pool = 0
    if config.method.masks and config.method.donors == "global":
        # the other ranks' images, and their copy in patches
        pool = 2 * (ranks - 1) * batch.images_BCHW.nbytes
    found = tracker.get_tracker_snapshot("peak")
    return pool + sum(found[on]["Total"] for on in found if on.type == device.type)


def countable(config: Config, ranks: int) -> Config:
    """Adapt the configuration to one of `ranks` ranks, without operations that read tensor values.

    No derangement is drawn, which changes no shape. If a CAM decides how many tokens are dropped,
    all are kept, which is the most that a step can need.
    """
    method, loader = replace(config.method, single_fill="permutation"), config.loader
    if counts_all_tokens(method):
        method = replace(method, no_fill="key-mask")
    loader = replace(loader, batch_size=loader.batch_size // ranks)
    return replace(config, method=method, loader=loader)


def counts_all_tokens(method: MethodConfig) -> bool:
    """Whether images drop different numbers of tokens, which are known only within a step."""
    fixed = method.mask == "random" and method.fixed_count
    return method.drops and method.no_fill == "token-drop" and not fixed


def plain_objective(job: Job) -> Objective:
    """Copy the job's objective, uncompiled: compiling takes minutes, for about the same memory.

    The copy has the same modules, and the options of the job's configuration.
    """
    objective = copy.copy(job.objective)
    objective.method, objective.kernels = job.config.method, Kernels()
    objective.recompute = job.config.recompute
    return objective


@dataclass(frozen=True)
class Kept:
    """Bytes that one graph keeps until its backward."""

    fixed: float
    """Independent of the number of images: weights in another precision."""
    image: float

    def bytes(self, images: int) -> float:
        """Extrapolate to a number of images."""
        return self.fixed + images * self.image


@dataclass(frozen=True)
class Memory:
    """Memory needs of one rank, in bytes."""

    weights: int
    """Of the student, and of a trained text tower."""
    teachers: int
    """Of all models that are frozen or follow the student."""
    trained: int
    """Of the trained weights; their gradient is as large."""
    states: int
    """Of the optimizer."""
    clean: Kept
    counterfactual: Kept
    map_image: int
    """One layer's attention maps per image, fp32; 0 without a CAM."""

    def total(self, images: int) -> float:
        """Sum for a number of images forwarded at once."""
        cam = MAPS * min(images * self.map_image, MAP_BYTES)
        # the maximum, because the two graphs are never alive at the same time
        graph = max(self.clean.bytes(images) + cam, self.counterfactual.bytes(images))
        return self.weights + self.teachers + self.trained + self.states + graph


def measure(job: Job) -> Memory:
    """Measure the memory of a rank: weights by size, activations by running both graphs."""
    objective, method = job.objective, job.config.method
    followers = (
        *(objective.teacher, objective.ensemble, objective.pretrained),
        objective.random_texts,
    )
    one, two = (graph_bytes(job, images) for images in (1, 2))
    # a line through both; a negative fixed part can only come from rounding of small tensors
    clean, counterfactual = (
        Kept(fixed=max(0.0, 2 * low - high), image=high - low)
        for low, high in zip(one, two, strict=True)
    )
    tokens = 1 + (job.batches.image_size // job.student.patch_side) ** 2
    heads = vit.blocks(job.student.visual)[0].attn.num_heads
    return Memory(
        weights=sum(map(module_bytes, filter(None, (objective.student, objective.contrast)))),
        teachers=sum(map(module_bytes, filter(None, followers))),
        trained=module_bytes(objective, trained=True),
        states=state_bytes(job),
        clean=clean,
        counterfactual=counterfactual,
        map_image=4 * heads * tokens**2 if method.needs_cam and method.cam == "relevance" else 0,
    )


def graph_bytes(job: Job, images: int) -> tuple[int, int]:
    """Measure the memory that a step's clean and counterfactual graphs keep for `images` images.

    The student's gradients and weights are not changed.
    """
    batches, method = job.batches, job.config.method
    # one more image, because a fill needs another
    batch = batches.packed.batch(batches.samples[: images + 1], batches.image_size)
    pool_ZCHW = batch.images_BCHW.to(job.device)
    images_BCHW, labels_B = pool_ZCHW[:images], batch.labels_B[:images].to(job.device)
    objective = plain_objective(job)
    draws = None
    if method.masks:
        patches = (batches.image_size // job.student.patch_side) ** 2
        # any address: a graph depends on the draws only where random masks drop unequal numbers
        address = StepAddress(job.config.seed, 0, 0, 0)
        draws = draw(method, range(images), patches, len(pool_ZCHW), address)
        draws = draws.copied(partial(to_device, device=job.device))
    with autocast(job.device, job.config.precision):
        texts = draw_texts(job, objective, batch._replace(samples_B=batch.samples_B[:images]), 0)
        clean, first = kept_bytes(
            objective, lambda: objective(images_BCHW, labels_B, draws, texts=texts)
        )
    donor_BP = clean.donor_BP
    if donor_BP is None:
        return first, 0
    # free the first graph before the second is built, as in a step
    del clean
    with autocast(job.device, job.config.precision):
        _, second = kept_bytes(objective, lambda: objective(pool_ZCHW, labels_B, draws, donor_BP))
    return first, second


def kept_bytes(module: nn.Module, call: Callable[[], Any]) -> tuple[Any, int]:
    """Run `call`; return its result and the bytes that autograd keeps for its backward.

    Tensors that share a storage count once; the module's own parameters do not count.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # the returned tensor keeps the storage alive, so that its address is not reused
            kept[storage.data_ptr()] = storage.nbytes()
        # detached, because the tensor itself would keep its own graph alive forever
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(kept.values())


def state_bytes(job: Job) -> int:
    """Compute the bytes of the optimizer's state: both moments of AdamW, and FTP's last step."""
    copies = 3 if job.config.optim.optimizer == "ftp" else 2
    return copies * module_bytes(job.objective, trained=True)


def module_bytes(module: nn.Module, *, trained: bool = False) -> int:
    """Compute the bytes of a module's parameters, or only of the trained ones."""
    return sum(
        parameter.nbytes
        for parameter in module.parameters()
        if parameter.requires_grad or not trained
    )
