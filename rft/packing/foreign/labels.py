"""One sample's label: reads its `.cls` or `.json`, and finds the class by the set's rule."""

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import IO, Any

from rft.classes import composed
from rft.packing.foreign.class_names import names_of
from rft.packing.foreign.rule import Rule
from rft.packing.foreign.samples import BadSample, Sample, read_text
from rft.shards.tar import Member

POSITION = re.compile(r"0|[1-9][0-9]{0,17}")  # a position has no sign and no leading zeros
LABEL_FIELDS = ("label", "class", "cls")  # fields of a .json that should agree with the .cls


def read_label(stream: IO[bytes], sample: Sample, where: str, rule: Rule) -> int | str:
    """Read a sample's label, for `resolve_label`.

    Raises:
        ValueError: if it has no label.
    """
    wanted = rule.label_suffix
    if wanted not in sample.members:
        hint = ""
        if wanted == "cls" and "json" in sample.members:
            hint = _field_hint(stream, sample.members["json"])
        raise BadSample(f"{where}: no label: it has no .{wanted}{hint}")
    return parse_label(read_text(stream, sample.members[wanted], where), where, rule)


def _field_hint(stream: IO[bytes], member: Member) -> str:
    """Name the --label-field for a sample without .cls, or the fields of its .json."""
    try:
        said = _fields(read_text(stream, member, "").decode("utf-8"))
    except (ValueError, RecursionError):  # the hint is only about readable files
        said = None
    names = [name for name, _ in said or ()]
    for usual in LABEL_FIELDS:
        if usual in names:
            return f"; if its .json has the class in {usual!r}, pass --label-field {usual}"
    return f"; name a field of its .json with --label-field ({_listed(said)})"


def _listed(said: Sequence[tuple[str, Any]] | None) -> str:
    return f"fields: {', '.join(sorted({field for field, _ in said or ()})) or 'none'}"


def contradiction(stream: IO[bytes], sample: Sample, class_id: int, rule: Rule) -> str:
    """Describe the label in the other of `.cls` and `.json`, if it contradicts the class read.

    A label contradicts only if none of its possible meanings (an id, a name, a position in either
    list) is that class. One without any such meaning may be about something else.
    """
    other = "json" if rule.label_field is None else "cls"
    if other not in sample.members or other in rule.ignore:
        return ""
    try:
        text = read_text(stream, sample.members[other], "").decode("utf-8").strip()
        said = _fields(text) if other == "json" else [("", text)]
    except (ValueError, RecursionError):
        return ""  # unreadable, but the label is not read from this member
    for name, value in said or ():
        if other == "json" and name not in LABEL_FIELDS:
            continue
        # compares exact types: true and false are instances of int
        meanings = _meanings(str(value), rule) if type(value) in (int, str) else set()
        if meanings and class_id not in meanings:
            field = f"{name!r}: " if name else ""
            here, there = (f"class {n} ({rule.labels.names[n]})" for n in (class_id, min(meanings)))
            return f"its .{other} has {field}{value!r}, {there}, and not {here}"
    return ""


class Fields(list[tuple[str, Any]]):
    """The fields of a JSON object in order, including repeated ones."""


def _fields(text: str) -> Fields | None:
    """Read the fields of a third-party JSON object; NaN and repeated fields are permitted.

    None for other JSON.
    """
    said = json.loads(text, object_pairs_hook=Fields)
    return said if isinstance(said, Fields) else None


def _meanings(text: str, rule: Rule) -> set[int]:
    """Find all class ids that a label could mean: as an id, a name or a position."""
    text = composed(text).strip()
    found = set(rule.classes_of_name.get(text, ()))
    if text in rule.class_of_id:
        found.add(rule.class_of_id[text])
    if POSITION.fullmatch(text):
        # a .json may index all classes while the .cls indexes the local ones
        for places in (rule.positions, range(len(rule.labels))):
            if int(text) < len(places):
                found.add(places[int(text)])
    return found


def parse_label(data: bytes, where: str, rule: Rule) -> int | str:
    """Parse the label in a `.cls` or `.json`: a number, or a text.

    JSON distinguishes the two. In a `.cls`, a text in the form of a position is a number; `007` is
    a text. Texts are in Unicode's composed form, like the label space.

    Raises:
        ValueError: if it has no label, or repeats the label's field.
    """
    try:
        text = data.decode("utf-8").strip()
        said = None if rule.label_field is None else _fields(text)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{where}: its .{rule.label_suffix} is not readable: {error}") from error
    if rule.label_field is not None:
        return _json_label(said, rule.label_field, where)
    return int(text) if POSITION.fullmatch(text) else composed(text)


