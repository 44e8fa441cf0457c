"""Which classes a head or a packed set has: ids, names and prompts, in label order.

A label is only a position in a list, so two lists of equal length prove nothing: the same photos
packed in a different order of classes give a label a different meaning. Whatever brings a head
together with data or with another head compares the lists here. No torch: the report and the
packing tools use this too.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from rft.storage import files
from rft.storage.documents import FOREIGN, Text, document
from rft.text import shown

PromptsSha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
"""Hash of a set's prompts; empty where they are not known."""


@document(name="classes", config=FOREIGN)
class Classes:
    """The classes of a head or a packed set.

    `ids` are folder names such as WordNet ids; they are empty for a set that was packed before
    manifests kept them. `names` are the words for the text encoder. `prompts_sha256` stands for
    the prompts that the zero-shot head is made of; it is empty where they are not known.
    """

    ids: tuple[Text, ...] = ()
    names: tuple[Text, ...]
    prompts_sha256: PromptsSha256 = ""

    def __post_init__(self) -> None:
        if self.ids and len(self.ids) != len(self.names):
            raise ValueError(f"{len(self.ids)} class ids but {len(self.names)} class names")

    def __len__(self) -> int:
        return len(self.names)

    def text_of(self, number: int) -> str:
        """Return how a message names a class."""
        if number >= len(self):
            return "missing"
        name = shown(self.names[number])
        return f"{shown(self.ids[number])} ({name})" if self.ids else name


def prompts_sha256(names: Sequence[str], templates: Sequence[str]) -> str:
    """Return the hash that stands for all prompts of a zero-shot head."""
    return files.sha256_json([list(names), list(templates)])


def mismatch(one: Classes, other: Classes) -> int | None:
    """Return the first class id that means something different in two lists, None if none does.

    Ids and names are compared in Unicode's composed form. Of a class, the id or the name may
    differ, because classes are renamed; not both, and not if the value stands for a different class
    in the other list. Ids that are only numbers identify nothing: beside them the names must be
    equal. Lists of different lengths differ at the end of the shorter one, if not before.
    """
    names, ids = _differing(one.names, other.names), _differing(one.ids, other.ids)
    # also without any ids: then the names alone decide
    counted = all(value.isdecimal() for value in one.ids)
    found = names if counted or not other.ids else names & ids
    # the other list has the same value elsewhere: a different order of classes
    found = found | _moved(one.names, other.names, names) | _moved(one.ids, other.ids, ids)
    if len(one) != len(other):
        found.add(min(len(one), len(other)))
    return min(found, default=None)


def compare(one: Classes | None, where: str, other: Classes | None, other_where: str) -> list[str]:
    """Check that two heads, or a head and a set, have the same classes in the same order.

    Args:
        one: classes of the first; None if it does not say.
        where: what the first is, for messages.
        other: classes of the second.
        other_where: what the second is.

    Returns:
        Warnings that the user must see, because something could not be compared.

    Raises:
        ValueError: naming the first class that differs, and what it is in both.
    """
    if one is None or other is None:
        silent = " and ".join(
            place for place, known in ((where, one), (other_where, other)) if known is None
        )
        whose = f"those of {where if one else other_where}" if one or other else "the same"
        return [
            f"{silent}: the file does not say which classes its head has; they are taken to be "
            f"{whose}, in the same order"
        ]
    number = mismatch(one, other)
    if number is not None:
        order = ""
        pairs = ((one.ids, other.ids), (one.names, other.names))
        if any(a != b and sorted(a) == sorted(b) for a, b in pairs):
            order = " (the same classes in a different order)"
        elif len(one) != len(other):
            order = f" ({len(one)} and {len(other)} classes)"
        raise ValueError(
            f"{where} and {other_where} have different classes: class {number} is "
            f"{one.text_of(number)} in the first, {other.text_of(number)} in the second{order}"
        )
    renamed = _differing(one.names, other.names) | _differing(one.ids, other.ids)
    if not renamed:
        return []
    first = min(renamed)
    return [
        f"{where} and {other_where} name {len(renamed)} of {len(one)} classes differently (first: "
        f"class {first}, {one.text_of(first)} and {other.text_of(first)}); they are taken to be "
        "the same"
    ]


def check_head(
    classes: Classes | None, rows: int, where: str, known: Classes, known_where: str
) -> list[str]:
    """Check that a head fits the classes of a packed set.

    Args:
        classes: of the head; None if its file does not say.
        rows: number of classes that the head's shape gives it.
        where: the head's file, for messages.
        known: classes of the set.
        known_where: the set.

    Returns:
        Warnings that the user must see.

    Raises:
        ValueError: if the number differs, or a class does: naming the first.
    """
    if classes is None and rows != len(known):
        raise ValueError(
            f"{where} has a {rows}-class head, {known_where} has {len(known)} classes; use data of "
            "the head's own label space"
        )
    return compare(classes, where, known, known_where)


def compare_prompts(
    one: Classes | None, where: str, other: Classes | None, place: str
) -> list[str]:
    """Return a warning if two heads were made of different prompts."""
    # an empty hash is not known, and differs from none
    known = [entry.prompts_sha256 for entry in (one, other) if entry is not None]
    if len(set(filter(None, known))) < 2:
        return []
    return [f"the heads of {where} and {place} were made of different prompts"]


def find_twins(names: Iterable[str]) -> tuple[str, str] | None:
    """Find two names that are the same text in different Unicode forms, if there are any."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(composed(name), name)
        if other != name:
            return other, name
    return None


def composed(text: str) -> str:
    """Bring a name into the Unicode form in which names are compared (NFC)."""
    return unicodedata.normalize("NFC", text)


def _differing(one: Sequence[str], other: Sequence[str]) -> set[int]:
    """Return the places in which two lists differ, as far as both go."""
    pairs = enumerate(zip(one, other, strict=False))
    return {number for number, (a, b) in pairs if composed(a) != composed(b)}


def _moved(one: Sequence[str], other: Sequence[str], differing: set[int]) -> set[int]:
    """Return the differing places whose value stands at a different one in the other list.

    A value that both lists have twice, as ImageNet has its missile, has not moved.
    """
    left = {number: composed(one[number]) for number in differing}
    right = {number: composed(other[number]) for number in differing}
    both = set(left.values()) & set(right.values())
    return {number for number in differing if left[number] in both or right[number] in both}
