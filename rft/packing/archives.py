"""ImageNet as it is downloaded: tars that are never extracted, and the devkit's validation labels.

The training archive is a tar of one tar for each class, so an image lies at an offset of the outer
tar; the validation archive holds flat files whose classes are only in the devkit.
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
DEVKIT_BYTES = 2**25  # unpacked; it has a fourteenth of that
HEADER_BUFFER = 1024  # between two headers lies a whole image: reading ahead would be for nothing


def tar_members(path: Path, part: tar.Member | None = None) -> list[tar.Member]:
    """Return the members of a tar, or of the tar that is its member `part`, by offset in the file.

    Raises:
        ValueError: if it is damaged or cut, or holds two members of one name.
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
    """Return the devkit, a folder or its .tar.gz, that lies in the first of the folders."""
    forms = (folder / name for folder in folders for name in (DEVKIT, f"{DEVKIT}.tar.gz"))
    return next((path for path in forms if path.is_dir() or path.is_file()), None)


def validation_classes(devkit: Path) -> list[str]:
    """Return the WordNet id of validation image 1, 2, ..., from the devkit.

    Raises:
        ValueError: if a file of it is absent, damaged or not what it should be.
    """
    # seconds, and only this layout needs it
    import scipy.io

    truth, meta = _devkit_files(devkit)
    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # meta.mat lists the synsets above the classes too
        leaves = synsets[synsets["num_children"] == 0]
        wnids = dict(zip(map(int, leaves["ILSVRC2012_ID"]), map(str, leaves["WNID"]), strict=True))
    except Exception as error:  # scipy's parser slips in many ways on damaged files
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{devkit}: meta.mat cannot be read: {what}") from error
    # a byte that is no ASCII fails below, with the number of its image
    lines = truth.decode("ascii", "replace").split()
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[0-9]{1,9}", line) or int(line) not in wnids:
            raise ValueError(f"{devkit}: image {number} has class {line[:20]!r}, none of meta.mat")
    return [wnids[int(line)] for line in lines]


def _devkit_files(devkit: Path) -> tuple[bytes, bytes]:
    """Return ground truth and meta.mat from the folder or the compressed tar."""
    if devkit.is_dir():
        paths = [devkit.parent / name for name in (TRUTH, META)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"no such file: {path} (part of ImageNet's devkit)")
        truth, meta = (files.read_bytes(str(path), DEVKIT_BYTES) for path in paths)
        return truth, meta
    try:
        # whole and at once (2.5 MB): only then its checksum is looked at
        with local.reader(devkit) as stream, gzip.open(stream) as unpacked:
            data = unpacked.read(DEVKIT_BYTES + 1)
    # of gzip: a wrong magic number or checksum, a cut file, a damaged stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{devkit} is damaged: {error}; get it again") from error
    if len(data) > DEVKIT_BYTES:
        raise ValueError(f"{devkit} unpacks to more than {DEVKIT_BYTES:,} bytes; get it again")
    stream = io.BytesIO(data)
    found = {
        PurePosixPath(member.name).as_posix(): data[member.offset : member.offset + member.size]
        for member in tar.walk(stream, str(devkit))
    }
    for name in (TRUTH, META):
        if name not in found:
            raise ValueError(f"{devkit} holds no {name}; get it again")
    return found[TRUTH], found[META]