def resolve_label(label: int | str, where: str, rule: Rule) -> int:
    """Resolve a label to a class id: a number, or a class's folder name or name.

    A text that is a class's id means that class, even if it is all digits. A number (no sign, no
    leading zeros) is a position, unless an id or name with the same digits belongs to a different
    class: then `labels_are` must decide.

    Raises:
        ValueError: if it means no class, several, or one that the set is not scored on.
    """
    class_id = _class_of(label, where, rule)
    if class_id not in rule.scored:
        raise ValueError(
            f"{where}: label {label!r} is class {class_id} ({rule.labels.names[class_id]}), which "
            f"this set is not published for; if its labels index a list of its own, pass the list "
            f"as --local-classes (docs/data.md#third-party-shards)"
        )
    return class_id


def _class_of(label: int | str, where: str, rule: Rule) -> int:
    text = str(label)
    # a string in JSON that is an id means that class, even if it is all digits
    if rule.labels_are is None and isinstance(label, str) and label in rule.class_of_id:
        return rule.class_of_id[label]
    if rule.labels_are == "names" or not POSITION.fullmatch(text):
        return _class_of_name(text, where, rule)
    if rule.labels_are is None and rule.misplaced:
        raise ValueError(
            f"{where}: label {text} may be a position or a class's id or name, which differ here "
            f"(class {rule.misplaced!r} is not at position {rule.misplaced}); choose with "
            f"--labels-are positions or --labels-are names"
        )
    number = int(text)
    if number not in range(len(rule.positions)):
        raise ValueError(f"{where}: label {number} is not one of the {len(rule.positions)} classes")
    return rule.positions[number]


def _class_of_name(text: str, where: str, rule: Rule) -> int:
    if text in rule.class_of_id:
        return rule.class_of_id[text]
    found = rule.classes_of_name.get(text, [])
    if len(found) != 1:
        what = "several classes" if found else "not a class of the label space"
        hint = ""
        if re.fullmatch(r"-?[0-9]+\.[0-9]*", text):
            hint = "; class numbers are integers"
        elif rule.labels_are != "names" and re.fullmatch(r"[+-]?[0-9]+", text):
            hint = "; positions count from 0, without sign or leading zeros"
        elif not found:
            hint = _spelling_hint(text, rule)
        raise ValueError(f"{where}: label {text[:80]!r} is {what}{hint}")
    return found[0]


def _spelling_hint(text: str, rule: Rule) -> str:
    # manifests of earlier versions have no ids
    if not rule.labels.ids:
        return ""
    known = names_of(rule.labels)
    close = [rule.labels.ids[n] for n in known.find(text)]
    close = close or get_close_matches(text[:80], known.exact, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _json_label(said: list[tuple[str, Any]] | None, name: str, where: str) -> int | str:
    values = [value for field, value in said or () if field == name]
    if len(values) > 1:
        raise ValueError(f"{where}: its .json has {name!r} {len(values)} times; keep one of them")
    value = values[0] if values else None
    # before int is accepted, because bool is a subclass of int
    if isinstance(value, bool | float):
        kind = "true or false" if isinstance(value, bool) else "a number with a fraction"
        raise ValueError(
            f"{where}: label {json.dumps(value)} of its .json is {kind}; write class numbers as "
            f"integers (0, 1, 2), or class names as strings"
        )
    if not isinstance(value, int | str):
        raise BadSample(f"{where}: no label: {_no_label(said, value, name)}")
    return composed(value).strip() if isinstance(value, str) else value


def _no_label(said: list[tuple[str, Any]] | None, value: object, name: str) -> str:
    """Describe why the field `name` of a .json is not a label."""
    outer = name.partition(".")[0]
    if isinstance(value, Fields) or any(
        field == outer and isinstance(one, Fields) for field, one in said or () if value is None
    ):
        return (
            f"{outer!r} of its .json holds an object, and nested fields are not supported; write "
            "the label as a number or string in a field of its own"
        )
    if isinstance(value, list):
        return f"{name!r} of its .json holds a list; it must be a number or a string"
    return f"its .json has no number or string {name!r} ({_listed(said)})"
