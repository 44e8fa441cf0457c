"""The header of a safetensors file, checked before any tensor is mapped; no torch.

The safetensors library compares every tensor's bytes with the file. It accepts headers of 100 MB,
any number of tensors and dimensions, and takes the last of two entries of one name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from rft.classes import Classes
from rft.storage import documents, files, local
from rft.storage.documents import FOREIGN, Count, Name, Text, document
from rft.text import short

BYTES = 2**24  # 30,000 tensors take 4 MB, the names of ImageNet-21k's classes 1 MB
TENSORS = 10_000  # of open_clip's models, MobileCLIP-S2 has the most: 1,722


@document(config=FOREIGN)
class Stored:
    """What a header says of one tensor; the library checks type and place."""

    dtype: Name
    # a convolution's weights have four dimensions, the most of a vision transformer
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]


class Header(NamedTuple):
    """What a safetensors file says before its bytes."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]


@document(config=FOREIGN)
class Entries:
    """What the header of one of rft's weights files says; older ones say less."""

    # 15 digits stay below 2**53, the limit of a step in documents
    step: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,14})$")]
    recipe: Name | None = None
    trained_on: Annotated[str, Field(max_length=1_000_000)] | None = None
    """JSON, for `rft.runs.trained_on`."""
    architecture: Text | None = None
    """JSON, for `rft.clip.architecture`."""
    classes: Classes | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Recipe, step and training sets: what a copy of the weights keeps."""
        known = {"step": self.step, "recipe": self.recipe, "trained_on": self.trained_on}
        return {name: value for name, value in known.items() if value is not None}


def read(path: Path) -> Header:
    """Return the header of a safetensors file.

    Raises:
        ValueError: if there is no file, or it has no such header.
    """
    files.require_file(path, "weights")
    with local.reader(path) as stream:
        # the format: length of the header in 8 bytes, the header as JSON, then the tensors
        length = int.from_bytes(stream.read(8), "little")
        size = os.fstat(stream.fileno()).st_size
        # {} is the shortest header
        if not 2 <= length <= size - 8:
            raise ValueError(
                f"{path} is damaged or truncated: no safetensors header ends within its {size:,} "
                "bytes"
            )
        if length > BYTES:
            raise ValueError(
                f"{path} has a header of {length:,} bytes; that of weights has {BYTES:,} at most"
            )
        data = stream.read(length)
    where = f"the header of {path}"
    found = documents.parse(data, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {short(found)}; it must be an object")
    # the one entry that is no tensor
    metadata = found.pop("__metadata__", {})
    if len(found) > TENSORS:
        raise ValueError(f"{path} has {len(found):,} tensors; a CLIP has {TENSORS:,} at most")
    return Header(
        documents.convert(metadata, dict[str, str], where),
        documents.convert(found, dict[Name, Stored], where),
    )


def entries(metadata: Mapping[str, str], path: Path) -> Entries:
    """Return rft's own entries among a header's metadata.

    Raises:
        ValueError: naming the file, if there are none, or they are malformed.
    """
    if "rft" not in metadata:
        raise ValueError(f"{path} was not written by rft: its header names no recipe")
    # one entry with JSON in it: metadata may hold texts alone
    return documents.decode(metadata["rft"].encode(), Entries, f"the header of {path}")


def read_entries(path: Path) -> Entries:
    """Return what the header of one of rft's weights files says.

    Raises:
        ValueError: naming the file, if it is not one.
    """
    return entries(read(path).metadata, path)
