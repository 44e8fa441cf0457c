"""The page of an export (README.md), with the metadata of model hubs at its top.

Names of classes, sets and recipes are untrusted text. huggingface_hub's YAML writer quotes them in
the metadata, and their punctuation marks are escaped in the text.
"""

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rft.clip.card import Card
from rft.clip.load import MINIATURE, names_folder
from rft.sets import BENCHMARKS, TRAIN_SET
from rft.statistics.accuracy import LEVEL

NAME = "README.md"
LOADER = "load.py"
SHOWN_CLASSES = 100
CLASSES = "## Classes"
# punctuation with a meaning in Markdown: some anywhere, dots and dashes where a list or link starts
MARKS = re.compile(
    r"[\\`*_{}\[\]<>()#+!|~&:@$^]|^[-=]|(?<=www)\.|(?<!\w)\.|\.(?!\w)", re.IGNORECASE
)
# of pre-trained weights, by the start or end of their repository's name; from their own pages
LICENCES = {"laion/": "MIT", ".openai": "MIT", MINIATURE: "Apache-2.0"}  # the last is rft's own
IMAGENET = "ILSVRC/imagenet-1k"  # on the hub
SETTINGS = (
    *("method.mask", "method.fill", "method.rate", "method.threshold", "method.distill_weight"),
    *("method.loss", "method.context_weight", "method.lipsum_weight", "method.head_weight"),
    *("method.cam_model", "method.donor_choice", "method.teacher", "method.teacher_decay"),
    *("optim.epochs", "optim.lr", "optim.weight_decay", "optim.trains", "optim.freeze"),
    *("optim.optimizer", "optim.l2_sp", "optim.spd", "optim.ftp_k"),
    *("loader.batch_size", "loader.shots", "loader.augment"),
    *("alpha", "scale", "preset", "precision"),
)


def loader() -> bytes:
    """Read the content of load.py, which is copied into an export."""
    return (resources.files("rft") / "convert" / "standalone.py").read_bytes()


def page(card: Card) -> bytes:
    """Write the page of an open-clip export."""
    text = "\n\n".join([f"---\n{_metadata(card)}\n---", *_sections(card)])
    return f"{text}\n".encode()


def has_classes(path: Path, card: Card) -> bool:
    """Whether a page lists the classes of a card, or has no list of classes."""
    _, heading, listed = path.read_text("utf-8", "replace").partition(f"\n{CLASSES}\n")
    return not heading or "\n".join(["", *_classes(card), ""]) in listed


def _metadata(card: Card) -> str:
    on_imagenet = any(seen.name == TRAIN_SET for seen in card.trained_on or ())
    data = ModelCardData(
        pipeline_tag="image-classification",
        library_name="open_clip",
        # it also depends on the data, and the maker of the fine-tuned weights chooses it
        license="unknown",
        tags=["clip", "open_clip", "image-classification", "robust-fine-tuning", "rft"],
        base_model=card.base_model,
        datasets=[IMAGENET] if on_imagenet else None,
        metrics=["accuracy"] if card.metrics else None,
        # required by eval_results
        model_name=_title(card) if card.metrics else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=name,
                dataset_name=_set_title(name),
                dataset_revision=count["manifest_sha256"],
                metric_type="accuracy",
                metric_name="top-1 accuracy",
                metric_value=round(count["correct"] / count["total"], 6),
            )
            for name, count in card.metrics.items()
        ]
        or None,
    )
    return data.to_yaml()


def _sections(card: Card) -> Iterator[str]:
    yield f"# {_text(_title(card))}"
    yield _about(card)
    yield (
        f"## Use\n\n`python {LOADER} IMAGE...` prints the class of each image. It needs only "
        "`pip install open_clip_torch`. Its function `classify` returns all probabilities. With "
        "rft: `rft predict FOLDER IMAGE...`, or `rft.load(FOLDER)` in Python."
    )
    yield f"## How it was made\n\n{_table(('setting', 'value'), list(_made(card)))}"
    yield "\n\n".join(["## Accuracy", *_accuracies(card)])
    yield "\n".join(["## Limits", "", *_limits(card)])
    yield "\n".join(["## Licence", "", *_licences(card)])
    yield "\n".join([CLASSES, "", *_classes(card)])


def _about(card: Card) -> str:
    made = f", made with the recipe {_text(card.recipe)}" if card.recipe else ""
    done = f" **Its training had not ended ({_text(card.unfinished)}).**" if card.unfinished else ""
    return (
        f"An image classifier with {card.head.classes:,} classes: the image tower of "
        f"{_text(_short(card.architecture.clip))} and a linear head on its normalised "
        f"features{made}. The text tower is that of the pre-trained model. rft implements [Masked "
        "Images Are Counterfactual Samples for Robust Fine-tuning]"
        f"(https://arxiv.org/abs/2303.03052).{done}"
    )


