"""Cost of a counterfactual step: `python -m benchmarks.step --model ViT-B-32`.

Optimizer steps on the same random images and weights, interleaved so that a busy machine slows all
of them alike:
  vanilla   cross-entropy through open_clip's own forward;
  own_vanilla  the training loop's own step of the recipe `vanilla`;
  textbook  the counterfactual step in the released code's order: three student forwards with
            explicit attention, with the maps of all layers and the relevance matrix stored in full;
  step      the training loop's own counterfactual step.
All in fp32, on the CPU; benchmarks.gpu measures the same steps on a GPU. The last line is one JSON
object.
"""

import contextlib
import copy
import functools
import json
import statistics
import subprocess
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rft.train.objective
import rft.train.step
from benchmarks import machine, ratios
from rft import cli, dist, recipes
from rft.clip.architecture import Architecture
from rft.clip.classifier import Classifier
from rft.clip.load import PretrainedClip
from rft.clip.vit import blocks, check_supported, cut_patches
from rft.config import Config, Precision
from rft.loading.dataset import Batch
from rft.method import losses, masking, refill, relevance
from rft.method.counterfactual import StepAddress
from rft.storage import files
from rft.train import build, kernels
from rft.train.job import Job
from rft.train.kernels import Choice
from rft.train.objective import Objective
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients
from rft.train.texts import Texts

ADDRESS = StepAddress(seed=0, step=0, rank=0, micro=0)
RESULTS = Path(__file__).parent / "results"
# of time: alternative over rft's own choice
ALTERNATIVES = {
    "adamw": ("adamw_foreach", "adamw_fused"),
    "patches_conv": ("patches_conv", "patches_matmul"),
    "patches_conv_channels_last": ("patches_conv_channels_last", "patches_matmul"),
}
WORLD = dist.World(rank=0, size=1, local_rank=0)


@dataclass(frozen=True)
class Arguments:
    """Time one optimizer step: vanilla in two implementations, object-mask single-fill in two."""

    model: str = "ViT-B-32"
    """open_clip model name; its weights are random."""
    batch_size: int = 16
    """Images per step."""
    classes: int = 1000
    rounds: int = 5
    """Timed repetitions of each step, after one warm-up."""
    processes: int = 1
    """Repeat everything in so many processes, one after the other: memory layout changes
    the ratios by some percent. The result is the process whose ratios are in the middle."""
    recompute: bool = False
    """The training loop's step with --recompute (activation checkpointing)."""
    compile: bool = False
    """Also time vanilla under torch.compile and the training loop's step with --compile; saved
    apart, because the others take another time with it in their process."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def build_clip(name: str) -> PretrainedClip:
    """Create an open_clip model with random weights, both towers, and its tokenizer."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise cli.unknown("model", name, open_clip.list_models())
    model: Any = open_clip.create_model(name, pretrained=None)
    architecture = Architecture(
        clip=name,
        embed_dim=config["embed_dim"],
        vision_cfg=config["vision_cfg"],
        quick_gelu=config.get("quick_gelu", False),
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )
    # created for the first text: it takes a while, and most benchmarks use none
    tokenizer = functools.cache(lambda: open_clip.get_tokenizer(name))
    return PretrainedClip(model, lambda texts: tokenizer()(texts), architecture)


def with_head(clip: PretrainedClip, classes: int) -> Classifier:
    """Build a classifier from a model's image tower itself and a head of CLIP's logit scale."""
    visual = check_supported(clip.model.visual)
    head = nn.Linear(clip.architecture.embed_dim, classes)
    with torch.no_grad():
        head.weight.mul_(100 / head.weight.norm(dim=1, keepdim=True))
        head.bias.zero_()
    return Classifier(visual, head, clip.architecture)


def build_classifier(name: str, classes: int) -> Classifier:
    """Build a classifier with random weights and a head of CLIP's logit scale."""
    return with_head(build_clip(name), classes)


