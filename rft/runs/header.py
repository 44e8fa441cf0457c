"""Checks the header of a safetensors file before any tensor is mapped. No torch.

The safetensors library verifies the byte ranges of all tensors, but it accepts headers of 100 MB,
any number of tensors and dimensions, and duplicate names, of which it takes the last.
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
    """A header's entry of one tensor; the library checks its type and byte range."""

    dtype: Name
    # in a vision transformer a convolution's weights have the most dimensions, four
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]


class Header(NamedTuple):
    """The metadata and tensor entries at the start of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]


@document(config=FOREIGN)
class Entries:
    """The entries that rft writes in the header of its weights files; older files have fewer."""

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
        """Recipe, step and training sets, which a copy of the weights keeps."""
        known = {"step": self.step, "recipe": self.recipe, "trained_on": self.trained_on}
        return {name: value for name, value in known.items() if value is not None}


def read(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ValueError: if the file does not exist, or has no valid header.
    """
    files.require_file(path, "weights")
    with local.reader(path) as stream:
        # the format: 8 bytes with the length of the header, the header as JSON, the tensors
        length = int.from_bytes(stream.read(8), "little")
        size = os.fstat(stream.fileno()).st_size
        # the shortest header is {}
        if not 2 <= length <= size - 8:
            raise ValueError(
                f"{path} is damaged or truncated: no safetensors header ends within its {size:,} "
                "bytes"
            )
        if length > BYTES:
            raise ValueError(f"{path} has a header of {length:,} bytes; the limit is {BYTES:,}")
        data = stream.read(length)
    where = f"the header of {path}"
    found = documents.parse(data, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {short(found)}; it must be an object")
    # the only entry that is not a tensor
    metadata = found.pop("__metadata__", {})
    if len(found) > TENSORS:
        raise ValueError(f"{path} has {len(found):,} tensors; the limit is {TENSORS:,}")
    return Header(
        documents.convert(metadata, dict[str, str], where),
        documents.convert(found, dict[Name, Stored], where),
    )


def entries(metadata: Mapping[str, str], path: Path) -> Entries:
    """Parse rft's own entries in a header's metadata.

    Raises:
        ValueError: naming the file, if they are missing or malformed.
    """
    if "rft" not in metadata:
        raise ValueError(f"{path} was not written by rft: its header names no recipe")
    # one entry with JSON in it, because metadata holds only strings
    return documents.decode(metadata["rft"].encode(), Entries, f"the header of {path}")


def read_entries(path: Path) -> Entries:
    """Read rft's own entries from the header of a weights file.

    Raises:
        ValueError: naming the file, if rft did not write it.
    """
    return entries(read(path).metadata, path)
