"""Complete steps at the paper's widths without a GPU, on tensors with a shape and no values.

On torch's `meta` device any read of a value fails, at points where the host would wait for a GPU.
Autocast does not support `meta`, so bf16 is checked on fake CPU tensors, which have no values
either, with autocast's list for CPUs. Fake CUDA tensors would have the GPU's list, but without a
driver torch has neither autocast nor backward for them. tests/gpu repeats the first check on a GPU,
in bf16 too.
"""

import contextlib
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rft import dist, recipes
from rft.clip.architecture import Architecture
from rft.clip.classifier import Classifier
from rft.clip.load import PretrainedClip
from rft.clip.text import TextTower
from rft.config import Config, MethodConfig
from rft.loading.dataset import Batch
from rft.method import counterfactual, losses, masking, relevance
from rft.method.counterfactual import Draws
from rft.train import step as step_module
from rft.train.contrastive import Contrast
from rft.train.job import Job
from rft.train.meter import Meter
from rft.train.objective import Objective
from rft.train.optim import build_optimizer, set_schedule
from rft.train.step import accumulate_gradients
from rft.train.texts import RandomTexts, Texts

BATCH = 512
LAYERS = 3  # a first, a last and one between: all others are like the second
CLASSES = 1000
# a larger grid of patches only changes shapes, in the same way for all recipes
CASES = [*((recipe, "ViT-B-32") for recipe in recipes.TRAINED), (recipes.DEFAULT, "ViT-B-16")]

# options that no recipe sets: a recipe and changes of its configuration
OPTIONS = {
    "accumulate": (recipes.DEFAULT, {"optim": {"accumulate": 2}}),
    "clip each micro-step": (
        recipes.DEFAULT,
        {"optim": {"accumulate": 2, "clip": "micro-step", "schedule": "one-cycle"}},
    ),
    "global donors": (
        "object-mask-multi-fill",
        {"method": {"donors": "global"}, "optim": {"accumulate": 2}},
    ),
    "grad-cam": ("context-mask-multi-fill", {"method": {"cam": "grad-cam"}}),
    "derangement": (recipes.DEFAULT, {"method": {"single_fill": "derangement"}}),
    "same draws": ("random-mask-multi-fill", {"method": {"same_draws": True}}),
    "fixed masks refilled": ("random-mask-single-fill", {"method": {"random_mask": "fixed"}}),
    "bernoulli masks dropped": ("random-mask-no-fill", {"method": {"random_mask": "bernoulli"}}),
    "key mask": ("random-mask-no-fill", {"method": {"no_fill": "key-mask"}}),
    "token drop": ("random-mask-no-fill", {"method": {"no_fill": "token-drop"}}),
    "recompute": (recipes.DEFAULT, {"recompute": True}),
    "recompute, grad-cam, no fill": (
        "object-mask-no-fill",
        {"recompute": True, "method": {"cam": "grad-cam"}},
    ),
}


