"""ImageNet as downloaded: tars that are never extracted, and the devkit's validation labels.

The training archive is a tar with one tar per class, so each image has an offset in the outer tar.
The validation archive holds flat files whose classes are only in the devkit.
"""

import gzip
import io
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from rft.shards import tar
from rft.storage import files, local

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
META = f"{DEVKIT}/data/meta.mat"
DEVKIT_BYTES = 2**25  # unpacked: 14 times its real size
HEADER_BUFFER = 1024  # small: between two headers lies an image, so reading ahead would be wasted


def tar_members(path: Path, part: tar.Member | None = None) -> list[tar.Member]:
    """List the members of a tar, or of the tar that is its member `part`, by offset in the file.

    Raises:
        ValueError: if it is damaged or truncated, or holds two members with the same name.
    """
    name = str(path) if part is None else f"{path}: {part.name}"
    members: dict[str, tar.Member] = {}
    with os.fdopen(local.open_regular(path), "rb", HEADER_BUFFER) as stream:
        for member in tar.walk(stream, name, part):
            plain = PurePosixPath(member.name).as_posix()  # without a leading "./"
            if plain in members:
                raise ValueError(f"{name} holds {plain} twice")
            members[plain] = member._replace(name=plain)
    return list(members.values())


def find_devkit(folders: Sequence[Path]) -> Path | None:
    """Find the devkit, a folder or its .tar.gz, in the first of the folders that has one."""
    forms = (folder / name for folder in folders for name in (DEVKIT, f"{DEVKIT}.tar.gz"))
    return next((path for path in forms if path.is_dir() or path.is_file()), None)


def validation_classes(devkit: Path) -> list[str]:
    """Read the WordNet ids of validation images 1, 2, ... from the devkit.

    Raises:
        ValueError: if one of its files is absent, damaged or inconsistent.
    """
    # imported here: it takes seconds, and only this layout needs it
    import scipy.io

    truth, meta = _devkit_files(devkit)
    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # meta.mat also lists the synsets above the classes
        leaves = synsets[synsets["num_children"] == 0]
        wnids = dict(zip(map(int, leaves["ILSVRC2012_ID"]), map(str, leaves["WNID"]), strict=True))
    except Exception as error:  # scipy's parser fails in many ways on damaged files
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{devkit}: meta.mat cannot be read: {what}") from error
    # a byte that is not ASCII fails below, with the number of its image
    lines = truth.decode("ascii", "replace").split()
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[0-9]{1,9}", line) or int(line) not in wnids:
            raise ValueError(f"{devkit}: image {number} has class {line[:20]!r}, not in meta.mat")
    return [wnids[int(line)] for line in lines]


def _devkit_files(devkit: Path) -> tuple[bytes, bytes]:
    """Read ground truth and meta.mat from the folder or the compressed tar."""
    if devkit.is_dir():
        paths = [devkit.parent / name for name in (TRUTH, META)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"no such file: {path} (part of ImageNet's devkit)")
        truth, meta = (files.read_bytes(str(path), DEVKIT_BYTES) for path in paths)
        return truth, meta
    try:
        # all at once (2.5 MB): gzip verifies its checksum only at the end
        with local.reader(devkit) as stream, gzip.open(stream) as unpacked:
            data = unpacked.read(DEVKIT_BYTES + 1)
    # gzip's errors: a wrong magic number or checksum, a truncated file, a damaged stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{devkit} is damaged: {error}; download it again") from error
    if len(data) > DEVKIT_BYTES:
        raise ValueError(f"{devkit} unpacks to more than {DEVKIT_BYTES:,} bytes; download it again")
    stream = io.BytesIO(data)
    found = {
        PurePosixPath(member.name).as_posix(): data[member.offset : member.offset + member.size]
        for member in tar.walk(stream, str(devkit))
    }
    for name in (TRUTH, META):
        if name not in found:
            raise ValueError(f"{devkit} holds no {name}; download it again")
    return found[TRUTH], found[META]
