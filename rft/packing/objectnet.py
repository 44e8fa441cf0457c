"""Maps ObjectNet's folders to ImageNet's classes, with the files of its own archive."""

from collections import Counter
from pathlib import Path
from typing import TypeVar

from rft.storage import documents, files
from rft.storage.documents import Count, Text

T = TypeVar("T")


def objectnet_groups(mappings: Path, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Find the class ids of each ObjectNet folder that overlaps ImageNet.

    `mappings` is the `mappings/` folder of ObjectNet's own archive. The chain is: folder -> label
    -> ImageNet names (joined by "; ") -> 2012 ids (line numbers) -> class ids. Folders are sorted
    and ids ascend within a folder; in the real files 113 of 313 folders map to 125 classes.

    Raises:
        ValueError: if a file is absent or malformed, a name is unknown, or two folders share a
            class (the scoring rule needs disjoint groups).
    """
    folder_to_label = folder_labels(mappings)
    label_to_names = _mapping(mappings / "objectnet_to_imagenet_1k.json", dict[str, Text])
    class_to_line = _mapping(mappings / "pytorch_to_imagenet_2012_id.json", dict[str, Count])
    lines = _lines(mappings / "imagenet_to_label_2012_v2")
    if set(class_to_line) != {str(class_id) for class_id in range(num_classes)}:
        count = len(class_to_line)
        raise ValueError(f"{mappings} maps {count} classes, but the label space has {num_classes}")
    line_to_class = {line: int(class_id) for class_id, line in class_to_line.items()}
    # ImageNet has two classes called "crane": a repeated name cannot be resolved
    occurrences = Counter(lines)
    name_to_class = {
        name: line_to_class.get(number)
        for number, name in enumerate(lines)
        if occurrences[name] == 1
    }

    groups: dict[str, tuple[int, ...]] = {}
    folder_of_class: dict[int, str] = {}
    for folder, label in sorted(folder_to_label.items()):
        # 200 of the 313 folders show objects without a class in ImageNet
        if label not in label_to_names:
            continue
        members = []
        for name in label_to_names[label].split(";"):
            class_id = name_to_class.get(name.strip())
            if class_id is None:
                raise ValueError(
                    f"{mappings}: {label!r} maps to {name.strip()!r}, which is not a single class"
                )
            if class_id in folder_of_class:
                other = folder_of_class[class_id]
                raise ValueError(f"{mappings}: {folder!r} and {other!r} share class {class_id}")
            folder_of_class[class_id] = folder
            members.append(class_id)
        groups[folder] = tuple(sorted(members))
    if not groups:
        raise ValueError(f"{mappings} maps no folder to a class")
    return groups


def folder_labels(mappings: Path) -> dict[str, str]:
    """Read the class name of each of ObjectNet's folders.

    Raises:
        ValueError: if the file is absent or malformed.
    """
    return _mapping(mappings / "folder_to_objectnet_label.json", dict[str, Text])


def _mapping(path: Path, kind: type[T]) -> T:
    return documents.decode(_read(path), kind, str(path))


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no such file: {path} (part of ObjectNet's mappings folder)")
    return files.read_bytes(str(path))


def _lines(path: Path) -> list[str]:
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    # not splitlines(), which also splits at U+0085 within a name: ids are line numbers
    return [name.strip() for name in text.split("\n")]
