"""Reads what a pickle or a torch archive holds without running anything that it names.

A pickle is a program that calls what it names. Here a name is one of three things: a function of
this file that notes where a tensor's bytes lie; a class of a model, an optimizer or a transform,
for which an empty stand-in is made that only keeps attributes (nothing is imported); or refused.
TorchScript archives are read the same way: their tensors are taken, their code is not looked at.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar, Self

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

LONGEST_NAME = 1000  # of a tensor, in characters

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
            ValueError: if its bytes are damaged, it reaches outside of its storage, or is larger.
        """
        try:
            flat = self.storage.read()
            view = flat.as_strided(self.size, self.stride, self.offset)
            # strides of 0 make any size out of one number
            if math.prod(self.size) > len(flat):
                raise ValueError("it is larger than its storage")
            return view.clone()
        except DAMAGE as error:
            raise ValueError(f"damaged tensor: {first_line(error)}") from error


class Callee:
    """A function that a pickle may call.

    Not the function itself, nor a method: a pickle can set attributes of what it has in hand, and
    those of a function stay for as long as the process runs.
    """

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:  # noqa: D102
        return self._function(*arguments)

    def __setattr__(self, name: str, _: object) -> None:
        raise AttributeError(f"a pickle sets {name!r} of a function")


class Row(tuple):
    """A tuple that is no key: a tuple of tuples of ... takes for ever to hash, or all the stack."""

    __slots__ = ()
    __hash__ = None


def _row(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def load_row(reader: Any) -> None:
        load(reader)
        reader.stack[-1] = Row(reader.stack[-1])

    return load_row


_TUPLES = [code[0] for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)]
# these make as many zero bytes as they say, or use what is registered in the process
_REFUSED = [code[0] for code in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)]


# the one in C makes a table as large as the largest number that a pickle gives to an object
class Unpickler(pickle._Unpickler):
    """A pickle module's Unpickler that can make nothing but data.

    Args:
        stream: the pickle.
        read_storage: returns the bytes of an archive's storage; None outside of an archive.
    """

    dispatch: ClassVar = {
        **{code: act for code, act in pickle._Unpickler.dispatch.items() if code not in _REFUSED},
        **{code: _row(pickle._Unpickler.dispatch[code]) for code in _TUPLES},
    }

    def __init__(
        self, stream: BinaryIO, read_storage: Callable[[str], bytes] | None = None
    ) -> None:
        super().__init__(stream)
        self._read_storage = read_storage
        self._stand_ins: dict[str, type[StandIn]] = {}
        self.itemsizes: dict[str, int] = {}  # of the storages that were named

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle means by a name; see the top of this file.

        Raises:
            RefusedError: for every other name.
        """
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if full in _CALLEES:
            return _CALLEES[full]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in STOOD_IN_NAMES or f"{module}.".startswith(_PREFIXES):
            if full not in self._stand_ins:
                self._stand_ins[full] = type(name, (StandIn,), {})
            return self._stand_ins[full]
        raise RefusedError(f"it wants to use {full}")

    def persistent_load(self, pid: Any) -> Storage:
        """Return a storage of the archive; the pickle names it by key, type and length."""
        kind, dtype, key, _, length, *view = pid  # the old format has views of storages
        known = isinstance(dtype, torch.dtype) and isinstance(key, str) and isinstance(length, int)
        if kind != "storage" or view not in ([], [None]) or not known or not self._read_storage:
            raise RefusedError("it wants to use something of the archive that is no storage")
        read = self._read_storage
        self.itemsizes[key] = dtype.itemsize

        def flat() -> Tensor:
            data = read(key)
            if len(data) != length * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(data)} bytes")
            return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0)

        return Storage(flat)


class StorageUnpickler(Unpickler):
    """The same for a nested storage: nothing but storages, above all none that is nested again."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the type of a storage.

        Raises:
            RefusedError: for every other name.
        """
        found = super().find_class(module, name)
        if not isinstance(found, torch.dtype):
            raise RefusedError(f"it wants to use {module}.{name} for a storage")
        return found


def _rebuild_tensor(storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise TypeError(f"a tensor of {type(storage).__name__}")
    return StoredTensor(storage, offset, size, stride)


def _rebuild_parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _nested_storage(data: bytes) -> Storage:
    """Read a storage that was pickled as a file of its own, in torch's old format."""
    storage = _read_old(lambda: io.BytesIO(data), StorageUnpickler)
    if not isinstance(storage, Storage):
        raise TypeError(f"a storage of {type(storage).__name__}")
    return storage


