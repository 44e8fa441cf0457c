"""Pre-training of the tiny CLIP: symmetric InfoNCE on captioned scenes, and nothing else.

Classes, contexts and styles are independent here, so what fine-tuning ties together this model has
seen apart. It is followed on the development bank only; no fine-tuning method and no test image had
a part in any choice (docs/results.md).

Shape suffixes: B batch, C channel, H W pixels, T tokens of a caption, E embedding.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from safetensors.torch import save
from torch import Tensor

from rft.clip.head import zero_shot_head
from rft.clip.load import (
    MINIATURE,
    PretrainedClip,
    WordTokenizer,
    architecture_of,
    hub_config,
)
from rft.clip.weights import CARD, HUB_CONFIG, HUB_WEIGHTS
from rft.config import OptimConfig
from rft.demo.captions import CONTEXT_LENGTH, TEMPLATES, VOCABULARY, caption
from rft.demo.objects import CLASSES, load_silhouettes
from rft.demo.render import render
from rft.demo.scenes import VERSION, Setting, draw_scene
from rft.progress import progress
from rft.rng import derive, numpy_generator
from rft.storage import files
from rft.train.optim import set_schedule

# the shipped CLIP's configuration says what is trained, so that no number of it stands twice
ARCHITECTURE = architecture_of(MINIATURE)
OPTIM = OptimConfig(lr=1e-3, warmup_steps=60, weight_decay=0.1, beta1=0.9, beta2=0.98)
CLIP_NORM = 1.0
BATCH_SIZE = 64
LARGEST_SCALE = math.log(100)  # CLIP's bound on the logit scale, which the model keeps as a log

DIVERSE = Setting(
    bank="pretrain",
    styles={"photo": 0.48, "cartoon": 0.13, "painting": 0.13, "embroidery": 0.13, "sketch": 0.13},
    contexts="any",
    wide_rotation=0.2,
    size=(22, 38),
    noise=0.05,
)
DEV_SETS = {
    "dev-usual": Setting(bank="dev", styles={"photo": 1.0}, contexts="usual"),
    "dev-diverse": replace(DIVERSE, bank="dev"),
}
DEV_IMAGES = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioned:
    """Rendered scenes: uint8 images, classes and tokenized captions."""

    images_BCHW: Tensor
    labels_B: Tensor
    tokens_BT: Tensor


def pretrain(out: Path, seed: int = 0, *, steps: int = 1200, images: int = 30_000) -> None:
    """Train the tiny CLIP and write it to `out` as open_clip's `local-dir:` reads it."""
    started = time.perf_counter()
    data = draw_captioned("pretrain", DIVERSE, images, seed)
    dev = {name: draw_captioned(name, s, DEV_IMAGES, seed) for name, s in DEV_SETS.items()}
    log.info(f"drew {images} captioned images in {time.perf_counter() - started:.0f} s")
    model = build_model(seed)
    optimizer = build_optimizer(model)
    contrast = ClipLoss()
    batches = draw_batches(images, seed)
    with progress("pre-training", "steps", steps) as advance:
        for step in range(steps):
            if step % 200 == 0:
                seconds, text = time.perf_counter() - started, losses_in_words(measure(model, dev))
                log.info(f"step {step}/{steps}  {seconds:.0f} s  {text}")
            chosen = next(batches)
            loss = contrast(*model(normalise(data.images_BCHW[chosen]), data.tokens_BT[chosen]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            set_schedule(optimizer, step, steps, OPTIM)
            optimizer.step()
            # after the step, which may pass the bound
            with torch.no_grad():
                model.logit_scale.clamp_(max=LARGEST_SCALE)
            advance(1, 0)
    measured = measure(model, dev)
    command = f"python -m rft.demo pretrain --out DIR --seed {seed}"
    card = {"command": command, "seed": seed, "steps": steps, "images": images}
    save_model(out, model, {**card, "batch_size": BATCH_SIZE, "measured": measured})
    seconds = time.perf_counter() - started
    log.info(f"step {steps}/{steps}  {seconds:.0f} s  {losses_in_words(measured)}")
    log.info(f"wrote {out}")


def draw_captioned(name: str, setting: Setting, images: int, seed: int) -> Captioned:
    """Draw captioned images of a setting; image n is a function of (name, seed, n) alone."""
    silhouettes = load_silhouettes(setting.bank)
    pictures, labels, texts = [], [], []
    with progress(name, "images", images) as advance:
        for number in range(images):
            rng = numpy_generator(seed, name, number)
            scene = draw_scene(setting, number % len(CLASSES), silhouettes, rng)
            pictures.append(render(scene, rng)[0])
            labels.append(scene.class_id)
            texts.append(caption(scene, rng))
            advance(1, 0)
    # in memory as uint8: 30,000 images of 48 x 48 take 207 MB, as fp32 four times that
    images_BCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    tokenize = WordTokenizer(VOCABULARY, CONTEXT_LENGTH)
    return Captioned(images_BCHW, torch.tensor(labels), tokenize(texts))


def normalise(images_BCHW: Tensor) -> Tensor:
    """Return uint8 images as the model's fp32 input."""
    spread = (ARCHITECTURE.mean, ARCHITECTURE.std)
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in spread)
    return (images_BCHW.float() / 255 - mean_C11) / std_C11


def draw_batches(images: int, seed: int) -> Iterator[Tensor]:
    """Yield image numbers batch by batch, without end: whole batches of each epoch's order."""
    epoch = 0
    while True:
        order = numpy_generator(seed, "pretrain-order", epoch).permutation(images)
        # the rest of an epoch is left out: a smaller batch has fewer negatives
        for batch in range(images // BATCH_SIZE):
            yield torch.from_numpy(order[batch * BATCH_SIZE :][:BATCH_SIZE])
        epoch += 1


def build_model(seed: int) -> CLIP:
    """Return the untrained CLIP."""
    fields: dict[str, Any] = {**hub_config(MINIATURE).model_cfg}
    with torch.random.fork_rng(devices=[]):
        # open_clip initialises from the global generator: lend it an addressed state
        torch.default_generator.manual_seed(derive(seed, "pretrain-weights"))
        return CLIP(**fields)


def build_optimizer(model: CLIP) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, as CLIP was trained."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": OPTIM.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # matrices alone decay: not biases, norms, the class token and the logit scale
    return torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), fused=True)


