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
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer
from safetensors.torch import save
from torch import Tensor

from rft.clip.classifier import Classifier
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
from rft.demo.render import IMAGE_SIZE, render
from rft.demo.scenes import VERSION, Setting, draw_scene
from rft.demo.world import OBJECTNET_FOLDERS, SETS, WorldSet
from rft.evaluate.coverage import Pixels, count_object
from rft.evaluate.measure_cam import label_map
from rft.paper import Covered
from rft.progress import progress
from rft.recipes import OURS
from rft.rng import derive, numpy_generator
from rft.sets import ID_SET, TEST_SETS
from rft.storage import files
from rft.train.optim import set_schedule

# the shipped CLIP's configuration says what is trained, so that no number of it stands twice
ARCHITECTURE = architecture_of(MINIATURE)
OPTIM = OptimConfig(lr=1e-3, warmup_steps=60, weight_decay=0.1, beta1=0.9, beta2=0.98)
CLIP_NORM = 1.0
BATCH_SIZE = 64
LARGEST_SCALE = math.log(100)  # CLIP's bound on the logit scale, which the model keeps as a log

# The share of patches that a training step does not see. It halves a step's time, and a model that
# cannot rely on any one patch has a relevance that covers more of the object (docs/results.md).
PATCH_DROPOUT = 0.5
STEPS = 2000

DIVERSE = Setting(
    bank="pretrain",
    # many sketches: with 13% of them, zero-shot accuracy on sketches stayed near chance
    styles={
        "photo": 0.46,
        "cartoon": 0.26 / 3,
        "painting": 0.26 / 3,
        "embroidery": 0.26 / 3,
        "sketch": 0.28,
    },
    contexts="any",
    wide_rotation=0.2,
    size=(32, 48),
    noise=0.05,
)
# the settings of the evaluation sets, with objects and images of their own
DEV_SETS = {
    name: replace(SETS[name], setting=replace(SETS[name].setting, bank="dev")) for name in TEST_SETS
}
DEV_IMAGES = 500

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioned:
    """Rendered scenes: uint8 images, classes, object masks (bool) and tokenized captions."""

    images_BCHW: Tensor
    labels_B: Tensor
    object_BHW: Tensor
    tokens_BT: Tensor


def pretrain(out: Path, seed: int = 0, *, steps: int = STEPS, images: int = 30_000) -> None:
    """Train the tiny CLIP and write it to `out` as open_clip's `local-dir:` reads it."""
    started = time.perf_counter()
    data = draw_captioned("pretrain", WorldSet(setting=DIVERSE, images=images), seed)
    dev = {
        name: draw_captioned(f"dev-{name}", replace(one, images=DEV_IMAGES), seed)
        for name, one in DEV_SETS.items()
    }
    log.info(f"drew {images} captioned images in {time.perf_counter() - started:.0f} s")
    model = build_model(seed)
    optimizer = build_optimizer(model)
    contrast = ClipLoss()
    batches = draw_batches(images, seed)
    with progress("pre-training", "steps", steps) as advance:
        for step in range(steps):
            if step % 200 == 0:
                seconds, text = time.perf_counter() - started, in_words(measure(model, dev))
                log.info(f"step {step}/{steps}  {seconds:.0f} s  {text}")
            chosen = next(batches)
            with torch.random.fork_rng(devices=[]):
                # open_clip draws the patches that it drops from the global generator
                torch.default_generator.manual_seed(derive(seed, "pretrain-patches", step))
                output = model(normalise(data.images_BCHW[chosen]), data.tokens_BT[chosen])
            loss = contrast(*output)
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
    log.info(f"step {steps}/{steps}  {seconds:.0f} s  {in_words(measured)}")
    log.info(f"wrote {out}")


