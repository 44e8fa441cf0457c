"""Distinguishes classes from splits among the folders of a photo folder, by name and content.

A split holds folders, one per class; a class folder holds images, with or without further folders.
Names decide further: `train`, `Training`, `test_set`, `validation images` are splits if both a
training split and another one exist. Ambiguous folders are refused with a hint, because splits that
are packed as classes would train and test without an error. If `--classes` names all folders in
question, they are classes.
"""

import contextlib
import os
import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

from rft.classes import composed
from rft.packing.names import has_image_suffix, passed_over, regular_size, require_utf8, thumbnails
from rft.packing.source import Found
from rft.text import shown

WORDS = {
    "train": "train|training",
    "test": "test|testing",
    "val": "val|valid|validate|validation|dev|development|eval|evaluation|holdout|heldout",
}
# words beside the role that do not change it, as in `test_set` and `imgs_train`
NEUTRAL = "(?:set|data|dataset|split|folder|images?|imgs?|pics|pictures?|photos?|samples|examples)?"
NAMES = {role: re.compile(f"{NEUTRAL}(?:{words}){NEUTRAL}") for role, words in WORDS.items()}
BETWEEN_WORDS = re.compile(r"[\s_.-]+")
# also splits at capitals, as in `trainA`; digits and signs do not belong to words
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_]+")
DEPTH = 64  # of folders in a class folder; os.walk recurses in Python 3.11
DEEPEST = 20  # levels searched for a hint: links may form a loop


class Level(NamedTuple):
    """The direct content of a folder: sorted names, without those that are skipped.

    `passed` has the name or pattern by which each skipped one is counted.
    """

    path: Path
    folders: tuple[str, ...]
    files: tuple[str, ...]
    passed: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def images(self) -> list[str]:
        """The files with an image's suffix."""
        return list(filter(has_image_suffix, self.files))

    @property
    def is_split_like(self) -> bool:
        """Whether it holds folders and no images of its own."""
        return bool(self.folders) and not self.images