def build_job(
    arguments: Arguments,
    device: torch.device,
    precision: Precision,
    student: Classifier,
    recipe: Config | None = None,
    *,
    teacher: Classifier | None = None,
    texts: Texts = Texts(),  # noqa: B008 (a constant)
) -> Job:
    """Return what the training loop needs for one step: of a recipe, of the main one if not given.

    Without a `teacher`, a copy of the student is.
    """
    recipe = recipe or recipes.build(recipes.DEFAULT, data="-", run="-")
    config = replace(
        recipe,
        loader=replace(recipe.loader, batch_size=arguments.batch_size),
        precision=precision,
        recompute=arguments.recompute,
    )
    plan = types.SimpleNamespace(steps_per_epoch=1)
    batches: Any = types.SimpleNamespace(image_size=student.architecture.image_size, plan=plan)
    teacher = teacher or copy.deepcopy(student)
    return Job(
        config=config,
        world=WORLD,
        device=device,
        objective=build.join(config, student, teacher, own_texts=texts).to(device),
        batches=batches,
        held_out=np.arange(0),
        fingerprint={},
    )


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context of a forward pass in a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def vanilla_step(
    model: Classifier,
    images_BCHW: Tensor,
    labels_B: Tensor,
    precision: Precision = "fp32",
    visual: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Compute the cross-entropy's gradient, through open_clip's own forward or `visual` instead."""
    if visual is None:
        visual = model.visual
    with autocast(images_BCHW.device, precision):
        features_BE = visual((images_BCHW.float() - model._mean_C11) / model._std_C11)
        cross_entropy = losses.classification(model.logits(features_BE), labels_B)
    cross_entropy.backward()


def textbook_step(
    objective: Objective, images_BCHW: Tensor, labels_B: Tensor, precision: Precision = "fp32"
) -> None:
    """Compute the counterfactual step's gradient in the released code's order."""
    student, method = objective.student, objective.method

    def forward(model: Classifier, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        with autocast(images_BCHW.device, precision):
            return forward_with_maps(model, images_BCHW)

    def cam() -> Tensor:
        features_BE, maps = forward(student, images_BCHW)
        score = student.logits(features_BE).gather(1, labels_B[:, None]).sum()
        gradients = torch.autograd.grad(score, maps)
        identity_LL = torch.eye(maps[0].shape[-1], device=score.device)
        matrix_BLL = identity_LL.expand(len(images_BCHW), -1, -1)
        for map_BNLL, gradient_BNLL in zip(maps, gradients, strict=True):
            # autocast's softmax is fp32 on a GPU and not on a CPU
            attention_BLL = (gradient_BNLL.float() * map_BNLL.detach()).relu().mean(dim=1)
            matrix_BLL = matrix_BLL + attention_BLL @ matrix_BLL
        return relevance.normalise(matrix_BLL[:, 0, 1:])

    relevance_BP = cam()  # which also frees its maps
    filled_BCHW = fill_pixels(objective, images_BCHW, relevance_BP)
    with torch.no_grad():
        teacher_BE, _ = forward(objective.teacher, filled_BCHW)
    mse = losses.feature_mse(forward(student, filled_BCHW)[0], teacher_BE)
    logits_BK = student.logits(forward(student, images_BCHW)[0])
    cross_entropy = losses.classification(logits_BK, labels_B)
    (cross_entropy + method.distill_weight * mse).backward()


def fill_pixels(objective: Objective, images_BCHW: Tensor, relevance_BP: Tensor) -> Tensor:
    """Build the counterfactual images."""
    side, device = objective.student.patch_side, images_BCHW.device
    mask_BP = masking.object_mask(relevance_BP, objective.method.threshold)
    own_B1 = torch.arange(len(images_BCHW), device=device)[:, None]
    sources_B1 = refill.single_sources(len(images_BCHW), ADDRESS.generator("fill")).to(device)
    donor_BP = refill.donors(mask_BP, sources_B1, own_B1)
    patches_BPV = refill.apply_donors(cut_patches(images_BCHW, side), donor_BP, own_B1)
    folded = F.fold(patches_BPV.transpose(1, 2).float(), images_BCHW.shape[-2:], side, stride=side)
    return folded.to(images_BCHW.dtype)


def forward_with_maps(model: Classifier, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute features and every layer's attention probabilities in one graph."""
    visual, maps = model.visual, []
    normalised_BCHW = (images_BCHW.float() - model._mean_C11) / model._std_C11
    patches_BPD = visual.conv1(normalised_BCHW).flatten(2).transpose(1, 2)
    class_B1D = visual.class_embedding.expand(len(patches_BPD), 1, -1)
    x_BLD = visual.ln_pre(torch.cat([class_B1D, patches_BPD], dim=1) + visual.positional_embedding)
    for block in blocks(visual):
        attention = block.attn
        qkv = F.linear(block.ln_1(x_BLD), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in qkv.chunk(3, dim=-1)
        )
        map_BNLL = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
        maps.append(map_BNLL)
        mixed_BLD = (map_BNLL @ value).transpose(1, 2).flatten(2)
        x_BLD = x_BLD + block.ls_1(attention.out_proj(mixed_BLD))
        x_BLD = x_BLD + block.ls_2(block.mlp(block.ln_2(x_BLD)))
    return visual.ln_post(x_BLD[:, 0]) @ visual.proj, maps


def random_batch(arguments: Arguments, device: torch.device, size: int) -> Batch:
    """Return a batch of noise, the same for equal sizes."""
    generator, count = torch.Generator().manual_seed(0), arguments.batch_size
    shape = (count, 3, size, size)
    images_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
    labels_B = torch.randint(arguments.classes, (count,), generator=generator).to(device)
    return Batch(images_BCHW, labels_B, labels_B)


def build_steps(
    arguments: Arguments, device: torch.device, precision: Precision, student: Classifier
) -> dict[str, Callable[[], None]]:
    """List complete optimizer steps by name; those with --compile compile at their first call.

    `textbook_tf32` is the released code's own setting on the cards that it ran on.
    """
    job = build_job(arguments, device, precision, student)
    optimizer = build_optimizer(job.objective, job.config.optim)
    batch = random_batch(arguments, device, student.architecture.image_size)
    images_BCHW, labels_B = batch.images_BCHW, batch.labels_B

    @functools.cache
    def compiled_visual() -> Callable[[Tensor], Tensor]:
        return torch.compile(student.visual)

    def whole(gradients: Callable[[], Any], precision: Precision, *, clips: bool = True) -> None:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        gradients()
        if clips:
            nn.utils.clip_grad_norm_(student.parameters(), job.config.optim.clip_norm)
        # looked up at each call, because phase_seconds replaces it by a timed version
        with rft.train.step.record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    def vanilla(visual: Callable[[Tensor], Tensor] | None = None) -> None:
        whole(lambda: vanilla_step(student, images_BCHW, labels_B, precision, visual), precision)

    # with its own teacher: the job's may have weights in bf16, which TF32 cannot use
    plain = Objective(student, copy.deepcopy(student), job.config.method).to(device)

    def textbook(precision: Precision) -> None:
        whole(lambda: textbook_step(plain, images_BCHW, labels_B, precision), precision)

    def own_vanilla() -> None:
        method = recipes.build("vanilla").method
        objective = Objective(student, job.objective.teacher, method)
        own = replace(job, objective=objective, config=replace(job.config, method=method))
        whole(lambda: accumulate_gradients(own, objective, batch, step=0), precision, clips=False)

    def ours(choice: Choice) -> None:
        job.objective.kernels = kernels.load(choice)
        module = job.objective
        # the loop does its own clipping
        whole(lambda: accumulate_gradients(job, module, batch, step=0), precision, clips=False)

    return {
        "vanilla": vanilla,
        "own_vanilla": own_vanilla,
        "textbook": lambda: textbook(precision),
        "step": lambda: ours(Choice()),
        "vanilla_compiled": lambda: vanilla(compiled_visual()),
        "textbook_tf32": lambda: textbook("tf32"),
        "step_compiled": lambda: ours(Choice(layers="compiled", cam="compiled")),
        "step_triton": lambda: ours(Choice(layers="compiled", cam="triton")),
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each round of each step, in turn, without the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Return the most bytes of GPU memory during a step; None on a CPU (see cam_memory.py)."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def phase_seconds(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the seconds of each phase named in the training code, the rest as "other".

    The device is waited for at both ends of a phase, so the sum is a little more than a step.
    """
    seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def stopwatch(name: str) -> Iterator[None]:
        synchronize(device)
        started = time.perf_counter()
        yield
        synchronize(device)
        seconds[name] += time.perf_counter() - started

    modules: tuple[Any, ...] = (rft.train.step, rft.train.objective)
    original = rft.train.step.record_function
    try:
        for module in modules:
            module.record_function = stopwatch
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        whole = time.perf_counter() - started
    finally:
        for module in modules:
            module.record_function = original
    return {**seconds, "other": whole - sum(seconds.values())}


def count_flops(step: Callable[[], None]) -> int:
    """Count the floating-point operations of a step's matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matmul_ceiling(device: torch.device, precision: Precision) -> float:
    """Return the floating-point operations per second of the fastest square matrix product here."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    best = 0.0
    for side in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for _ in range(10):
            synchronize(device)
            started = time.perf_counter()
            left @ right
            synchronize(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def alternatives(
    student: Classifier, arguments: Arguments, device: torch.device
) -> dict[str, ratios.Ratio | None]:
    """Return the ratios of time of alternatives for two operations, on the model's own sizes.

    The optimizer's update in one fused kernel or one for each operation, and the patch embedding as
    a matrix product (what rft does) or as open_clip's convolution, plain and channels-last.
    """
    config = recipes.build(recipes.DEFAULT).optim
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in student.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    fused = torch.optim.AdamW(parameters, lr=config.lr, fused=True)
    plain = torch.optim.AdamW(parameters, lr=config.lr, foreach=True)
    conv = student.visual.conv1
    side, size = student.patch_side, student.architecture.image_size
    images_BCHW = torch.randn(arguments.batch_size, 3, size, size, device=device)
    last_BCHW = images_BCHW.to(memory_format=torch.channels_last)
    weight_last = conv.weight.to(memory_format=torch.channels_last)
    work: dict[str, Callable[[], Any]] = {
        "adamw_fused": fused.step,
        "adamw_foreach": plain.step,
        "patches_matmul": lambda: (
            F.linear(cut_patches(images_BCHW, side), conv.weight.flatten(1)).sum().backward()
        ),
        "patches_conv": lambda: F.conv2d(images_BCHW, conv.weight, stride=side).sum().backward(),
        "patches_conv_channels_last": lambda: (
            F.conv2d(last_BCHW, weight_last, stride=side).sum().backward()
        ),
    }
    seconds = time_steps(work, arguments.rounds, device)
    student.zero_grad()
    return {
        name: ratios.of_rounds(seconds[above], seconds[below])
        for name, (above, below) in ALTERNATIVES.items()
    }


def measure(arguments: Arguments) -> dict[str, Any]:
    """Collect the document to save."""
    device = torch.device("cpu")
    student = build_classifier(arguments.model, arguments.classes)
    built = build_steps(arguments, device, "fp32", student)
    steps = {name: built[name] for name in (*EAGER, *COMPILED * arguments.compile)}
    began = time.perf_counter()
    if arguments.compile:
        steps["step_compiled"]()
    cold = time.perf_counter() - began
    rounds = time_steps(steps, arguments.rounds, device)
    seconds = {name: statistics.median(values) for name, values in rounds.items()}
    phases = phase_seconds(steps["step"], device)
    flops = {name: count_flops(steps[name]) for name in EAGER}
    ceiling = matmul_ceiling(device, "fp32")
    count = arguments.batch_size

    def over(above: str, below: str) -> ratios.Ratio | None:
        return ratios.of_rounds(rounds[above], rounds[below])

    result = {
        "benchmark": "step",
        **machine.describe(machine.STEP),
        "device": device.type,
        "torch": torch.__version__,
        "precision": "fp32",
        **{name: value for name, value in asdict(arguments).items() if name in SETTINGS},
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "slowest_over_fastest_round": {
            name: round(max(values) / min(values), 3) for name, values in rounds.items()
        },
        "images_per_second": {name: round(count / value, 2) for name, value in seconds.items()},
        "phase_share": {
            name: round(value / sum(phases.values()), 4) for name, value in phases.items()
        },
        "flops": flops,
        "matmul_ceiling_flops": round(ceiling),
        "mfu": {name: round(flops[name] / seconds[name] / ceiling, 4) for name in flops},
        **{name: over(*sides) for name, sides in RATIOS.items()},
        "flops_textbook_over_step": round(flops["textbook"] / flops["step"], 3),
        "alternatives": alternatives(student, arguments, device),
    }
    if arguments.compile:
        result["cold_seconds"] = round(cold, 1)
        result |= {name: over(*sides) for name, sides in COMPILED_RATIOS.items()}
    return result


SETTINGS = ("model", "batch_size", "classes", "rounds", "recompute")
EAGER = ("vanilla", "own_vanilla", "textbook", "step")
COMPILED = ("vanilla_compiled", "step_compiled")
# of time: name -> the step above, the step below
RATIOS = {
    "step_over_vanilla": ("step", "vanilla"),
    "step_over_own_vanilla": ("step", "own_vanilla"),
    "own_vanilla_over_vanilla": ("own_vanilla", "vanilla"),
    "textbook_over_step": ("textbook", "step"),
}
COMPILED_RATIOS = {
    "compiled_over_step": ("step_compiled", "step"),
    "vanilla_compiled_over_vanilla": ("vanilla_compiled", "vanilla"),
    "step_compiled_over_vanilla_compiled": ("step_compiled", "vanilla_compiled"),
}


def repeat(arguments: Arguments) -> dict[str, Any]:
    """Return the result of the process with the middle ratios, with the ratios of all."""
    command = [sys.executable, "-m", "benchmarks.step", "--model", arguments.model]
    for name in ("batch_size", "classes", "rounds"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--compile"] * arguments.compile + ["--recompute"] * arguments.recompute
    results = []
    for _ in range(arguments.processes):
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results.append(json.loads(told.splitlines()[-1]))
        print({name: results[-1][name]["median"] for name in RATIOS}, flush=True)
    results.sort(key=lambda result: result["textbook_over_step"]["median"])
    middle = results[len(results) // 2]
    for name in RATIOS:
        # the range covers all rounds of all processes
        middle[name]["lowest"] = min(result[name]["lowest"] for result in results)
        middle[name]["highest"] = max(result[name]["highest"] for result in results)
    return {**middle, "processes": arguments.processes}


def main() -> None:
    """Measure and print."""
    arguments = cli.parse(Arguments, prog="benchmarks.step")
    result = repeat(arguments) if arguments.processes > 1 else measure(arguments)
    for name, value in result["seconds"].items():
        rate = result["images_per_second"][name]
        print(f"{name:13s} {1000 * value:8.1f} ms  {rate:7.1f} images/s")
    for name, share in result["phase_share"].items():
        print(f"  {name:24s} {share:6.1%}")
    if arguments.save:
        kind = "step_compiled" if arguments.compile else "step"
        name = f"{kind}_{arguments.model}_cpu.json"
        files.write_json(str(RESULTS / name), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