def draw_captioned(name: str, image_set: WorldSet, seed: int) -> Captioned:
    """Draw captioned images of a set; image n is a function of (name, seed, n) alone."""
    silhouettes = load_silhouettes(image_set.setting.bank)
    pictures, labels, objects, texts = [], [], [], []
    with progress(name, "images", image_set.images) as advance:
        for number in range(image_set.images):
            rng = numpy_generator(seed, name, number)
            class_id = image_set.classes[number % len(image_set.classes)]
            scene = draw_scene(image_set.setting, class_id, silhouettes, rng)
            image, mask = render(scene, rng)
            pictures.append(image)
            labels.append(class_id)
            objects.append(mask)
            texts.append(caption(scene, rng))
            advance(1, 0)
    # in memory as uint8: 30,000 images of 48 x 48 take 207 MB, as fp32 four times that
    images_BCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    tokenize = WordTokenizer(VOCABULARY, CONTEXT_LENGTH)
    objects_BHW = torch.from_numpy(np.stack(objects))
    return Captioned(images_BCHW, torch.tensor(labels), objects_BHW, tokenize(texts))


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
    """Return the untrained CLIP, whose image tower drops patches in training mode."""
    fields: dict[str, Any] = {**hub_config(MINIATURE).model_cfg}
    # no part of the shipped configuration: fine-tuning sees every patch
    fields["vision_cfg"] = {**fields["vision_cfg"], "patch_dropout": PATCH_DROPOUT}
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


def measure(model: CLIP, dev: dict[str, Captioned]) -> dict[str, float]:
    """Measure by what the world is judged: zero-shot accuracy and relevance.

    On each set, the correct images, scored as rft.evaluate scores the set. On usual images, what
    the object masks of the paper's method would cover with the zero-shot model's relevance for the
    label (Table 2), and the mean square of a feature's entry (un-normalised): the scale of feature
    distillation's weight.
    """
    model.eval()
    clip = PretrainedClip(model, WordTokenizer(VOCABULARY, CONTEXT_LENGTH), ARCHITECTURE)
    visual = model.visual
    assert isinstance(visual, VisionTransformer)  # open_clip's type allows ResNets too
    classifier = Classifier(visual, zero_shot_head(clip, CLASSES, TEMPLATES), ARCHITECTURE)
    measured: dict[str, float] = {}
    for name, data in dev.items():
        groups = groups_of(name)
        with torch.no_grad():
            features_BE = classifier.features(classifier.patches(data.images_BCHW))
            logits_BK = classifier.logits(features_BE)
        # a group's score is its best class's; an image's group is the one that has its label
        scores_BG = torch.stack([logits_BK[:, list(group)].amax(dim=1) for group in groups], dim=1)
        group_of = {class_id: at for at, group in enumerate(groups) for class_id in group}
        truth_B = torch.tensor([group_of[label] for label in data.labels_B.tolist()])
        measured[f"{name}-correct"] = int((scores_BG.argmax(dim=1) == truth_B).sum())
        measured[f"{name}-total"] = len(truth_B)
        if name == ID_SET:
            measured["feature-mean-square"] = round(float(features_BE.square().mean()), 4)
            covered = cover(classifier, data)
            measured |= {name: round(rate, 4) for name, rate in covered._asdict().items()}
    model.train()
    return measured


def groups_of(name: str) -> list[tuple[int, ...]]:
    """Return the label groups that a set is scored over: its classes, or ObjectNet's folders."""
    if name == "objectnet":
        return [classes for _, classes in OBJECTNET_FOLDERS.values() if classes]
    return [(class_id,) for class_id in SETS[name].classes]


def cover(classifier: Classifier, data: Captioned) -> Covered:
    """Measure what the object masks of the paper's method would cover (Table 2)."""
    relevance_BP = label_map(classifier, data.images_BCHW, data.labels_B, "relevance")
    object_BP = count_object(data.object_BHW, relevance_BP.shape[1])
    masked_BP = relevance_BP > OURS.threshold
    pixels = Pixels(
        image=IMAGE_SIZE**2,
        object_N=object_BP.sum(dim=1).numpy(),
        masked_TN=(masked_BP.sum(dim=1) * classifier.patch_side**2)[None].numpy(),
        both_TN=(object_BP * masked_BP).sum(dim=1)[None].numpy(),
    )
    return pixels.mean_rates()[0]


def in_words(measured: dict[str, float]) -> str:
    """Return the accuracies and rates of `measure` as words of the log."""
    shares = {name: measured[f"{name}-correct"] / measured[f"{name}-total"] for name in DEV_SETS}
    rates = {name: measured[name] for name in Covered._fields}
    return "  ".join(
        [
            *(f"{name} {share:.1%}" for name, share in shares.items()),
            *(f"{name} {rate:.2f}" for name, rate in rates.items()),
        ]
    )


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
