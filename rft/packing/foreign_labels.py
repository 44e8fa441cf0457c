"""What the labels of third-party shards mean, and how a set of them is scored.

Label numbers may be class ids, or count the lines of a list of class names of the set's own
(`local` labels, as CLIP_benchmark writes for ImageNet-R, -A and ObjectNet).
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

from rft import cli
from rft.classes import Classes, composed
from rft.config import MAX_PIXELS
from rft.packing.expected import published_classes
from rft.packing.foreign_samples import Sample, parent, read_text
from rft.packing.objectnet import folder_labels, objectnet_groups
from rft.sets import BENCHMARKS
from rft.shards.images import Side
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import group_faults
from rft.storage import files
from rft.storage.documents import Megapixels, Positive, document

POSITION = re.compile(r"0|[1-9][0-9]{0,17}")  # as a position is written: no sign, no leading zeros
LIKE_POSITION = re.compile(r"-?[0-9]{1,18}")  # what a reader may take for one
LabelsAre = Literal["positions", "names"]
NAMES_BYTES = 2**22  # of a list of classes; that of ImageNet-21k has 1 MB
NUMBER_BYTES = 64  # of a file that says how many shards there are
LABEL_FIELDS = ("label", "class", "cls")  # of a .json, that say the same as the .cls beside it


@document(name="--")
class Options:
    """How existing shards are understood."""

    dataset: str | None = None
    """Name of the set (imagenet-train, imagenet-r, ...); None is the last folder name of --out."""
    label_field: str | None = None
    """Field of each sample's .json that holds the label; None reads the .cls member."""
    labels_are: LabelsAre | None = None
    """What labels are that are numbers: positions in the label space (or in --local-classes), or
    the classes' ids or names. Needed only where a class has a number for its id or name and is at
    another position."""
    local_classes: str | None = None
    """File with one class name a line, which .cls counts; None looks for a classnames.txt beside
    the shards and takes it when it has another length than the label space."""
    skip_beside: bool = False
    """Look for no classnames.txt and nshards.txt beside the shards, for stores that do not say
    "not found" of files that do not exist."""
    mappings: str | None = None
    """The mappings/ folder of ObjectNet's archive (objectnet only)."""
    crop_border: Side | None = None
    """Pixels to cut from each side before any resize; None is 2 for objectnet and 0 for others."""
    ignore: tuple[str, ...] = ()
    """Suffixes of members to pass over, such as seg.png."""
    allow_count: tuple[str, ...] = ()
    """SET=N: accept this copy of a benchmark, which has N images and not the published number."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have; raise it for panoramas."""
    workers: Positive | None = None
    """Processes that read shards; None is one for each core this process may use."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a sample is read and scored.

    `local` translates label numbers (None: they are class ids); `groups` is the manifest's scoring
    rule (None: one group for each class that occurs).
    """

    labels: Classes
    groups: tuple[tuple[int, ...], ...] | None
    local: tuple[int, ...] | None = None
    label_field: str | None = None
    labels_are: LabelsAre | None = None
    ignore: frozenset[str] = frozenset()
    crop_border: int = 0
    max_pixels: float = MAX_PIXELS

    @cached_property
    def scored(self) -> frozenset[int]:
        """Class ids that a label may be."""
        groups = self.groups
        if groups is None:
            return frozenset(range(len(self.labels)))
        return frozenset(class_id for group in groups for class_id in group)

    @cached_property
    def positions(self) -> Sequence[int]:
        """Class ids by the number that a label may be."""
        return range(len(self.labels)) if self.local is None else self.local

    @cached_property
    def class_of_id(self) -> dict[str, int]:
        """Class ids by the classes' ids; empty for an older set, whose manifest has none."""
        return {name: class_id for class_id, name in enumerate(self.labels.ids)}

    @cached_property
    def classes_of_name(self) -> dict[str, list[int]]:
        """Class ids by the classes' names, of which some are two classes'."""
        found: dict[str, list[int]] = {}
        for class_id, name in enumerate(self.labels.names):
            found.setdefault(name.strip(), []).append(class_id)
        return found

    @cached_property
    def misplaced(self) -> str:
        """A class's id or name that is a number and not the class's position; empty if none is."""
        texts = (*enumerate(self.labels.ids), *enumerate(self.labels.names))
        # class by class
        for class_id, text in sorted(texts, key=lambda entry: entry[0]):
            if LIKE_POSITION.fullmatch(text):
                number = int(text)
                if number not in range(len(self.positions)) or self.positions[number] != class_id:
                    return text
        return ""