def read_level(folder: Path, ignore: Sequence[str]) -> Level:
    """List a folder without system files and without names that match the patterns `ignore`."""
    folders, files, passed = [], [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if pattern := passed_over(entry.name, ignore):
                passed.append(pattern)
            else:
                (folders if entry.is_dir() else files).append(entry.name)
    return Level(folder, tuple(folders), tuple(files), tuple(passed))


def read_levels(folder: Path, ignore: Sequence[str]) -> tuple[Level, list[Level]]:
    """List a folder that may hold classes or splits, and each of the folders in it.

    Of the files in those, only the first image is kept, if any.

    Raises:
        ValueError: for a broken link, or a folder whose name is not UTF-8.
    """
    level = read_level(folder, ignore)
    for name in level.folders:
        require_utf8(folder / name)
    for name in level.files:
        if (folder / name).is_symlink():
            regular_size(folder / name)  # a broken link may be a class that is missing
    # one image shows that a folder has some; keeping all names might take millions
    below = (read_level(folder / name, ignore) for name in level.folders)
    return level, [one._replace(files=tuple(one.images[:1]), passed=()) for one in below]


def role(name: str) -> str:
    """Find the set that a folder's name stands for: train, test, val, or empty."""
    plain = BETWEEN_WORDS.sub("", composed(name).casefold())
    return next((role for role, pattern in NAMES.items() if pattern.fullmatch(plain)), "")


def hinted_role(name: str) -> str:
    """Find the set that a word in a folder's name stands for (`seg_train`, `trainA`), if any."""
    return next(filter(None, map(role, WORD.findall(composed(name)))), "")


def find_splits(source: Path, shapes: Sequence[Level], ids: Collection[str]) -> dict[str, str]:
    """Find the folders in `source` that are splits; `ids` are the classes of `--classes`, if any.

    Returns:
        Folder names by the name of the set they become: train, test and, if the source has both a
        test and a validation split, val. Empty if the folders are classes.

    Raises:
        ValueError: if folders look like splits, but are ambiguous.
    """
    # `_choose` relies on this order
    named: dict[str, list[Level]] = {"train": [], "test": [], "val": []}
    for shape in shapes:
        if found := role(shape.name):
            named[found].append(shape)
    splits = [*chain(*named.values())]
    if splits and all(composed(shape.name) in ids for shape in splits):
        return {}
    if named["train"] and (named["test"] or named["val"]):
        return _choose(source, named)
    alone = next((shape for shape in splits if shape.is_split_like), None)
    if alone:
        other = "training split" if role(alone.name) != "train" else "test or validation split"
        raise ValueError(
            f"{source} holds {shown(alone.name)}, which looks like a split, but no {other}; name "
            f"the folder {source / alone.name} to pack only that, rename the other split to train, "
            f"test or val, or list {shown(alone.name)} in --classes if it is a class"
        )
    _require_no_hints(source, shapes, ids)
    return {}


def splits_beside(source: Path) -> list[str]:
    """List the test and validation splits beside a folder that is named like a training split."""
    folder = source.resolve()
    if role(folder.name) != "train":
        return []
    # the folder above may be unreadable, and this is only a hint
    with contextlib.suppress(OSError), os.scandir(folder.parent) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
        return sorted(name for name in names if role(name) in ("test", "val"))
    return []


def require_classes_here(
    source: Path,
    shapes: Sequence[Level],
    ids: Collection[str],
    ignore: Sequence[str],
    *,
    is_split: bool,
) -> None:
    """Check that the folders in `source` can be classes, rather than a level above or below them.

    Raises:
        ValueError: with a hint, for a single folder, a class that holds splits, or folders that
            contain the same folders or splits.
    """
    if len(shapes) == 1 and composed(shapes[0].name) not in ids:
        raise ValueError(_one_class(source, shapes[0], ignore, is_split))
    ends = [_end(_without_thumbnails(shape), ignore) for shape in shapes]
    for end in ends:
        # splits below a class: the two levels are probably swapped
        roles = {role(name): name for name in end.folders}
        other = roles.get("test") or roles.get("val")
        if "train" in roles and other:
            above = source / roles["train"] / end.path.relative_to(source)
            raise ValueError(
                f"{end.path} holds splits ({shown(roles['train'])}, {shown(other)}); "
                f"name it as the source if it is a separate set, or, if it is a class, put the "
                f"splits above the classes ({above}, ...)"
            )
    if is_split or all(composed(shape.name) in ids for shape in shapes):
        return
    _require_no_sets(source, shapes, ends)
    _require_no_splits(source, shapes, ends)


def _require_no_sets(source: Path, shapes: Sequence[Level], ends: Sequence[Level]) -> None:
    """Check that folders do not contain the same folders, as several sets of one kind would."""
    sets = [end for end in ends if end.is_split_like]
    for one, two in combinations(sets, 2):
        common = sorted(set(one.folders) & set(two.folders))
        # a single common name may be chance
        if len(common) > 1:
            names = [str(end.path.relative_to(source)) for end in (one, two)]
            direct = one.path.parent == two.path.parent == source
            hint = (
                "rename them to train and test if they are splits, name one of them as the source"
            )
            if not direct:
                hint = f"name the folder {one.path}, or move the images of both into one folder,"
            raise ValueError(
                f"{shown(names[0])} and {shown(names[1])} in {source} hold folders with the same "
                f"names ({', '.join(map(shown, common[:3]))}) and no images of their own: {hint} "
                f"if those folders are the classes, or list "
                f"{'them' if direct else ', '.join(shown(shape.name) for shape in shapes[:3])} in "
                f"--classes if they are classes"
            )
    # for years/2023/photos/cat this is photos
    chains = {end.path.relative_to(source).parts[1:] for end in ends}
    if len(chains) == 1 and chains != {()} and len(sets) == len(ends):
        on_the_way = "/".join(next(iter(chains)))
        raise ValueError(
            f"every folder in {source} holds only {shown(on_the_way)} with further "
            f"folders: if those are the classes, name the folder {sets[0].path}, or move them all "
            f"into one folder; if {shown(shapes[0].name)}, ... are classes, list them in --classes"
        )


def _require_no_splits(source: Path, shapes: Sequence[Level], ends: Sequence[Level]) -> None:
    """Refuse sources whose folders are sets with splits rather than classes.

    This is the case if every folder has all its images in a split, or if a folder's only split
    holds class folders. A split inside a single class only gives a warning (`doubtful_folders`).
    """
    splits = [_split_on_the_way(shape, end) for shape, end in zip(shapes, ends, strict=True)]
    for shape, split, end in zip(shapes, splits, ends, strict=True):
        if split is None:
            continue
        is_set = end.is_split_like and end.path.is_relative_to(split)
        if is_set or all(splits):
            what = "every folder in" if all(splits) else f"{shown(shape.name)} in"
            raise ValueError(
                f"{what} {source} holds its images only in a folder that is named like a split "
                f"({split.relative_to(source)}): if the folders in it are the classes, name "
                f"the folder {split}; if {shown(shape.name)} is a class, move its images up or "
                f"list it in --classes"
            )


def _split_on_the_way(top: Level, end: Level) -> Path | None:
    """Find a folder named like a split that holds all images of a class, or is one of several.

    `end` is the end of the chain of single folders in the class folder `top`.
    """
    below = [place for place in (end.path, *end.path.parents) if place.is_relative_to(top.path)]
    # from the outermost folder inwards, without the class folder itself
    for place in reversed(below[:-1]):
        if role(place.name):
            return place
    if end.is_split_like and all(map(role, end.folders)):
        return end.path / end.folders[0]
    return None


def _end(shape: Level, ignore: Sequence[str], *, in_class: bool = True) -> Level:
    """Descend through folders that hold a single folder and no images, to the last one."""
    for _ in range(DEEPEST):
        if shape.images or len(shape.folders) != 1:
            break
        shape = read_level(shape.path / shape.folders[0], ignore)
        shape = _without_thumbnails(shape) if in_class else shape
    return shape


def _without_thumbnails(shape: Level) -> Level:
    return shape._replace(folders=tuple(name for name in shape.folders if not thumbnails(name)))


def not_read(level: Level, splits: Collection[str], ignore: Sequence[str]) -> list[str]:
    """List the folders beside the splits, with their number of images, and the files."""
    entries = []
    for name in sorted(set(level.folders) - set(splits)):
        count = 0
        # links are not followed, and very deep folders are not read: the count is only a hint
        for folder, below, names in os.walk(level.path / name):
            deep = len(Path(folder).relative_to(level.path).parts) >= DEPTH
            below[:] = [one for one in below if not (deep or passed_over(one, ignore))]
            count += sum(has_image_suffix(one) and not passed_over(one, ignore) for one in names)
        entries.append(f"{name}/ ({count:,} image{'' if count == 1 else 's'})")
    return [*entries, *level.files]


def _choose(source: Path, named: Mapping[str, Sequence[Level]]) -> dict[str, str]:
    for kind, shapes in named.items():
        if len(shapes) > 1:
            names = " and ".join(shown(shape.name) for shape in shapes[:2])
            raise ValueError(
                f"{source} holds {names}: which is the {kind} split? Rename or move the other, or "
                f"skip it with --ignore"
            )
    for shape in chain(*named.values()):
        if shape.images and not shape.folders:
            raise ValueError(
                f"{shape.path} is named like a split, but holds images and no class folders; move "
                f"them into class folders, skip it with --ignore {shown(shape.name)}, or list the "
                f"classes with --classes if it is one"
            )
    found = [shapes[0].name for shapes in named.values() if shapes]
    # without a test split, the validation split comes second and becomes the test set
    return dict(zip(("train", "test", "val"), found, strict=False))


def _require_no_hints(source: Path, shapes: Sequence[Level], ids: Collection[str]) -> None:
    train = [shape for shape in shapes if hinted_role(shape.name) == "train"]
    other = [shape for shape in shapes if hinted_role(shape.name) in ("test", "val")]
    doubtful = [*train, *other]
    # a split with a stray image beside its class folders is still a split
    if not (train and other and any(shape.folders for shape in doubtful)):
        return
    if any(composed(shape.name) not in ids for shape in doubtful):
        raise ValueError(
            f"{shown(train[0].name)} and {shown(other[0].name)} in {source} look like splits; "
            f"rename them to train and test, or list them in --classes if they are classes "
            f"(docs/photos.md#the-folder)"
        )


def _one_class(source: Path, shape: Level, ignore: Sequence[str], is_split: bool) -> str:
    found = _end(shape, ignore, in_class=False)
    message = f"{source} holds a single folder, {shown(shape.name)}"
    if found.images or len(found.folders) < 2:
        hint = f"; if it has no classes, --ignore {shown(source.name)}" if is_split else ""
        return f"{message}; one class is too few: every prediction would be correct{hint}"
    several = f"{message}, and the class folders seem to be in {found.path}"
    return f"{several}; {'move them up' if is_split else f'name the folder {found.path}'}"


def doubtful_folders(root: Path, classes: Mapping[str, Sequence[Found]]) -> list[str]:
    """List warnings of class folders that may be splits or groups of classes, or hold a split."""
    found = []
    within = []
    for name, images in classes.items():
        if role(name):
            found.append(f"the folder {shown(name)} in {root} is packed as a class")
        folders = [image.path.rpartition("/")[0] for image in images]
        place = posixpath.commonpath(folders)
        below = sorted({folder[len(place) + 1 :].split("/")[0] for folder in folders})
        if all(below):  # no image lies directly in this folder
            names = ", ".join(map(shown, below[:3]))
            found.append(
                f"class {shown(name)} in {root} has no images of its own, only folders "
                f"({names}{', ...' if below[3:] else ''}); if those are the classes, name the "
                f"folder {root / place}"
            )
        # without the class folder itself, which comes first
        between = {part for folder in folders for part in folder.split("/")[1:]}
        if splits := sorted(filter(role, between)):
            within.append((root / name, ", ".join(map(shown, splits[:3]))))
    # one line for all classes, because each class may hold a split
    for place, names in within[:1]:
        others = f" (and in {len(within) - 1:,} more)" if within[1:] else ""
        found.append(
            f"{names} in {place}{others} is named like a split; its images are packed as part of "
            f"the class"
        )
    return found
