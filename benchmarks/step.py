"""What a counterfactual step costs: `python -m benchmarks.step --model ViT-B-32`.

Three steps on the same random images and weights, interleaved so that a busy machine slows all of
them alike: a vanilla step through open_clip's own forward, the textbook counterfactual step (three
student forwards, every attention map stored, the relevance matrix in full), and rft's. The last
line is one JSON object.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rft import cli, files, recipes
from rft.clip.classifier import Classifier
from rft.clip.load import Architecture
from rft.clip.vit import blocks, check_supported
from rft.method import losses, masking, refill, relevance
from rft.train.objective import Objective, StepAddress
from rft.train.optim import build_optimizer

ADDRESS = StepAddress(seed=0, step=0, rank=0, micro=0)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arguments:
    """Time one optimizer step of three implementations, fp32, object-mask single-fill."""

    model: str = "ViT-B-32"
    """open_clip model name; its weights are random."""
    batch_size: int = 16
    """Images in a step."""
    classes: int = 1000
    rounds: int = 5
    """Timed repetitions of each step, after one that is not timed."""
    save: bool = False
    """Write the result to benchmarks/results/ as well."""


def build_classifier(name: str, classes: int) -> Classifier:
    """Return a classifier with random weights and a head of CLIP's logit scale."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise cli.unknown("model", name, open_clip.list_models())
    model: Any = open_clip.create_model(name, pretrained=None)
    visual = check_supported(model.visual)
    head = nn.Linear(config["embed_dim"], classes)
    with torch.no_grad():
        head.weight.mul_(100 / head.weight.norm(dim=1, keepdim=True))
        head.bias.zero_()
    architecture = Architecture(
        clip=name,
        embed_dim=config["embed_dim"],
        vision_cfg=config["vision_cfg"],
        quick_gelu=config.get("quick_gelu", False),
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )
    return Classifier(visual, head, architecture)


def normalised(model: Classifier, images_BCHW: Tensor) -> Tensor:
    """Return the images as the tower wants them."""
    return (images_BCHW.float() - model._mean_C11) / model._std_C11


def vanilla_step(model: Classifier, images_BCHW: Tensor, labels_B: Tensor) -> None:
    """Leave the cross-entropy's gradient, through open_clip's own forward."""
    features_BE = model.visual(normalised(model, images_BCHW))
    losses.classification(model.logits(features_BE), labels_B).backward()


def our_step(objective: Objective, images_BCHW: Tensor, labels_B: Tensor) -> None:
    """Leave the counterfactual step's gradient, as the training loop does."""
    cross_entropy, donor_BP = objective(images_BCHW, labels_B, ADDRESS)
    cross_entropy.backward()
    mse, _ = objective(images_BCHW, labels_B, ADDRESS, donor_BP)
    (objective.method.distill_weight * mse).backward()


def textbook_step(objective: Objective, images_BCHW: Tensor, labels_B: Tensor) -> None:
    """Leave the same gradient by the released code's order of work."""
    student, method = objective.student, objective.method
    logits_BK, maps = forward_with_maps(student, student.patches(images_BCHW))
    score = logits_BK.gather(1, labels_B[:, None]).sum()
    gradients = torch.autograd.grad(score, maps)
    matrix_BLL = torch.eye(maps[0].shape[-1]).expand(len(images_BCHW), -1, -1)
    for map_BNLL, gradient_BNLL in zip(maps, gradients, strict=True):
        attention_BLL = (gradient_BNLL * map_BNLL.detach()).relu().mean(dim=1)
        matrix_BLL = matrix_BLL + attention_BLL @ matrix_BLL
    relevance_BP = relevance.normalise(matrix_BLL[:, 0, 1:])
    mask_BP = masking.object_mask(relevance_BP, method.threshold)
    donor_BP = refill.single_fill(mask_BP, ADDRESS.generator("fill"))
    with torch.no_grad():
        patches_BPD = refill.apply_donors(objective.teacher.patches(images_BCHW), donor_BP)
        teacher_BE = objective.teacher.features(patches_BPD)
    patches_BPD = refill.apply_donors(student.patches(images_BCHW), donor_BP)
    mse = losses.feature_mse(student.features(patches_BPD), teacher_BE)
    cross_entropy = losses.classification(student(images_BCHW), labels_B)
    (cross_entropy + method.distill_weight * mse).backward()


def forward_with_maps(model: Classifier, patches_BPD: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return logits and every layer's attention probabilities, all in one graph."""
    visual, maps = model.visual, []
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
    return model.logits(visual.ln_post(x_BLD[:, 0]) @ visual.proj), maps


def measure(arguments: Arguments) -> dict[str, float]:
    """Return the median seconds of each step."""
    student = build_classifier(arguments.model, arguments.classes)
    method = recipes.METHODS[recipes.DEFAULT]
    objective = Objective(student, copy.deepcopy(student), method)
    optimizer = build_optimizer(objective, recipes.build(recipes.DEFAULT).optim)
    size = student.architecture.image_size
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size, 3, size, size)
    images_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    labels_B = torch.randint(arguments.classes, (arguments.batch_size,), generator=generator)
    steps: dict[str, Callable[[], None]] = {
        "vanilla": lambda: vanilla_step(student, images_BCHW, labels_B),
        "textbook": lambda: textbook_step(objective, images_BCHW, labels_B),
        "step": lambda: our_step(objective, images_BCHW, labels_B),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Measure and print."""
    arguments = cli.parse(Arguments, prog="benchmarks.step")
    seconds = measure(arguments)
    for name, value in seconds.items():
        print(f"{name:9s} {1000 * value:8.1f} ms  {arguments.batch_size / value:7.1f} images/s")
    result = {
        "benchmark": "step",
        "model": arguments.model,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "precision": "fp32",
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "step_over_vanilla": round(seconds["step"] / seconds["vanilla"], 3),
        "textbook_over_step": round(seconds["textbook"] / seconds["step"], 3),
    }
    if arguments.save:
        files.write_json(str(RESULTS / f"step_{arguments.model}_cpu.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