def make_rule(dataset: str, urls: Sequence[str], labels: LabelSpace, options: Options) -> Rule:
    """Return how labels are read and the set is scored; see Options.

    Raises:
        ValueError: if local class names do not map onto the label space, or nothing is scored.
    """
    places = [] if options.skip_beside else list(dict.fromkeys(map(parent, urls)))
    _require_nshards(urls, [folder for folder in places if folder])
    names, source = _local_names(places, labels, options.local_classes)
    if dataset == "objectnet":
        if options.mappings is None:
            raise ValueError("objectnet needs --mappings, the mappings/ folder of its archive")
        members = objectnet_groups(Path(options.mappings), len(labels))
        groups = tuple(members.values())
        local = None
        if names is not None:
            local = _objectnet_labels(names, source, members, Path(options.mappings))
    else:
        subset = published_subset(dataset, labels)
        local = None if names is None else local_labels(names, source, labels, subset)
        groups = _groups(dataset, labels, subset, local)
    border = options.crop_border
    if border is None:
        border = BENCHMARKS[dataset].border if dataset in BENCHMARKS else 0
    for fault in () if groups is None else group_faults(groups, len(labels)):
        raise ValueError(f"{dataset} cannot be scored: {fault}")
    return Rule(
        labels=labels.classes,
        groups=groups,
        local=local,
        label_field=options.label_field,
        labels_are=options.labels_are,
        ignore=frozenset(suffix.lower().lstrip(".") for suffix in options.ignore),
        crop_border=border,
        max_pixels=options.max_pixels,
    )