def _made(card: Card) -> Iterator[tuple[str, object]]:
    yield "pre-trained model", _short(card.architecture.clip)
    yield "pre-trained weights", card.base_model or _weights(card) or "not recorded"
    yield "recipe", card.recipe or "not recorded"
    yield "seed", "not recorded" if card.seed is None else card.seed
    for name in SETTINGS:
        group, _, field = name.rpartition(".")
        values = card.settings.get(group, {}) if group else card.settings
        # settings come from an untrusted document and may have any type
        value = values.get(field) if isinstance(values, dict) else None
        if isinstance(value, str | int | float):
            yield name, value
        elif isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            yield name, " ".join(value)
    for seen in card.trained_on or ():
        part = f"{seen.shots} images of each class, " if seen.shots else ""
        yield f"training set {seen.name}", f"{part}manifest {seen.manifest_sha256}"
    for name, sha256 in card.files.items():
        yield f"SHA-256 of {name}", sha256
    yield "SHA-256 of the run's weights", card.source.sha256
    yield "rft", card.provenance.get("rft", "")
    for name, version in card.provenance.get("packages", {}).items():
        yield name, version


def _weights(card: Card) -> str:
    """Describe the pre-trained weights in the run's settings, if they are not from the hub."""
    clip = card.architecture.clip
    if clip == MINIATURE:
        return "included in rft"
    if names_folder(clip):  # a folder has its own weights, whatever tag the settings name
        return "from a local folder"
    model = card.settings.get("model")
    tag = model.get("pretrained") if isinstance(model, dict) else None
    return _short(tag) if isinstance(tag, str) else ""


def _accuracies(card: Card) -> Iterator[str]:
    if not card.metrics:
        yield "Not measured."
        return
    rows = []
    for name, count in card.metrics.items():
        low, high = count["interval"]
        balanced = count.get("mean_per_class")
        rows.append(
            (
                _set_title(name),
                f"{100 * count['correct'] / count['total']:.2f}",
                f"{100 * low:.2f} to {100 * high:.2f}",
                f"{count['correct']:,} of {count['total']:,}",
                "" if balanced is None else f"{100 * balanced:.2f}",
            )
        )
    heads = ("set", "top-1, %", f"{LEVEL:.0%} interval", "right", "mean per class, %")
    yield _table(heads, rows)
    yield (
        "The intervals (Wilson) cover the sampling of test images alone. A training with a "
        "different seed gives a different model."
    )


def _limits(card: Card) -> Iterator[str]:
    yield f"- Every image gets one of the {card.head.classes:,} classes, whatever it shows."
    if card.temperature:
        yield (
            f"- For probabilities, logits are divided by {card.temperature:.4g}, a temperature "
            "fitted on held-out training images. The probabilities are calibrated for similar "
            "images."
        )
    else:
        yield (
            "- No temperature was fitted, so the largest probability does not estimate how often "
            "the class is right."
        )
    yield "- The accuracies above hold for their test sets. They may be lower on other images."
    if card.architecture.clip == MINIATURE:
        yield "- The pre-trained model is a toy for examples, trained on small drawings only."
    else:
        yield (
            "- The pre-trained model was trained on images and texts from the web. Social biases "
            "that it learned from them were not examined."
        )
    yield (
        "- Zero-shot classification of classes described in words may be worse than with the "
        "pre-trained model: fine-tuning changes the image features, but not the text tower."
    )


def _licences(card: Card) -> Iterator[str]:
    clip = card.architecture.clip
    base = clip if clip == MINIATURE else card.base_model or ""
    found = [one for part, one in LICENCES.items() if base.startswith(part) or base.endswith(part)]
    named = f" ({_text(base)})" if base else ""
    yield f"- Pre-trained weights{named}: {found[0] if found else 'unknown'}."
    if any(seen.name == TRAIN_SET for seen in card.trained_on or ()):
        yield "- ImageNet: its terms of access permit non-commercial research and education."
    else:
        yield "- Training images: unknown to rft."
    yield (
        "- The metadata of this page has `unknown`. The maker of this model must choose a licence "
        "that is compatible with both."
    )


def _classes(card: Card) -> Iterator[str]:
    if card.classes is None:
        yield "Not recorded."
        return
    for number, name in enumerate(card.classes[:SHOWN_CLASSES]):
        yield f"{number}. {_text(name)}"
    if card.classes[SHOWN_CLASSES:]:
        yield f"\nand {len(card.classes) - SHOWN_CLASSES:,} more in card.json."


def _title(card: Card) -> str:
    return f"{_short(card.architecture.clip)} {card.recipe or 'classifier'}"


def _short(clip: str) -> str:
    """Shorten a model's name; a folder, whose path may reveal a user name, keeps its last part."""
    return PurePosixPath(clip.partition(":")[2] or clip).name or clip


def _set_title(name: str) -> str:
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads)]
    lines += [[_text(str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: Any) -> str:
    """Escape a text for Markdown with backslashes before punctuation marks."""
    return MARKS.sub(r"\\\g<0>", " ".join(str(text).split()))