@torch.no_grad()
def measure(model: CLIP, dev: dict[str, Captioned]) -> dict[str, float]:
    """Return the zero-shot accuracy on each set, and the mean square of a feature's entry.

    The latter (un-normalised features, on fine-tuning's kind of image) is the scale that the
    weight of feature distillation has to be read against.
    """
    model.eval()
    clip = PretrainedClip(model, WordTokenizer(VOCABULARY, CONTEXT_LENGTH), ARCHITECTURE)
    head = zero_shot_head(clip, CLASSES, TEMPLATES)
    measured: dict[str, float] = {}
    for name, data in dev.items():
        features_BE = model.encode_image(normalise(data.images_BCHW))
        guesses_B = head(F.normalize(features_BE, dim=-1)).argmax(dim=-1)
        measured[f"{name}-correct"] = int((guesses_B == data.labels_B).sum())
        measured[f"{name}-total"] = len(guesses_B)
        measured[f"{name}-feature-mean-square"] = round(float(features_BE.square().mean()), 4)
    model.train()
    return measured


def losses_in_words(measured: dict[str, float]) -> str:
    """Return the accuracies of `measure` in words."""
    shares = {name: measured[f"{name}-correct"] / measured[f"{name}-total"] for name in DEV_SETS}
    return "  ".join(f"{name} {share:.1%}" for name, share in shares.items())


def save_model(out: Path, model: CLIP, card: dict[str, Any]) -> None:
    """Write weights, configuration, vocabulary and a card that says where they come from."""
    config = (Path(__file__).parent / "clip" / HUB_CONFIG).read_bytes()
    # safetensors refuses tensors that are not contiguous
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    files.write_bytes(str(out / HUB_CONFIG), config)
    files.write_bytes(str(out / "vocab.txt"), ("\n".join(VOCABULARY) + "\n").encode())
    packages = files.provenance()["packages"]
    made_with = {"world_version": VERSION, "threads": torch.get_num_threads(), "packages": packages}
    files.write_json(str(out / CARD), {**card, **made_with})
    # last: the folder does not load before its weights are there
    files.write_bytes(str(out / HUB_WEIGHTS), save(state))
