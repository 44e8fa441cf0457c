"""Reads what a pickle or a torch archive holds without running anything that it names.

A pickle is a program that calls what it names. Here a name is one of three things: a function of
this file that notes where a tensor's bytes lie; a class of a model, an optimizer or a transform,
for which an empty stand-in is made that only keeps attributes (nothing is imported); or refused.
TorchScript archives are read the same way: their tensors are taken, their code is not looked at.
"""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}

# packages whose classes get a stand-in: what CLIP, wise-ft and torch put into checkpoints
STOOD_IN_PACKAGES = (
    "PIL.Image",
    "__torch__",
    "clip",
    "numpy",
    "open_clip",
    "src",
    "torch.jit._pickle",
    "torch.nn",
    "torch.optim",
    "torchvision.transforms",
)
STOOD_IN_NAMES = {
    "_codecs.encode",
    "argparse.Namespace",
    "collections.defaultdict",
    "torch.Size",
    "torch.device",
    *map(str, DTYPES.values()),  # torch.float32, ...
    # old schedulers kept a function of theirs, written as getattr(class, name)
    "builtins.getattr",
}

# what damage, or a pickle made to confuse, raises inside the unpickler
DAMAGE = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


class RefusedError(ValueError):
    """A pickle asked for something that is not on the list."""


class StandIn:
    """Takes the place of any class a pickle names: keeps attributes, does nothing."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls, *_: object, **__: object) -> Self:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        # an object with slots is pickled as (attributes, slots)
        state = state[0] if isinstance(state, tuple) and state else state
        self.attributes = state if isinstance(state, dict) else {}

    # the rest is for stand-ins of lists and dicts, whose content is never wanted
    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """Take an item and forget it."""

    def extend(self, _: object) -> None:
        """Take items and forget them."""


@dataclass(frozen=True)
class Storage:
    """The flat memory that tensors are views of, not read yet."""

    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """Read the tensor.

        Raises:
            ValueError: if its bytes are damaged or it reaches outside of its storage.
        """
        try:
            return self.storage.read().as_strided(self.size, self.stride, self.offset).clone()
        except (RuntimeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"damaged tensor: {_first_line(error)}") from error


class Unpickler(pickle.Unpickler):
    """A pickle module's Unpickler that can make nothing but data.

    Args:
        stream: the pickle.
        read_storage: returns the bytes of an archive's storage; None outside of an archive.
    """

    def __init__(
        self, stream: io.BufferedIOBase, read_storage: Callable[[str], bytes] | None = None
    ) -> None:
        super().__init__(stream)
        self._read_storage = read_storage
        self._stand_ins: dict[str, type[StandIn]] = {}
        # bound methods: a pickle can set attributes of a function or class, not of these
        self._makers: dict[str, Any] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.storage._load_from_bytes": self._nested_storage,
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "builtins.frozenset": frozenset,
        }

    def find_class(self, module: str, name: str, /) -> Any:
        """Return what the pickle means by a name; see the top of this file.

        Raises:
            RefusedError: for every other name.
        """
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if full in self._makers:
            return self._makers[full]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in STOOD_IN_NAMES or f"{module}.".startswith(_PREFIXES):
            return self._stand_ins.setdefault(full, type(name, (StandIn,), {}))
        raise RefusedError(f"it wants to use {full}")

    def persistent_load(self, pid: Any, /) -> Storage:
        """Return a storage of the archive; the pickle names it by key, type and length."""
        kind, dtype, key, _, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or self._read_storage is None:
            raise RefusedError(f"it wants to use a {kind!r} of type {dtype!r}")
        read = self._read_storage

        def flat() -> Tensor:
            data = read(key)
            if len(data) != length * dtype.itemsize:
                raise ValueError(f"damaged tensor: storage {key} has {len(data)} bytes")
            return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0)

        return Storage(dtype, flat)

    def _tensor(
        self, storage: Storage, offset: int, size: Any, stride: Any, *_: object
    ) -> StoredTensor:
        if not isinstance(storage, Storage):
            raise TypeError(f"a tensor of {type(storage).__name__}")
        return StoredTensor(storage, int(offset), tuple(size), tuple(stride))

    def _parameter(self, tensor: StoredTensor, *_: object) -> StoredTensor:
        return tensor

    def _nested_storage(self, data: bytes) -> Storage:
        """Read a storage that was pickled as a pickle of its own, in torch's old format."""
        typed = load_weights_only(io.BytesIO(data))
        if not isinstance(typed, torch.storage.TypedStorage):
            raise TypeError(f"a storage of {type(typed).__name__}")
        flat = torch.empty(0, dtype=typed.dtype).set_(typed._untyped_storage)
        return Storage(flat.dtype, lambda: flat)


_PREFIXES = tuple(f"{package}." for package in STOOD_IN_PACKAGES)


def load_weights_only(source: Path | io.BytesIO) -> Any:
    """Return what torch's own restricted unpickler reads: files of before torch 1.6 need it.

    Raises:
        RefusedError: if torch finds a name in it that it does not trust.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load without the restriction: they are not passed on
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise RefusedError(f"it wants to use {named[1]}") from error
        raise ValueError("torch's restricted unpickler cannot read it") from error


def read(path: Path) -> tuple[Any, bool]:
    """Return what a pickle, a torch archive or a TorchScript archive holds, and whether the last.

    Its tensors are `StoredTensor`s, its objects `StandIn`s; files of torch before 1.6 have tensors.

    Raises:
        ValueError: if the file is damaged, or asks for anything that is not on the list.
    """
    try:
        return _read(path)
    except RefusedError as error:
        raise ValueError(
            f"{path} is refused: {error}, which is not on the list of harmless names in "
            "rft/clip/unpickle.py; nothing of it was run"
        ) from error
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or truncated: {_first_line(error)}") from error


def _read(path: Path) -> tuple[Any, bool]:
    with path.open("rb") as stream:
        start = stream.read(len(_OLD_TORCH))
    if start == _OLD_TORCH:
        return load_weights_only(path), False
    if not start.startswith(b"PK"):
        with path.open("rb") as stream:
            return Unpickler(stream).load(), False
    with zipfile.ZipFile(path) as archive:
        # torch names the folder inside after the file that it once wrote
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file, but not one that torch wrote")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("written on a big-endian machine")

        def read_storage(key: str) -> bytes:
            with zipfile.ZipFile(path) as again:
                return again.read(f"{folder}data/{key}")

        content = Unpickler(io.BytesIO(archive.read(pickles[0])), read_storage).load()
    return content, f"{folder}constants.pkl" in names


# torch before 1.6 began its files with a pickled number
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def named_tensors(content: Any) -> Iterator[tuple[str, StoredTensor | Tensor]]:
    """Yield the tensors of a state dict or of a module's stand-in, by dotted name."""
    if isinstance(content, StandIn):
        content = _module_state(content)
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, (StoredTensor, Tensor)):
            yield str(name), value
        elif isinstance(value, StandIn):
            for below, tensor in named_tensors(value):
                yield f"{name}.{below}", tensor


def _module_state(module: StandIn) -> dict[str, Any]:
    """Return parameters, buffers and submodules of an nn.Module; a scripted one has them flat."""
    attributes = module.attributes
    if "_modules" not in attributes:
        return dict(attributes)
    transient = attributes.get("_non_persistent_buffers_set", ())
    buffers = {k: v for k, v in attributes.get("_buffers", {}).items() if k not in transient}
    return {**attributes.get("_parameters", {}), **buffers, **attributes["_modules"]}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