def local_labels(
    names: Sequence[str], source: str, labels: LabelSpace, subset: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the class id of each local class, found by its folder name or class name.

    A name that no class has as it is written may differ from one's in `loose_form`'s ways.

    ImageNet has two classes called "missile" and two called "sunglasses": such a name means the one
    in `subset`, the classes the set is published for, and is refused where that does not decide.

    Raises:
        ValueError: if a name is no class, several, or another name's class.
    """
    known = _names_of(labels)
    found: dict[int, str] = {}
    for name in names:
        candidates = known.find(name)
        if not candidates:
            raise ValueError(
                f"{source}: {name!r} is no class of the label space; "
                f"name the right one with --classes"
            )
        example = labels.ids[candidates[0]]
        if subset is not None and len(candidates) > 1:
            candidates = [class_id for class_id in candidates if class_id in subset]
        if len(candidates) != 1:
            hint = (
                f"write the folder name of the one that is meant (such as {example}) in its place"
            )
            if composed(name) in labels.ids:
                hint = "it is the folder name of one; give the other another name with --classes"
            raise ValueError(f"{source}: {name!r} is the name of several classes; {hint}")
        if candidates[0] in found:
            raise ValueError(f"{source}: {name!r} and {found[candidates[0]]!r} are the same class")
        found[candidates[0]] = name
    return tuple(found)


def published_subset(dataset: str, labels: LabelSpace) -> tuple[int, ...] | None:
    """Return the class ids of a set that is published for some of ImageNet's; None for others."""
    folders = published_classes(dataset, labels)
    return None if folders is None else tuple(sorted(labels.ids.index(name) for name in folders))


def _groups(
    dataset: str,
    labels: LabelSpace,
    subset: tuple[int, ...] | None,
    local: tuple[int, ...] | None,
) -> tuple[tuple[int, ...], ...] | None:
    if subset is not None:
        if local is not None and set(local) != set(subset):
            missing = sorted(set(subset) - set(local))
            example = labels.ids[(missing or sorted(set(local) - set(subset)))[0]]
            raise ValueError(
                f"the local classes of {dataset} are not the {len(subset)} it is published for "
                f"({example} is in only one of the two)"
            )
        return tuple((class_id,) for class_id in subset)
    if local is not None:
        return tuple((class_id,) for class_id in sorted(local))
    # in another label space, a set of some classes has those that are there
    if dataset in BENCHMARKS and BENCHMARKS[dataset].class_list:
        return None
    return tuple((class_id,) for class_id in range(len(labels)))


def _objectnet_labels(
    names: Sequence[str], source: str, groups: dict[str, tuple[int, ...]], mappings: Path
) -> tuple[int, ...]:
    """Return a class id for each of ObjectNet's own class names; any of its group is as good."""
    label_of_folder = folder_labels(mappings)
    folders = list(groups)
    texts = [(text, n) for n, name in enumerate(folders) for text in (name, label_of_folder[name])]
    known = Names.of(texts)
    found: dict[str, int] = {}
    for name in names:
        candidates = [folders[number] for number in known.find(name)]
        folder = candidates[0] if len(candidates) == 1 else None
        if folder is None or folder in found:
            what = "is a second name of one of" if folder else "is none of"
            what = "may be several of" if len(candidates) > 1 else what
            raise ValueError(f"{source}: {name!r} {what} ObjectNet's {len(groups)} classes")
        found[folder] = groups[folder][0]
    if len(found) != len(groups):
        missing = next(name for name in groups if name not in found)
        raise ValueError(
            f"{source} names {len(found)} of ObjectNet's {len(groups)} classes (not {missing!r})"
        )
    return tuple(found.values())


def _local_names(
    folders: Sequence[str | None], labels: LabelSpace, given: str | None
) -> tuple[list[str] | None, str]:
    """Return the names that label numbers count, if they count no class ids, and their file.

    Args:
        folders: of the shards; None is that of shards without one.
        labels: the label space.
        given: `--local-classes`.
    """
    if given is not None:
        return _lines(files.read_bytes(given, NAMES_BYTES), given), given
    beside = {}
    without = []
    for folder in folders:
        for place in filter(None, (folder, parent(folder) if folder else None)):
            path = files.join(place, "classnames.txt")
            data = _find_beside(path, NAMES_BYTES)
            if data is not None:
                beside[path] = _lines(data, path)
                break
        else:
            without.append(folder or "the top of the store")
    if not beside:
        return None, ""
    path, names = next(iter(beside.items()))
    if any(other != names for other in beside.values()):
        raise ValueError(f"{path} and {list(beside)[-1]} differ; name one with --local-classes")
    if len(names) != len(labels):
        if without:
            raise ValueError(
                f"{path} lists the classes that labels count, and {without[0]} has no such file; "
                f"give --local-classes {path} if all labels count its lines, or --skip-beside if "
                f"none does"
            )
        return names, path
    _require_same_order(path, names, labels)
    return None, ""


def _require_same_order(path: str, names: Sequence[str], labels: LabelSpace) -> None:
    """Check that a list of as many names as classes is the label space's own, class by class.

    A name that the label space lacks may be a different word for the class in that place, which is
    warned of; where most are, equal length is a coincidence.
    """
    known = _names_of(labels)
    unknown = []
    for number, name in enumerate(names):
        found = known.find(name)
        if found and number not in found:
            raise ValueError(
                f"{path} has {name!r} in place {number}, the label space in place {found[0]}; "
                f"give the file as --local-classes if the labels count its lines"
            )
        exact = composed(name) in known.exact
        if not exact and len({labels.names[place] for place in found}) > 1:
            either = " or ".join(labels.ids[place] for place in found)
            raise ValueError(
                f"{path} has {name!r} in place {number}, which may be class {either}; write it as "
                f"the label space does"
            )
        if not found:
            unknown.append(number)
    if not unknown:
        return
    first = unknown[0]
    what = (
        f"{len(unknown)} of the {len(names)} names in {path} are no class of the label space "
        f"(first: {names[first]!r} in place {first}, which is {labels.names[first]!r} there)"
    )
    if 2 * len(unknown) > len(names):
        raise ValueError(f"{what}; name the label space of these shards with --classes")
    cli.warn(f"{what}: they are taken to be different words for the same classes")


def _require_nshards(urls: Sequence[str], folders: Sequence[str]) -> None:
    """Hold the number of shards against the `nshards.txt` that may lie beside them."""
    for folder in folders:
        path = files.join(folder, "nshards.txt")
        data = _find_beside(path, NUMBER_BYTES)
        if data is None:
            continue
        text = data.decode("utf-8", "replace").strip()
        given = sum(parent(url) == folder for url in urls)
        if text != str(given):
            raise ValueError(f"{path} says {text} shards, {given} of that folder are given")


def _find_beside(path: str, limit: int) -> bytes | None:
    """Return the content of a file that may lie beside shards, None if it does not."""
    try:
        return files.find_bytes(path, limit)
    except ValueError as error:
        raise ValueError(f"{error}; if there is none, pass --skip-beside") from error


def _lines(data: bytes, path: str) -> list[str]:
    """Return the names in a file that has one a line; labels count the lines, so none is dropped.

    Raises:
        ValueError: if it is not UTF-8, a line between others is blank, or there is no name.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    # not splitlines(), to which a form feed or U+0085 within a name is a line break too
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"{path} names no class")
    if "" in lines:
        number = lines.index("")
        raise ValueError(
            f"{path}: line {number + 1} is blank; labels count the lines, so remove it if the "
            f"labels skip it, or write the name of class {number} there"
        )
    return lines


@dataclass(frozen=True, kw_only=True)
class Names:
    """Numbers by the texts that name them, as written and in `loose_form`."""

    exact: dict[str, list[int]]
    loose: dict[str, list[int]]

    @staticmethod
    def of(texts: Iterable[tuple[str, int]]) -> "Names":
        """Return the lookup of texts, each with its number; a text may have several."""
        exact: dict[str, set[int]] = {}
        loose: dict[str, set[int]] = {}
        for text, number in texts:
            exact.setdefault(composed(text).strip(), set()).add(number)
            loose.setdefault(loose_form(text), set()).add(number)
        loose.pop("", None)
        return Names(
            exact={text: sorted(numbers) for text, numbers in exact.items()},
            loose={text: sorted(numbers) for text, numbers in loose.items()},
        )

    def find(self, name: str) -> list[int]:
        """Return the numbers that a name means, in order: as written, else by its loose form."""
        return self.exact.get(composed(name).strip()) or self.loose.get(loose_form(name), [])


def _names_of(labels: LabelSpace) -> Names:
    """Return the lookup of class ids by folder names and class names."""
    pairs = enumerate(zip(labels.ids, labels.names, strict=True))
    return Names.of((text, class_id) for class_id, texts in pairs for text in texts)


# Runs of separators, in a text of `_shape`'s letters: w letter or mark, d digit, _ space or
# underscore, ( bracket, x any other; the rest stand for themselves.
SEPARATORS = re.compile(
    r"""(?: [_(]
          | (?<!d), | ,(?!d)                           # not in 1,5
          | (?:(?<=[wd])|(?<=w['.]))-(?=[wd])          # joins words; no sign, as in A- and -1
          | (?<=_)-(?=_)
          | (?<=[wd])\.(?!d)                           # not in 1.5 and .net
          | (?<=w)'(?=[^'])                            # no prime, as in a'
          | (?<!d)/(?!d)                               # not in 1/2
        )+""",
    re.VERBOSE,
)


def loose_form(name: str) -> str:
    """Return what is left of a name without case and separators; it may be empty.

    `Binder (closed)` and `binder_closed` have one form. Separators are spaces, underscores and
    round brackets, and commas, hyphens, dots, apostrophes and slashes where they stand beside or
    between words. Beside a digit they become one space (`B-52` is `B 52`, not `B52`). All else
    stays: combining marks, symbols and emoji (`c`, `c++` and `c#` are three names), a hyphen that
    is a sign (`A-`, `-1`), and punctuation in numbers (`1.5`).
    """
    text = composed(composed(name).strip().casefold())
    shape = "".join(map(_shape, text))
    kept, end = "", 0
    for run in SEPARATORS.finditer(shape):
        kept += text[end : run.start()]
        beside_digit = "d" in (shape[: run.start()][-1:], shape[run.end() :][:1])
        kept += " " if beside_digit else ""
        end = run.end()
    return (kept + text[end:]).strip()


def _shape(letter: str) -> str:
    category = unicodedata.category(letter)
    if letter in ",./":
        return letter
    if letter in "_()":
        return "_" if letter == "_" else "("
    if letter in "'\N{RIGHT SINGLE QUOTATION MARK}":
        return "'"
    if letter.isspace():
        return "_"
    return {"L": "w", "M": "w", "N": "d"}.get(category[0], "-" if category == "Pd" else "x")


def read_label(stream: IO[bytes], sample: Sample, where: str, rule: Rule) -> int:
    """Return a sample's class id.

    Raises:
        ValueError: if it has no label, or the label is no class.
    """
    wanted = "json" if rule.label_field is not None else "cls"
    if wanted not in sample.members:
        hint = ""
        if wanted == "cls" and "json" in sample.members:
            hint = "; name a field of its .json with --label-field"
        raise ValueError(f"{where}: no label, there is no .{wanted}{hint}")
    label = parse_label(read_text(stream, sample.members[wanted], where), where, rule)
    return resolve_label(label, where, rule)


def contradiction(stream: IO[bytes], sample: Sample, class_id: int, rule: Rule) -> str:
    """Say what the other one of `.cls` and `.json` has, if it cannot mean the class that was read.

    A label may be anything that a label can be here (an id, a name, a position in either list), and
    one that is none of these may be about something else: neither is a contradiction.
    """
    other = "json" if rule.label_field is None else "cls"
    if other not in sample.members or other in rule.ignore:
        return ""
    try:
        text = read_text(stream, sample.members[other], "").decode("utf-8").strip()
        said = _fields(text) if other == "json" else [("", text)]
    except (ValueError, RecursionError):
        return ""  # not the member that the label is read from
    for name, value in said or ():
        if other == "json" and name not in LABEL_FIELDS:
            continue
        meanings = _meanings(str(value), rule) if type(value) in (int, str) else set()
        if meanings and class_id not in meanings:
            field = f"{name!r}: " if name else ""
            here, there = (f"class {n} ({rule.labels.names[n]})" for n in (class_id, min(meanings)))
            return f"its .{other} has {field}{value!r}, {there}, and not {here}"
    return ""


def _fields(text: str) -> list[tuple[str, Any]] | None:
    """Return the fields of a JSON object in their order, repeated ones too; None for other JSON.

    The JSON is not ours: it may hold NaN, and repeat what is no label.
    """
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal outermost
        outermost = pairs  # the last object to be closed
        return dict(pairs)

    return outermost if isinstance(json.loads(text, object_pairs_hook=keep), dict) else None


def _meanings(text: str, rule: Rule) -> set[int]:
    """Return the class ids that a label could mean, whatever it counts."""
    text = composed(text).strip()
    found = set(rule.classes_of_name.get(text, ()))
    if text in rule.class_of_id:
        found.add(rule.class_of_id[text])
    if POSITION.fullmatch(text):
        for places in (rule.positions, range(len(rule.labels))):
            if int(text) < len(places):
                found.add(places[int(text)])
    return found


def parse_label(data: bytes, where: str, rule: Rule) -> int | str:
    """Return the label in a `.cls` or `.json`: a number, or a text.

    JSON tells the two apart. A `.cls` holds text in any case: a number is what is written as a
    position is. `007` is a text. Texts are in Unicode's composed form, as the label space is.

    Raises:
        ValueError: if there is no label in it, or its field is there twice.
    """
    try:
        text = data.decode("utf-8").strip()
        said = None if rule.label_field is None else _fields(text)
    except (ValueError, RecursionError) as error:  # no UTF-8, or no JSON
        suffix = "cls" if rule.label_field is None else "json"
        raise ValueError(f"{where}: its .{suffix} is not readable: {error}") from error
    if rule.label_field is not None:
        return _json_label(said, rule.label_field, where)
    return int(text) if POSITION.fullmatch(text) else composed(text)


def resolve_label(label: int | str, where: str, rule: Rule) -> int:
    """Return the class id that a label means: a number, or a class's folder name or name.

    A text that is a class's id is that class, also where it has digits alone. A number that is
    written as one (no sign, no leading zeros) is a position, unless that and an id or name that
    looks like it are different classes: then `labels_are` must decide.

    Raises:
        ValueError: if it means no class, several, or one that the set is not scored on.
    """
    class_id = _class_of(label, where, rule)
    if class_id not in rule.scored:
        raise ValueError(
            f"{where}: label {label!r} is class {class_id} ({rule.labels.names[class_id]}), which "
            f"this set is not published for; if its labels count classes of its own, list their "
            f"names in a file and give it as --local-classes"
        )
    return class_id


def _class_of(label: int | str, where: str, rule: Rule) -> int:
    text = str(label)
    if rule.labels_are is None and isinstance(label, str) and label in rule.class_of_id:
        return rule.class_of_id[label]
    if rule.labels_are == "names" or not POSITION.fullmatch(text):
        return _class_of_name(text, where, rule)
    if rule.labels_are is None and rule.misplaced:
        raise ValueError(
            f"{where}: label {text} may be a position or a class's id or name, which are different "
            f"here (class {rule.misplaced!r} is not at position {rule.misplaced}); say which with "
            f"--labels-are positions or --labels-are names"
        )
    number = int(text)
    if number not in range(len(rule.positions)):
        raise ValueError(f"{where}: label {number} is none of the {len(rule.positions)} classes")
    return rule.positions[number]


def _class_of_name(text: str, where: str, rule: Rule) -> int:
    if text in rule.class_of_id:
        return rule.class_of_id[text]
    found = rule.classes_of_name.get(text, [])
    if len(found) != 1:
        what = "several classes" if found else "no class of the label space"
        hint = ""
        if re.fullmatch(r"-?[0-9]+\.[0-9]*", text):
            hint = "; class numbers are integers"
        elif rule.labels_are != "names" and re.fullmatch(r"[+-]?[0-9]+", text):
            hint = "; positions count from 0, without sign or leading zeros"
        raise ValueError(f"{where}: label {text[:80]!r} is {what}{hint}")
    return found[0]


def _json_label(said: list[tuple[str, Any]] | None, name: str, where: str) -> int | str:
    values = [value for field, value in said or () if field == name]
    if len(values) > 1:
        raise ValueError(f"{where}: its .json has {name!r} {len(values)} times; keep one of them")
    value = values[0] if values else None
    if isinstance(value, bool | float):
        kind = "true or false" if isinstance(value, bool) else "a number with a fraction"
        raise ValueError(
            f"{where}: label {json.dumps(value)} of its .json is {kind}; write class numbers as "
            f"integers (0, 1, 2), or class names as texts"
        )
    if not isinstance(value, int | str):
        known = "no fields" if said is None else ", ".join(sorted({field for field, _ in said}))
        raise ValueError(f"{where}: no label, its .json has no number or text {name!r} ({known})")
    return composed(value).strip() if isinstance(value, str) else value
