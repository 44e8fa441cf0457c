"""A complete training by hand: the textbook's gradients, AdamW in float64, the plan's order."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import tiny_world
from rft.clip.classifier import Classifier, load_state
from rft.clip.load import load_clip
from rft.config import Config, ModelConfig
from rft.loading.batches import plan_training
from rft.loading.dataset import PackedDataset
from rft.loading.order import EpochOrder
from rft.runs.filenames import LAST, SELECTED
from rft.storage import files
from rft.train import command as train_command
from tests import tiny
from tests.reference import adamw, textbook, zero_shot

# 60 of 76 images are used for training: two steps per epoch, of which the first warms up
NUMBERS = {
    "--loader.batch-size": 30,
    "--loader.held-out": 16,
    "--optim.epochs": 2,
    "--optim.lr": 2e-3,
    "--optim.warmup-steps": 2,
    "--optim.weight-decay": 0.3,
    "--optim.beta1": 0.6,
    "--optim.beta2": 0.8,
    # large, so that AdamW does not amplify gradients that are nearly zero
    "--optim.eps": 1e-2,
    "--optim.clip-norm": 0.5,
    "--method.distill-weight": 2,
    "--log.every-steps": 1,
    "--loader.workers": 0,
}
RATES = [1e-3, 2e-3, 2e-3, 1e-3]  # two of linear warm-up, then half a cosine over the other two


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data, tiny_clip):
    folder = tmp_path_factory.mktemp("by hand") / "run"
    options = [word for option in NUMBERS.items() for word in option]
    fixed = ("--data", tiny_data, "--run-dir", folder, "--scale", "miniature")
    tiny.call(train_command, "no-mask", *fixed, "--model.clip", tiny_clip, *options)
    return folder


def batches(packed: PackedDataset, config: Config):
    """Images and labels of every step, according to the plan."""
    plan, samples, _ = plan_training(packed, config)
    for epoch in range(config.optim.epochs):
        order = EpochOrder(plan, epoch)
        for step in range(plan.steps_per_epoch):
            chosen = samples[order.batch(step)]
            images = np.stack([packed.image(int(sample), tiny_world.SIZE) for sample in chosen])
            labels = packed.index.label[chosen].astype(np.int64)
            yield torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.slow
def test_four_steps_by_hand(run, tiny_data, tiny_clip):
    config = files.read_document(str(run / "config.json"), Config)
    packed = PackedDataset(f"{tiny_data}/imagenet-train")
    clip = load_clip(ModelConfig(clip=tiny_clip))
    weight_KE = zero_shot.head_weight(clip, packed.manifest.classes, packed.manifest.templates)
    head = torch.nn.Linear(weight_KE.shape[1], len(weight_KE))
    with torch.no_grad():
        head.weight.copy_(weight_KE)
        head.bias.zero_()
    student = Classifier(clip.model.visual, head, clip.architecture)
    frozen = Classifier(
        load_clip(ModelConfig(clip=tiny_clip)).model.visual, head, clip.architecture
    )
    moments = {name: adamw.Moments(p.detach().numpy()) for name, p in student.named_parameters()}
    for rate, (images, labels) in zip(RATES, batches(packed, config), strict=True):
        student.zero_grad()
        kept = torch.arange(len(images))[:, None].expand(-1, 16)
        textbook.step_loss(student, frozen, images, labels, kept, 2.0).backward()
        gradients = {name: p.grad.double().numpy() for name, p in student.named_parameters()}
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        assert norm > 0.5, "clipping must do something"
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                moments[name].step(gradients[name] * 0.5 / norm, rate, config.optim)
                parameter.copy_(torch.from_numpy(moments[name].weight))
    found, start = load_state(run / LAST)[0], load_clip(ModelConfig(clip=tiny_clip)).model
    assert not torch.allclose(found["visual.proj"], start.visual.proj, atol=1e-4)
    for name, expected in moments.items():
        np.testing.assert_allclose(
            found[name].numpy(), expected.weight, rtol=1e-4, atol=2e-5, err_msg=name
        )


def test_the_rates_are_logged_and_the_losses_are_their_parts(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["lr"] for line in steps] == pytest.approx(RATES)
    for line in steps:
        assert line["loss"] == pytest.approx(line["ce"] + 2 * line["mse"])


def test_the_selected_and_the_last_weights_say_their_steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = {
        line["step"]: line["held_out_correct"] for line in lines if "held_out_correct" in line
    }
    assert sorted(counts) == [2, 4]
    best = 4 if counts[4] > counts[2] else 2
    assert load_state(run / SELECTED)[2]["step"] == str(best)
    assert load_state(run / LAST)[2]["step"] == "4"
    training = json.loads((run / "training.json").read_text())
    assert (training["steps"], training["best_step"]) == (4, best)
