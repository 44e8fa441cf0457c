"""The meaning of class ids: folder names, class names and prompts, in label order.

A label space is an ordered list of ids (folder names such as WordNet ids); the class id is the
position in that list. Nothing here imports torch: ImageNet's lists are read from files inside timm
and open_clip, because importing either package takes seconds.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rft import packages
from rft.classes import Classes, composed, find_twins, prompts_sha256
from rft.storage import files
from rft.storage.documents import Text, document
from rft.text import shown

MARK = "{c}"  # the class name's position in a template; CLIP_benchmark's convention
IMAGENET_CLASSES = 1000
CLIP_CONTEXT = 77  # tokens that the text towers of OpenAI's CLIP read, two of them start and end

log = logging.getLogger(__name__)


@document
class LabelSpace:
    """Classes in label order: `ids` are folder names, `names` are words for the text encoder.

    `templates` are the prompts, with `{c}` for the class name. All texts are in Unicode's composed
    form (NFC), so names read from a disk must be composed before they are compared.

    Raises:
        ValueError: if the lists are inconsistent, there are fewer than two classes, or a text is
            empty or does not fit on one line.
    """

    ids: tuple[Text, ...]
    names: tuple[Text, ...]
    templates: tuple[Text, ...]

    def __post_init__(self) -> None:
        if not self.ids or not self.templates:
            raise ValueError("a label space needs at least one class and one template")
        if len(self.ids) != len(self.names):
            raise ValueError(f"{len(self.ids)} class ids but {len(self.names)} class names")
        repeated = [name for name, count in Counter(self.ids).items() if count > 1]
        if repeated:
            raise ValueError(f"class id {repeated[0]!r} occurs more than once")
        if twins := find_twins(self.ids):
            raise ValueError(
                f"class ids {twins[0]!a} and {twins[1]!a} are the same name in different Unicode "
                f"forms; keep one"
            )
        for name, words in zip(self.ids, self.names, strict=True):
            _require_words(name, words)
        for template in self.templates:
            _require_text("a template", template)
            if MARK not in template:
                raise ValueError(f"template {template!r} has no {MARK} for the class name")
        if len(self.ids) == 1:
            raise ValueError(
                f"{shown(self.ids[0])} is the only class; with one class every prediction is right"
            )
        # last: if composed before, twins would look like one repeated id
        for field in ("ids", "names", "templates"):
            object.__setattr__(self, field, tuple(map(composed, getattr(self, field))))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def class_of(self) -> dict[str, int]:
        """Map each folder name to its class id."""
        return {name: class_id for class_id, name in enumerate(self.ids)}

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The scoring rule of a set with all classes: each class is its own group."""
        return tuple((class_id,) for class_id in range(len(self)))

    @property
    def classes(self) -> Classes:
        """The classes, for comparison with those of a head or a packed set."""
        prompts = prompts_sha256(self.names, self.templates)
        return Classes(ids=self.ids, names=self.names, prompts_sha256=prompts)

    @staticmethod
    def imagenet() -> "LabelSpace":
        """Load ImageNet-1k: WordNet ids in label order, OpenAI's class names and 80 prompts."""
        text = (packages.folder("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text()
        metadata = packages.part("open_clip", "zero_shot_metadata")
        return LabelSpace(
            ids=tuple(text.split()),
            names=tuple(metadata.IMAGENET_CLASSNAMES),
            templates=tuple(template(MARK) for template in metadata.OPENAI_IMAGENET_TEMPLATES),
        )

    @staticmethod
    def load(path: str) -> "LabelSpace":
        """Read a label space from JSON: `{"ids": [...], "names": [...], "templates": [...]}`.

        Raises:
            ValueError: if the file is absent or does not describe a label space.
        """
        return files.read_document(path, LabelSpace)


def is_imagenet(labels: LabelSpace | Classes) -> bool:
    """Whether the class ids are ImageNet-1k's, in its order; old heads have only their number."""
    # the length first: it saves loading ImageNet's lists for other label spaces
    if len(labels) != IMAGENET_CLASSES or not labels.ids:
        return len(labels) == IMAGENET_CLASSES
    return labels.ids == LabelSpace.imagenet().ids


def scoring_hash(
    ids: Sequence[str],
    names: Sequence[str],
    templates: Sequence[str],
    groups: Sequence[Sequence[int]],
) -> str:
    """Hash a label space and scoring rule, for a plan, which is compared with the manifest.

    The hash is short: nothing is gained by forging it.
    """
    space = {"ids": ids, "names": names, "templates": templates}
    return files.sha256_json([space, groups])[:16]


def choose_labels(path: str | None) -> LabelSpace:
    """Load the label space of `--classes`, with warnings of oddities, or ImageNet's by default.

    Raises:
        ValueError: as `LabelSpace.load`.
    """
    imagenet = LabelSpace.imagenet()
    if path is None:
        return imagenet
    labels = LabelSpace.load(path)
    # not for ImageNet's own list, in which some classes share their words
    for doubt in doubts(labels) if labels.names != imagenet.names else ():
        log.warning(doubt)
    return labels


def doubts(labels: LabelSpace) -> list[str]:
    """List oddities of a label space that are legal but rarely intended: equal names, long prompts.

    Each is a text for a warning.
    """
    found = []
    # compared in lower case with single spaces, as CLIP's tokenizer reads them
    first: dict[str, str] = {}
    for name, words in zip(labels.ids, labels.names, strict=True):
        other = first.setdefault(" ".join(words.casefold().split()), name)
        if other != name:
            found.append(
                f"classes {shown(other)} and {shown(name)} have the same words ({shown(words)}), "
                f"so the zero-shot head cannot distinguish them"
            )
    # a word is at least one token; the exact number depends on the model and is checked later
    longest = max(labels.templates, key=lambda template: len(template.split()))
    for name, words in zip(labels.ids, labels.names, strict=True):
        count = len(longest.replace(MARK, words).split())
        if count > CLIP_CONTEXT - 2:
            found.append(
                f"a prompt of class {shown(name)} has {count} words; CLIP reads at most "
                f"{CLIP_CONTEXT - 2} tokens and training refuses longer prompts"
            )
    return found


def _require_words(name: str, words: str) -> None:
    _require_text(f"the id of class {shown(name)}", name)
    _require_text(f"the name of class {shown(name)}", words)
    # spaces, underscores and invisible characters do not count as words
    if all(unicodedata.category(letter)[0] in "ZC" or letter == "_" for letter in words):
        raise ValueError(
            f"the name of class {shown(name)} is {shown(words)}, which has no words for the text "
            f"encoder; give it a name in --classes"
        )


def _require_text(what: str, text: str) -> None:
    # class lists beside the shards have one name per line; a lone surrogate is not UTF-8
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text):
        raise ValueError(f"{what} is {text!a}: line breaks and control characters are not allowed")