class HostWaitsError(Exception):
    """Here the host would wait for a GPU, or a GPU would refuse the operands."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations that `meta` permits: operands on two devices, and copies that block.

    A little too strict: a GPU takes a scalar of the CPU without waiting. Not seen are operators
    that wait inside, such as torch.linalg's.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = devices_of((args, kwargs))
        if len(devices) > 1:
            raise HostWaitsError(f"{operation}: operands on {sorted(devices)}")
        if operation is torch.ops.aten.lift_fresh.default and devices != {"cpu"}:
            raise HostWaitsError(f"{operation}: Python's numbers are copied to {devices}")
        result = operation(*args, **kwargs)
        moved = devices_of(result) - devices
        if devices and moved and not kwargs.get("non_blocking"):
            raise HostWaitsError(f"{operation}: a copy to {moved} that blocks")
        return result


def devices_of(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


@pytest.fixture
def meta(monkeypatch) -> torch.device:
    """The device, which stands in for a GPU where torch supports GPUs and not `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    # only the check refuses: the kernel has a meta version
    monkeypatch.setattr(
        torch_optimizer, "_get_fused_kernels_supported_devices", lambda: ["cuda", "meta"]
    )
    return torch.device("meta")


@pytest.fixture
def fake(monkeypatch) -> Iterator[torch.device]:
    """The CPU, whose tensors have no values during the test; draws are real at first."""
    mode, real = FakeTensorMode(), counterfactual.draw

    def draw(*arguments) -> Draws:
        # a derangement is redrawn until it is one
        with unset_fake_temporarily():
            draws = real(*arguments)
        values = (mode.from_tensor(part) if torch.is_tensor(part) else part for part in draws)
        return Draws(*values)

    monkeypatch.setattr(counterfactual, "draw", draw)
    with mode:
        yield torch.device("cpu")


def build_model(name: str, device: torch.device) -> Classifier:
    """An open_clip model without allocated weights."""
    model = open_clip.get_model_config(name)
    architecture = Architecture(
        clip=name,
        embed_dim=model["embed_dim"],
        vision_cfg={**model["vision_cfg"], "layers": LAYERS},
        quick_gelu=False,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )
    with device:
        head = nn.Linear(architecture.embed_dim, CLASSES)
        return Classifier(architecture.build_visual(), head, architecture)


def build_texts(method: MethodConfig, model: str, device: torch.device) -> Texts:
    """A method's inputs beside the images, from an open_clip model without allocated weights."""
    config = open_clip.get_model_config(model)
    with device:
        clip = CLIP(config["embed_dim"], config["vision_cfg"], {**config["text_cfg"], "layers": 2})
        contexts_ME = torch.empty(80, config["embed_dim"])
        prompts_KMT = torch.empty(CLASSES, 80, 20, dtype=torch.int64)
    architecture = types.SimpleNamespace(clip=model)
    pretrained = PretrainedClip(clip, open_clip.tokenize, architecture)
    tower = TextTower(pretrained, "a test")
    return Texts(
        contexts_ME if method.context_weight else None,
        RandomTexts(pretrained, tower) if method.lipsum_weight else None,
        Contrast(tower, prompts_KMT) if method.loss == "contrastive" else None,
    )


def build_job(config: Config, model: str, device: torch.device) -> Job:
    student = build_model(model, device)
    student.visual.requires_grad_(config.optim.trains == "all")
    student.head.requires_grad_(config.method.loss == "cross-entropy")
    return Job(
        config=config,
        world=dist.World(rank=0, size=1, local_rank=0),
        device=device,
        objective=Objective(
            student,
            build_model(model, device),
            config.method,
            ensemble=build_model(model, device) if config.method.kd_weight else None,
            texts=build_texts(config.method, model, device),
            recompute=config.recompute,
        ),
        batches=types.SimpleNamespace(image_size=student.architecture.image_size),
        held_out=np.arange(0),
        fingerprint={},
    )


def build_config(recipe: str, **changes) -> Config:
    """A recipe's configuration; a change is a field's value, or a dict of those of a part."""
    # the meta device has no autocast
    config = replace(recipes.build(recipe, data="-", run="-"), precision="fp32")
    for name, change in changes.items():
        part = getattr(config, name)
        change = replace(part, **change) if isinstance(change, dict) else change
        config = replace(config, **{name: change})
    return config


def train_one_step(job: Job, watch: TorchDispatchMode) -> list:
    """One step as in the training loop; return the counterfactuals to show."""
    size = job.batches.image_size
    optimizer, shown = build_optimizer(job.objective, job.config.optim), []
    meter = Meter(job.config, job.world, job.device, steps_per_epoch=1)
    batch = Batch(
        torch.empty(BATCH, 3, size, size, dtype=torch.uint8, device=job.device),
        torch.empty(BATCH, dtype=torch.int64, device=job.device),
        torch.empty(BATCH, dtype=torch.int64),
    )
    with watch:
        set_schedule(optimizer, 0, 1000, job.config.optim)
        meter.add(*accumulate_gradients(job, job.objective, batch, 0, shown), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    trainable = [parameter for parameter in job.objective.parameters() if parameter.requires_grad]
    assert set(optimizer.state) == set(trainable), "a parameter got no gradient"
    return shown


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "model"), CASES)
def test_no_recipe_makes_the_host_wait(meta, recipe, model):
    config = build_config(recipe)
    shown = train_one_step(build_job(config, model, meta), NoWaiting())
    patches = {"ViT-B-32": 49, "ViT-B-16": 196}[model]
    assert [maps.donor_BP.shape for maps in shown] == config.method.masks * [(BATCH, patches)]


@pytest.mark.parametrize("recipe", ["spd", "ftp"])
def test_nor_does_the_optimizers_second_step(meta, recipe):
    """FTP learns its radii from the second step on."""
    job = build_job(build_config(recipe), "ViT-B-32", meta)
    optimizer = build_optimizer(job.objective, job.config.optim)
    for parameter in job.student.parameters():
        parameter.grad = torch.empty_like(parameter)
    with NoWaiting():
        for _ in range(2):
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_makes_the_host_wait(meta, option):
    recipe, changes = OPTIONS[option]
    config = build_config(recipe, **changes)
    shown = train_one_step(build_job(config, "ViT-B-32", meta), NoWaiting())
    assert len(shown) == config.method.masks * config.optim.accumulate


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["object-mask-no-fill", "context-mask-no-fill"])
def test_dropping_the_tokens_of_a_cams_mask_waits(meta, recipe):
    """The one documented exception (`Objective._most_kept`): the longest row is a tensor's size."""
    config = build_config(recipe, method={"no_fill": "token-drop"})
    job = build_job(config, "ViT-B-32", meta)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        train_one_step(job, NoWaiting())


class Precisions(TorchDispatchMode):
    """Counts the matrix products of the head, and all others, by precision."""

    def __init__(self) -> None:
        super().__init__()
        self.head: Counter[torch.dtype] = Counter()
        self.others: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation).removeprefix("aten.")
        if name.startswith(("mm.", "addmm.", "bmm.", "baddbmm.", "_scaled_dot_product")):
            of_head = any(CLASSES in leaf.shape for leaf in args if torch.is_tensor(leaf))
            (self.head if of_head else self.others)[args[0].dtype] += 1
        return operation(*args, **(kwargs or {}))


# a recipe or an option for each path through a step
BF16 = {
    **{name: (name, {}) for name in ("vanilla", "linear-probe", "random-mask-no-fill")},
    **{name: (name, {}) for name in ("object-mask-no-fill", "wise-kd-object-mask-single-fill")},
    **{name: OPTIONS[name] for name in ("grad-cam", "recompute")},
}


def step_in_bf16(config: Config, device: torch.device) -> None:
    """Run one step, then check that towers compute in bf16, head and CAM in fp32."""
    job, found = build_job(config, "ViT-B-32", device), Precisions()
    gradients: set[torch.dtype] = set()
    for parameter in job.student.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradients.add(gradient.dtype))
    train_one_step(job, found)
    assert gradients == {torch.float32}
    assert set(found.head) == {torch.float32}, "the head"
    assert found.others[torch.bfloat16] >= 4 * LAYERS, "four products in each layer of a forward"
    # per layer the map, its gradient and the row's update; the last one's map is in the graph
    maps = 3 * (LAYERS - 1) + 1
    cam = maps if config.method.needs_cam and config.method.cam == "relevance" else 0
    assert found.others[torch.float32] == cam, "the CAM"


@pytest.mark.slow
@pytest.mark.parametrize("case", BF16)
def test_only_the_towers_compute_in_bf16(fake, case):
    recipe, changes = BF16[case]
    step_in_bf16(build_config(recipe, precision="bf16", **changes), fake)


@pytest.mark.slow
def test_a_fake_tensors_value_cannot_be_read_either(fake):
    config = build_config("object-mask-no-fill", precision="bf16", method={"no_fill": "token-drop"})
    with pytest.raises(DataDependentOutputException):
        train_one_step(build_job(config, "ViT-B-32", fake), Precisions())


# planted faults, which show that the checks above can fail


@pytest.fixture
def job(meta) -> Job:
    return build_job(build_config(recipes.DEFAULT), "ViT-B-32", meta)


@pytest.mark.slow
def test_a_loss_that_reads_its_value_is_noticed(job, monkeypatch):
    def mse(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(student_BE, teacher_BE)
        return loss if loss.item() < 1e6 else loss * 0

    monkeypatch.setattr(losses, "feature_mse", mse)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        train_one_step(job, NoWaiting())


@pytest.mark.parametrize("shape", [(), (1, 49)], ids=["scalar", "row"])
def test_a_tensor_left_on_the_cpu_is_noticed(job, monkeypatch, shape):
    threshold = torch.full(shape, 0.3)
    monkeypatch.setattr(masking, "object_mask", lambda map_BP, _: map_BP > threshold)
    with pytest.raises(HostWaitsError, match=r"gt\.Tensor: operands on"):
        train_one_step(job, NoWaiting())


@pytest.mark.skipif(
    torch.__version__ < "2.15", reason="an older torch hides it from a dispatch mode"
)
def test_a_tensor_made_of_pythons_numbers_is_noticed(job, monkeypatch):
    def mask(map_BP: Tensor, threshold: float) -> Tensor:
        return map_BP > torch.tensor([threshold], device=map_BP.device)

    monkeypatch.setattr(masking, "object_mask", mask)
    with pytest.raises(HostWaitsError, match="Python's numbers are copied"):
        train_one_step(job, NoWaiting())


def test_an_index_left_on_the_cpu_is_noticed(job, monkeypatch):
    # a GPU accepts it, and the host waits for the copy
    monkeypatch.setattr(step_module, "to_device", lambda tensor, device: tensor)
    with pytest.raises(HostWaitsError, match="operands on"):
        train_one_step(job, NoWaiting())


def test_weights_left_on_the_cpu_are_noticed(job):
    job.student.head = nn.Linear(512, CLASSES)
    with pytest.raises(HostWaitsError, match=r"addmm\.default: operands on"):
        train_one_step(job, NoWaiting())


def test_a_copy_that_blocks_is_noticed(job, monkeypatch):
    monkeypatch.setattr(step_module, "to_device", lambda tensor, device: tensor.to(device))
    with pytest.raises(HostWaitsError, match=r"a copy to .* that blocks"):
        train_one_step(job, NoWaiting())


@pytest.mark.slow
def test_a_head_in_bf16_is_noticed(fake, monkeypatch):
    monkeypatch.setattr(Classifier, "logits", lambda model, features_BE: model.head(features_BE))
    with pytest.raises(AssertionError, match="the head"):
        step_in_bf16(build_config("vanilla", precision="bf16"), fake)


@pytest.mark.slow
def test_a_cam_in_bf16_is_noticed(fake, monkeypatch):
    real = relevance.scores_and_gradient

    def scores_and_gradient(*arguments) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return tuple(found.float() for found in real(*arguments))

    monkeypatch.setattr(relevance, "scores_and_gradient", scores_and_gradient)
    with pytest.raises(AssertionError, match="the CAM"):
        step_in_bf16(build_config(recipes.DEFAULT, precision="bf16"), fake)
