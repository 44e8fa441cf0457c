"""FLYP's step against its released code (locuslab/FLYP): both towers, loss, gradients, updates.

Its clip/model.py and clip/loss.py need only torch and NumPy and are imported unchanged; the model
is the released CLIP, from the same random weights. Its training loop is not imported, because it
needs data sets. The steps here use AdamW, like that loop, in one process.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from benchmarks import parities
from rft.clip.architecture import Architecture
from rft.clip.classifier import Classifier
from rft.clip.load import PretrainedClip
from rft.clip.text import TextTower, head_weight
from rft.recipes import build
from rft.train.contrastive import Contrast, Pairs
from rft.train.objective import Objective, TextDraws
from rft.train.optim import build_optimizer
from rft.train.texts import Texts

REPOSITORY = "locuslab/FLYP"
VARIABLE = "RFT_PEER_FLYP"
STEPS = 5
RATE = 1e-2
IMAGES, CLASSES, TEMPLATES, LENGTH, CONTEXT, TOKENS = 16, 6, 4, 9, 20, 50
VISION = {"layers": 3, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
ARCHITECTURE = Architecture(
    clip="parity",
    embed_dim=32,
    vision_cfg=VISION,
    quick_gelu=True,
    mean=(0.48, 0.46, 0.41),
    std=(0.27, 0.26, 0.28),
)


def measure(checkout: Path) -> dict[str, float]:
    """Fine-tune the same random CLIP with both, on the same images and prompts."""
    draw = torch.Generator().manual_seed(0)
    clip, prompts_KMT = random_clip(draw), random_prompts(draw)
    images_BCHW = torch.randint(256, (IMAGES, 3, 32, 32), generator=draw, dtype=torch.uint8)
    # one class occurs more than once: its other images are negatives
    labels_B = torch.randint(CLASSES, (IMAGES,), generator=draw)
    template_B = torch.randint(TEMPLATES, (IMAGES,), generator=draw)
    peer = peer_clip(checkout, clip)
    objective = our_objective(clip, prompts_KMT)
    pairs = Pairs(template_B, lambda rows: rows, 0)

    def ours() -> Tensor:
        return objective(images_BCHW, labels_B, None, texts=TextDraws(pairs=pairs)).loss

    padded_BT = torch.zeros(IMAGES, CONTEXT, dtype=torch.int64)
    padded_BT[:, :LENGTH] = prompts_KMT[labels_B, template_B]
    student = objective.student
    pixels_BCHW = (images_BCHW.float() - student._mean_C11) / student._std_C11
    their_loss = parities.load(checkout / "clip/loss.py").ClipLoss()

    def theirs() -> Tensor:
        return their_loss(*peer(pixels_BCHW, padded_BT))

    return compared(objective, peer, ours, theirs, prompts_KMT)


def compared(
    objective: Objective,
    peer: nn.Module,
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    prompts_KMT: Tensor,
) -> dict[str, float]:
    """Compare loss and gradients of a step, and the loss and the head after several."""
    # with its rate of 1e-5, a few steps would change nothing measurable in fp32
    config = replace(build("flyp").optim, lr=RATE)
    own_optimizer = build_optimizer(objective, config)
    their_optimizer = torch.optim.AdamW(
        peer.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    found = {}
    for step in range(STEPS + 1):
        own_optimizer.zero_grad()
        their_optimizer.zero_grad()
        losses = [ours(), theirs()]
        for loss in losses:
            loss.backward()
        when = "of the first step" if step == 0 else f"after {STEPS} steps"
        if step in (0, STEPS):
            found[f"loss {when}"] = parities.difference(*(loss.detach() for loss in losses))
        if step == 0:
            found[f"gradients {when}"] = max(
                parities.difference(gradient(own), gradient(other))
                for own, other in paired(objective, peer)
            )
        if step < STEPS:
            own_optimizer.step()
            their_optimizer.step()
    contrast = objective.contrast
    assert contrast is not None
    found["head of the trained text tower"] = parities.difference(
        head_weight(contrast.tower, prompts_KMT), peer_head(peer, prompts_KMT)
    )
    return found


def gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient that a backward left."""
    assert parameter.grad is not None
    return parameter.grad


def random_clip(draw: torch.Generator) -> PretrainedClip:
    """Create a CLIP with random weights and the logit scale of a trained one."""
    text: Any = {
        "context_length": CONTEXT,
        "vocab_size": TOKENS,
        "width": 64,
        "heads": 2,
        "layers": 2,
    }
    vision: Any = VISION
    model = CLIP(32, vision, text, quick_gelu=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        model.logit_scale.fill_(math.log(20))
    # nothing is tokenized
    tokenize: Any = None
    return PretrainedClip(model, tokenize, ARCHITECTURE)


def random_prompts(draw: torch.Generator) -> Tensor:
    """Draw tokens (K, M, T): prompts of unequal length, the end token the largest."""
    prompts_KMT = torch.randint(1, TOKENS - 2, (CLASSES, TEMPLATES, LENGTH), generator=draw)
    prompts_KMT[..., 0] = TOKENS - 2
    ends_KM = torch.randint(3, LENGTH, (CLASSES, TEMPLATES), generator=draw)
    places_T = torch.arange(LENGTH)
    prompts_KMT[places_T > ends_KM[..., None]] = 0
    prompts_KMT[places_T == ends_KM[..., None]] = TOKENS - 1
    return prompts_KMT


def our_objective(clip: PretrainedClip, prompts_KMT: Tensor) -> Objective:
    """Return FLYP's objective of that CLIP."""
    student, teacher = classifier(clip), classifier(clip)
    student.head.requires_grad_(False)
    texts = Texts(contrast=Contrast(TextTower(clip, "a parity"), prompts_KMT))
    return Objective(student, teacher, build("flyp").method, texts=texts)


def classifier(clip: PretrainedClip) -> Classifier:
    """Return the image tower of that CLIP with a head."""
    visual = ARCHITECTURE.build_visual()
    visual.load_state_dict(clip.model.visual.state_dict())
    return Classifier(visual, nn.Linear(32, CLASSES), ARCHITECTURE)


def peer_clip(checkout: Path, clip: PretrainedClip) -> nn.Module:
    """Return the released code's own CLIP with the same weights."""
    module = parities.load(checkout / "clip/model.py")
    sizes = (32, VISION["image_size"], VISION["layers"], VISION["width"], VISION["patch_size"])
    peer = module.CLIP(*sizes, CONTEXT, TOKENS, 64, 2, 2)
    peer.load_state_dict(clip.model.state_dict())
    return peer


def paired(objective: Objective, peer: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Pair all parameters that learn with the released code's, by their names."""
    contrast = objective.contrast
    assert contrast is not None
    own = {f"visual.{n}": p for n, p in objective.student.visual.named_parameters()}
    own |= dict(contrast.tower.named_parameters())
    theirs = dict(peer.named_parameters())
    assert own.keys() == theirs.keys()
    return [(own[name], theirs[name]) for name in own]


@torch.no_grad()
def peer_head(peer: Any, prompts_KMT: Tensor) -> Tensor:
    """Compute the zero-shot head (K, E) with the released code's text tower."""
    rows = []
    for prompts_MT in prompts_KMT:
        padded_MT = torch.zeros(TEMPLATES, CONTEXT, dtype=torch.int64)
        padded_MT[:, :LENGTH] = prompts_MT
        features_ME = peer.encode_text(padded_MT)
        mean_E = (features_ME / features_ME.norm(dim=-1, keepdim=True)).mean(dim=0)
        rows.append(mean_E / mean_E.norm())
    return torch.stack(rows) * peer.logit_scale.exp()
