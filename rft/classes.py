"""The classes of a head or a packed set: ids, names and prompts, in label order.

A label is only a position in a list, so equal lengths prove nothing: if the same photos are packed
with a different class order, each label means a different class. Every combination of a head with
data, or with another head, is therefore checked here. No torch: the report and the packing tools
use this module too.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from rft.storage import files
from rft.storage.documents import FOREIGN, Text, document
from rft.text import shown

PromptsSha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
"""Hash of a set's prompts; empty if unknown."""


@document(name="classes", config=FOREIGN)
class Classes:
    """The classes of a head or a packed set.

    `ids` are folder names such as WordNet ids; they are empty for sets packed before manifests
    recorded them. `names` are the class names given to the text encoder. `prompts_sha256`
    identifies the prompts of the zero-shot head; it is empty if they are unknown.
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
        """Format one class for a message."""
        if number >= len(self):
            return "missing"
        name = shown(self.names[number])
        return f"{shown(self.ids[number])} ({name})" if self.ids else name


def prompts_sha256(names: Sequence[str], templates: Sequence[str]) -> str:
    """Hash all prompts of a zero-shot head."""
    return files.sha256_json([list(names), list(templates)])


def mismatch(one: Classes, other: Classes) -> int | None:
    """Find the first label that means a different class in the two lists; None if all agree.

    Ids and names are compared in Unicode's composed form. Classes get renamed, so either the id or
    the name of a class may differ. They must not both differ, and the changed value must not belong
    to another class of the other list. Purely numeric ids identify nothing: with them the names
    must be equal, and a number must not belong to another class of the other list. Lists of
    different lengths differ at the end of the shorter one, if not before.
    """
    names, ids = _differing(one.names, other.names), _differing(one.ids, other.ids)
    # also true without any ids: then the names alone decide
    counted = all(value.isdecimal() for value in one.ids)
    found = names if counted or not other.ids else names & ids
    # the other list has the same value at another label: a different order of classes
    found = found | _moved(one.names, other.names, names) | _moved(one.ids, other.ids, ids)
    if len(one) != len(other):
        found.add(min(len(one), len(other)))
    return min(found, default=None)


def compare(one: Classes | None, where: str, other: Classes | None, other_where: str) -> list[str]:
    """Check that two heads, or a head and a set, have the same classes in the same order.

    Args:
        one: classes of the first; None if its file does not list them.
        where: name of the first, for messages.
        other: classes of the second.
        other_where: name of the second.

    Returns:
        Warnings for the user about anything that could not be compared.

    Raises:
        ValueError: naming the first class that differs, with its id and name in both.
    """
    if one is None or other is None:
        silent = " and ".join(
            place for place, known in ((where, one), (other_where, other)) if known is None
        )
        whose = f"those of {where if one else other_where}" if one or other else "the same"
        return [
            f"{silent}: the file does not list the classes of its head; assuming "
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
    # classes that were only renamed are accepted, with a warning
    renamed = _differing(one.names, other.names) | _differing(one.ids, other.ids)
    if not renamed:
        return []
    first = min(renamed)
    return [
        f"{where} and {other_where} name {len(renamed)} of {len(one)} classes differently "
        f"(first: {one.text_of(first)} and {other.text_of(first)}); assumed equal"
    ]


def check_head(
    classes: Classes | None, rows: int, where: str, known: Classes, known_where: str
) -> list[str]:
    """Check that a head fits the classes of a packed set.

    Args:
        classes: of the head; None if its file does not list them.
        rows: number of classes by the shape of the head.
        where: file of the head, for messages.
        known: classes of the set.
        known_where: name of the set.

    Returns:
        Warnings for the user.

    Raises:
        ValueError: if the number of classes or a class differs, naming the first such class.
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
    """Warn if two heads were built from different prompts; an empty list if not."""
    # an empty hash is an unknown one, and counts as equal to any
    known = [entry.prompts_sha256 for entry in (one, other) if entry is not None]
    if len(set(filter(None, known))) < 2:
        return []
    return [f"the heads of {where} and {place} were built from different prompts"]


def find_twins(names: Iterable[str]) -> tuple[str, str] | None:
    """Find two names that are the same text in different Unicode forms; None if there are none."""
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
    """Find the labels at which two lists differ, up to the length of the shorter one."""
    pairs = enumerate(zip(one, other, strict=False))
    return {number for number, (a, b) in pairs if composed(a) != composed(b)}


def _moved(one: Sequence[str], other: Sequence[str], differing: set[int]) -> set[int]:
    """Find the differing labels whose value appears at another label in the other list.

    A value that appears twice in both lists, such as ImageNet's "missile", has not moved.
    """
    left = {number: composed(one[number]) for number in differing}
    right = {number: composed(other[number]) for number in differing}
    # a value that only one list has was renamed, not moved
    both = set(left.values()) & set(right.values())
    return {number for number in differing if left[number] in both or right[number] in both}