def _items(items: Any = ()) -> Any:
    # a set would be a copy, as large as a list that the pickle names again in two bytes
    return items


_CALLEES = {
    "torch._utils._rebuild_tensor_v2": Callee(_rebuild_tensor),
    "torch._utils._rebuild_parameter": Callee(_rebuild_parameter),
    "torch.storage._load_from_bytes": Callee(_nested_storage),
    "collections.OrderedDict": Callee(lambda: OrderedDict()),
    "builtins.set": Callee(_items),
    "builtins.frozenset": Callee(_items),
}
_PREFIXES = tuple(f"{package}." for package in STOOD_IN_PACKAGES)


def read(path: Path) -> tuple[Any, bool]:
    """Return what a pickle, a torch archive or a TorchScript archive holds, and whether the last.

    Its tensors are `StoredTensor`s, its objects `StandIn`s.

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
        raise ValueError(f"{path} is damaged or truncated: {first_line(error)}") from error


def _read(path: Path) -> tuple[Any, bool]:
    with path.open("rb") as stream:
        start = stream.read(len(_OLD_TORCH))
    if start == _OLD_TORCH:
        return _read_old(lambda: path.open("rb"), Unpickler), False
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
        if order in names and _read_entry(archive, order) != b"little":
            raise ValueError("written on a big-endian machine")

        def read_storage(key: str) -> bytes:
            with zipfile.ZipFile(path) as again:
                return _read_entry(again, f"{folder}data/{key}")

        content = Unpickler(io.BytesIO(_read_entry(archive, pickles[0])), read_storage).load()
    return content, f"{folder}constants.pkl" in names


def _read_old(source: Callable[[], BinaryIO], kind: type[Unpickler]) -> Any:
    """Read torch's format of before 1.6: pickles one after the other, then the storages' bytes."""
    places: dict[str, tuple[int, int]] = {}

    def read_storage(key: str) -> bytes:
        offset, size = places[key]
        with source() as stream:
            stream.seek(offset)
            return stream.read(size)

    with source() as stream:
        for _ in range(3):  # a magic number, the format's version, the machine's type sizes
            kind(stream).load()
        reader = kind(stream, read_storage)
        content = reader.load()
        for key in kind(stream).load():
            size = int.from_bytes(stream.read(8), "little") * reader.itemsizes[key]
            places[key] = stream.tell(), size
            stream.seek(size, io.SEEK_CUR)
        if stream.tell() != stream.seek(0, io.SEEK_END):
            raise EOFError("storages are missing")
    return content


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch compresses none of these; a few compressed bytes can become any number
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch does not do")
    return archive.read(name)


# torch before 1.6 began its files with a pickled number
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def named_tensors(content: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of a state dict or of a module's stand-in, by dotted name.

    A module that is held twice is named once: of modules that hold the next one twice, each would
    double the number of names.

    Raises:
        ValueError: for a name that no module has.
    """
    yield from _named_tensors(content, "", set())


def _named_tensors(content: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    if id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, StandIn):
        content = _module_state(content)
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if not isinstance(value, (StandIn, StoredTensor)):
            continue
        if not isinstance(key, str) or len(prefix) + len(key) > LONGEST_NAME:
            raise ValueError("damaged: a tensor or module has a name that none has")
        if isinstance(value, StandIn):
            yield from _named_tensors(value, f"{prefix}{key}.", seen)
        else:
            yield f"{prefix}{key}", value


def _module_state(module: StandIn) -> dict[str, Any]:
    """Return parameters, buffers and submodules of an nn.Module; a scripted one has them flat."""
    attributes = module.attributes
    if "_modules" not in attributes:
        return dict(attributes)
    transient = attributes.get("_non_persistent_buffers_set", ())
    buffers = {k: v for k, v in attributes.get("_buffers", {}).items() if k not in transient}
    return {**attributes.get("_parameters", {}), **buffers, **attributes["_modules"]}


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
