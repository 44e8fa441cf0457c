"""Reads what a pickle or a torch archive holds without running anything that it names.

A pickle is a program that calls what it names. Here a name is one of three things: a function of
this file that notes where a tensor's bytes lie; a class of a model, an optimizer or a transform,
for which an empty stand-in is made that only keeps attributes (nothing is imported); or refused.
Attributes are kept by stand-ins alone. All else that comes out is a plain value, of which no pickle
can change how it is looked through: an OrderedDict is read as a dict.
TorchScript archives are read the same way: their tensors are taken, their code is not looked at.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from rft.storage import files, local
from rft.storage.zips import require_small_directory
from rft.text import printable

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
    "__torch__",  # of a TorchScript archive
    "clip",  # OpenAI's package
    "numpy",
    "open_clip",
    "src",  # wise-ft's package
    "torch.jit._pickle",  # the lists of a TorchScript archive
    "torch.nn",
    "torch.optim",
    "torchvision.transforms",
)
STOOD_IN_NAMES = {
    "_codecs.encode",  # protocol 2 has no bytes: a text is encoded
    "argparse.Namespace",
    "collections.defaultdict",  # the state of a pickled optimizer
    "torch.Size",
    "torch.device",
    *map(str, DTYPES.values()),  # torch.float32, ...
    # old schedulers kept a function of theirs, written as getattr(class, name)
    "builtins.getattr",
}

LONGEST_NAME = 1000  # of a tensor, in characters
# of an archive: a checkpoint with its optimizer has four for each of 2,000 tensors
MEMBERS = 30_000
DIRECTORY_BYTES = 2**23  # of an archive: its members' names and offsets
OPERATIONS = 2**21  # of a pickle; a whole ViT-bigG-14 with its modules takes less than 2**19
ARGUMENTS = 20  # of a call; torch's longest has seven
STAND_INS = 1000  # classes that are stood in for; a model with its transforms has fewer than 50
ENTRIES = 1_000_000  # looked through for tensors: modules may share what they hold
DEPTH = 20  # of lists and dicts in each other, in a checkpoint to resume from
DIMENSIONS = 8  # of a tensor; a convolution's weight, a CLIP's largest, has four
PICKLE_BYTES = 2**26  # inside an archive, where the tensors' bytes are members of their own
SHOWN = 200  # characters of a name or a reason that an error repeats

# what damage, or a pickle made to confuse, raises inside the unpickler
DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


class RefusedError(ValueError):
    """A pickle names something that is not on the list."""


class StandIn:
    """Takes the place of any class a pickle names: keeps attributes, does nothing."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    # a pickle calls its classes with any arguments
    def __new__(cls, *_: object, **__: object) -> Self:  # noqa: D102
        return super().__new__(cls)

    def _forget(self, *_: object) -> None:
        pass

    # of stand-ins of lists and dicts, whose content is never wanted
    append = extend = __setitem__ = _forget


# tuples, so that what was checked stays as it is
class Storage(NamedTuple):
    """The flat memory that tensors are views of, not read yet."""

    read: Callable[[], Tensor]
    nbytes: int
    """As the pickle gives it; the bytes that are read must be as many."""
    itemsize: int


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load_tensors(named: Mapping[str, StoredTensor], limit: int) -> dict[str, Tensor]:
    """Read tensors, each storage once.

    Args:
        named: the tensors.
        limit: bytes that all storages, and all tensors, may have; compared before any is read.

    Raises:
        ValueError: if they have more, bytes are damaged, or a tensor reaches outside of its
            storage.
    """
    names: dict[int, list[str]] = {}  # by storage, of which one at a time is in memory
    stored_bytes = tensor_bytes = 0
    for name, (storage, _, size, _) in named.items():
        nbytes = math.prod(size) * storage.itemsize
        if nbytes > storage.nbytes:  # strides of 0 make any size of one number
            raise ValueError("damaged tensor: it is larger than its storage")
        tensor_bytes += nbytes
        if id(storage) not in names:
            stored_bytes += storage.nbytes
        names.setdefault(id(storage), []).append(name)
    if max(tensor_bytes, stored_bytes) > limit:
        raise ValueError("damaged: its tensors are larger than the file")
    loaded: dict[str, Tensor] = {}
    for group in names.values():
        try:
            flat = named[group[0]].storage.read()
            for name in group:
                _, offset, size, stride = named[name]
                # a view beyond its storage raises; a copy does not keep the rest of it in memory
                loaded[name] = flat.as_strided(size, stride, offset).clone()
        except DAMAGE as error:
            raise ValueError(f"damaged tensor: {first_line(error)}") from error
    return {name: loaded[name] for name in named}


def _require_keys(keys: Iterable[Any]) -> None:
    # of other types, thousands of unequal keys can have one hash; that of a tuple of the tuple
    # before, twice, sixty times over, takes for ever
    for key in keys:
        # the hash of a text has a secret; an int this small is its own hash (-1 has that of -2)
        if type(key) is not str and not (isinstance(key, int) and abs(key) < 2**32):
            raise TypeError(f"a key of type {type(key).__name__}")


def _require_few(*parts: Any) -> None:
    # each is copied, and a pickle can name a large one again in two bytes
    if any(len(part) > ARGUMENTS for part in parts if part is not None):
        raise ValueError(f"more than {ARGUMENTS} arguments")


def _load_build(reader: Any) -> None:
    state, made = reader.stack.pop(), reader.stack[-1]
    if isinstance(made, StandIn):
        # an object with slots is pickled as (attributes, slots)
        state = state[0] if isinstance(state, tuple) and state else state
        made.attributes = state if isinstance(state, dict) else {}
    elif type(made) is not dict:  # torch's state dicts carry versions of their modules
        raise TypeError(f"a pickle sets attributes of a {type(made).__name__}")


def _load_put(reader: Any) -> None:
    # PUT is the one that gives a number in digits, of any length
    number = int(reader.readline()[:-1])
    _require_keys([number])
    reader.memo[number] = reader.stack[-1]


def _before(code: bytes, check: Callable[[list[Any]], None]) -> Callable[[Any], None]:
    """Return the action of an opcode that looks at the stack first."""
    act = pickle._Unpickler.dispatch[code[0]]

    def load(reader: Any) -> None:
        check(reader.stack)
        act(reader)

    return load


_CHECKS: dict[bytes, Callable[[list[Any]], None]] = {
    pickle.SETITEM: lambda stack: _require_keys(stack[-2:-1]),
    pickle.SETITEMS: lambda stack: _require_keys(stack[::2]),
    pickle.DICT: lambda stack: _require_keys(stack[::2]),
    pickle.ADDITEMS: _require_keys,
    pickle.FROZENSET: _require_keys,
    pickle.REDUCE: lambda stack: _require_few(stack[-1]),
    pickle.NEWOBJ: lambda stack: _require_few(stack[-1]),
    pickle.NEWOBJ_EX: lambda stack: _require_few(*stack[-2:]),
}
# these make as many zero bytes as they say, or use what is registered in the process
_REFUSED = [code[0] for code in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)]

# the pickle module has no public way to look at an opcode before it runs
_ACTIONS: dict[int, Callable[[Any], None]] = {
    **{code: act for code, act in pickle._Unpickler.dispatch.items() if code not in _REFUSED},
    **{code[0]: _before(code, check) for code, check in _CHECKS.items()},
    pickle.PUT[0]: _load_put,
    pickle.BUILD[0]: _load_build,
}


class _Counted(dict[int, Callable[[Any], None]]):
    """The actions of the opcodes; each that is looked up is one that runs."""

    left = OPERATIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {OPERATIONS:,} operations")
        return super().__getitem__(code)


# the one in C makes a table as large as the largest number that a pickle gives to an object
class Unpickler(pickle._Unpickler):
    """A pickle module's Unpickler that can make nothing but data.

    Args:
        stream: the pickle.
        read_storage: returns the bytes of an archive's storage; None outside of an archive.
        nested: bytes that storages which are pickled inside of the pickle may have, all together;
            None where nothing but types of storages may be named.
    """

    def __init__(
        self,
        stream: BinaryIO,
        read_storage: Callable[[str], bytes] | None = None,
        nested: int | None = 0,
    ) -> None:
        super().__init__(stream)
        self.dispatch = _Counted(_ACTIONS)  # pyrefly: ignore[read-only]
        self._read_storage = read_storage
        self._nested_left = nested
        self._stand_ins: dict[str, type[StandIn]] = {}
        self._storages: dict[tuple[str, torch.dtype], Storage] = {}
        self.itemsizes: dict[str, int] = {}  # of the storages that were named

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle means by a name; see the top of this file.

        Raises:
            RefusedError: for every other name.
        """
        # Python 2's name, which protocol 2 writes still
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        stood_in = full in STOOD_IN_NAMES or f"{module}.".startswith(_PREFIXES)
        if not stood_in and full not in _FUNCTIONS:
            raise RefusedError(f"it wants to use {printable(full, SHOWN)}")
        if self._nested_left is None:
            raise RefusedError(f"it wants to use {printable(full, SHOWN)} for a storage")
        if not stood_in:
            return _FUNCTIONS[full] or self._nested_storage
        if full not in self._stand_ins:
            if len(self._stand_ins) == STAND_INS:
                raise ValueError(f"it names more than {STAND_INS:,} classes")
            self._stand_ins[full] = type(name, (StandIn,), {})
        return self._stand_ins[full]

    def persistent_load(self, pid: Any) -> Storage:
        """Return a storage of the archive; the pickle names it by key, type and length."""
        _require_few(pid)
        kind, dtype, key, _, length, *view = pid  # the old format has views of storages
        known = isinstance(dtype, torch.dtype) and isinstance(key, str) and _is_size(length)
        if kind != "storage" or view not in ([], [None]) or not known or not self._read_storage:
            raise RefusedError("it wants to use something of the archive that is no storage")
        # one for all of its tensors: `load_tensors` reads each once
        if (key, dtype) in self._storages:
            return self._storages[key, dtype]
        read, nbytes = self._read_storage, length * dtype.itemsize
        self.itemsizes[key] = dtype.itemsize

        def flat() -> Tensor:
            data = read(key)
            if len(data) != nbytes:
                raise ValueError(f"storage {printable(key, SHOWN)} has {len(data)} bytes")
            # frombuffer warns of memory that is read-only, and refuses an empty one
            return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0)

        return self._storages.setdefault((key, dtype), Storage(flat, nbytes, dtype.itemsize))

    def _nested_storage(self, data: bytes) -> Storage:
        """Read a storage that was pickled as a file of its own, in torch's old format."""
        assert self._nested_left is not None
        self._nested_left -= len(data)
        if self._nested_left < 0:
            raise ValueError("its storages are larger than the file")
        # None: what is nested in a storage may not nest another one
        storage = _read_old(lambda: io.BytesIO(data), None)
        if not isinstance(storage, Storage):
            raise TypeError(f"a storage of {type(storage).__name__}")
        return storage


def _is_size(value: object) -> bool:
    # no bool; no file has as many numbers, and torch's own arithmetic checks for overflow
    return type(value) is int and 0 <= value < 2**48


def _rebuild_tensor(storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise TypeError(f"a tensor of {type(storage).__name__}")
    for numbers in ((offset,), size, stride):
        if not isinstance(numbers, tuple) or len(numbers) > DIMENSIONS:
            raise ValueError(f"damaged tensor: it has no shape of {DIMENSIONS} numbers or fewer")
        if not all(map(_is_size, numbers)):
            raise ValueError("damaged tensor: a number of its shape is out of range")
    return StoredTensor(storage, offset, tuple(size), tuple(stride))


_FUNCTIONS: dict[str, Callable[..., Any] | None] = {
    "torch.storage._load_from_bytes": None,  # a method of the unpickler
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": lambda: {},
    # a set would be a copy, as large as a list that the pickle names again in two bytes
    "builtins.set": lambda items=(): items,
    "builtins.frozenset": lambda items=(): items,
}
_PREFIXES = tuple(f"{package}." for package in STOOD_IN_PACKAGES)


def read(path: Path) -> tuple[Any, bool]:
    """Return what a pickle, a torch archive or a TorchScript archive holds, and whether the last.

    Its tensors are `StoredTensor`s, its objects `StandIn`s.

    Raises:
        ValueError: if the file is damaged, or names anything that is not on the list.
    """
    files.require_file(path, "weights")
    try:
        return _read(path)
    except RefusedError as error:
        raise ValueError(
            f"{path} is refused: {error}, which is not on the list of harmless names in "
            "rft/clip/unpickle.py; nothing of it was run"
        ) from error
    except (*DAMAGE, OSError) as error:
        # without a name it is of an offset before the file's start
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} is damaged or truncated: {first_line(error)}") from error


def _read(path: Path) -> tuple[Any, bool]:
    with local.reader(path) as stream:
        start = stream.read(len(_OLD_TORCH))
        size = stream.seek(0, io.SEEK_END)
    if start == _OLD_TORCH:
        return _read_old(lambda: local.reader(path), size), False
    if not start.startswith(b"PK"):
        with local.reader(path) as stream:
            # a plain pickle of tensors, such as wise-ft's, holds a file of torch for each storage
            return Unpickler(stream, nested=size).load(), False
    # stays open for as long as a storage may be read from it
    archive = Archive(local.reader(path))
    names = archive.namelist()
    if len(names) > MEMBERS:
        raise ValueError(f"it has {len(names):,} members; a checkpoint has {MEMBERS:,} at most")
    if len(set(names)) != len(names):
        raise ValueError("it has two members of one name")
    # torch names the folder inside after the file that it once wrote
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip file, but not one that torch wrote")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in names and _read_entry(archive, order, 100) != b"little":
        raise ValueError("written on a big-endian machine")

    def read_storage(key: str) -> bytes:
        return _read_entry(archive, f"{folder}data/{key}", size)

    program = _read_entry(archive, pickles[0], min(size, PICKLE_BYTES))
    content = Unpickler(io.BytesIO(program), read_storage, size).load()
    # torch.save writes no constants, torch.jit.save always does
    return content, f"{folder}constants.pkl" in names


class Archive(zipfile.ZipFile):
    """A zip archive whose directory is small; it closes the stream that it was given."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        require_small_directory(stream, DIRECTORY_BYTES)
        super().__init__(stream)

    def close(self) -> None:
        """Let go of the file, as is done when the archive is not referred to any more."""
        super().close()
        self._stream.close()


def _read_old(source: Callable[[], BinaryIO], nested: int | None) -> Any:
    """Read torch's format of before 1.6: pickles one after the other, then the storages' bytes."""
    places: dict[str, tuple[int, int]] = {}

    def read_storage(key: str) -> bytes:
        offset, size = places[key]
        with source() as stream:
            stream.seek(offset)
            return stream.read(size)

    with source() as stream:
        for _ in range(3):  # a magic number, the format's version, the machine's type sizes
            Unpickler(stream, nested=None).load()
        reader = Unpickler(stream, read_storage, nested)
        content = reader.load()
        for key in Unpickler(stream, nested=None).load():
            # the file gives the length in items
            size = int.from_bytes(stream.read(8), "little") * reader.itemsizes[key]
            places[key] = stream.tell(), size
            stream.seek(size, io.SEEK_CUR)
        # seek goes beyond the end of a file without an error
        if stream.tell() != stream.seek(0, io.SEEK_END):
            raise EOFError("storages are missing")
    return content


def _read_entry(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info, shown = archive.getinfo(name), printable(name, SHOWN)
    # torch compresses none of these; a few compressed bytes can become any number
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{shown} is compressed, which torch does not do")
    if not info.file_size == info.compress_size <= limit:
        raise ValueError(f"{shown} has {info.file_size:,} bytes, more than it can have")
    return archive.read(info)


# torch before 1.6 began its files with a pickled number
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def require_data(content: Any) -> None:
    """Check that a pickle holds numbers, texts, lists, dicts and tensors, and few enough to print.

    A list that holds the one before it twice, thirty times over, is small in the file only.

    Raises:
        ValueError: if there are too many, letters counted, or it holds anything else.
    """
    left = ENTRIES
    rows = [(content, 0)]
    while rows:
        value, depth = rows.pop()
        int64 = isinstance(value, int) and -(2**63) <= value < 2**63
        if value is None or int64 or isinstance(value, StoredTensor | float | str):
            parts = []
        elif isinstance(value, dict):
            parts = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            parts = list(value)
        else:
            raise ValueError(f"it holds a {printable(type(value).__name__, SHOWN)}")
        left -= len(value) if isinstance(value, str) else max(1, len(parts))
        if left < 0 or depth > DEPTH:
            raise ValueError(f"it holds more than {ENTRIES:,} things, or more than {DEPTH} deep")
        rows += [(part, depth + 1) for part in parts]


def named_tensors(content: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of a state dict or of a module's stand-in, by dotted name.

    A module that is held twice is named once: of modules that hold the next one twice, each would
    double the number of names.

    Raises:
        ValueError: for a name that no module has, or more entries than any model has.
    """
    seen: set[int] = set()
    left = ENTRIES
    rows = [("", content)]
    while rows:
        prefix, holder = rows.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        inner = []
        for group, hidden in _groups(holder):
            left -= len(group) + len(hidden)
            if left < 0:
                raise ValueError(f"damaged: it holds more than {ENTRIES:,} things")
            skipped = {name for name in hidden if isinstance(name, str)}
            for key, value in group.items():
                if not isinstance(value, (StandIn, StoredTensor)) or key in skipped:
                    continue
                if not isinstance(key, str) or len(prefix) + len(key) > LONGEST_NAME:
                    raise ValueError("damaged: a tensor or module has a name that none has")
                if isinstance(value, StandIn):
                    inner.append((f"{prefix}{key}.", value))
                else:
                    yield f"{prefix}{key}", value
        # a stack: the first submodule comes next, which is the order of a state dict
        rows += reversed(inner)


def _groups(holder: Any) -> Iterator[tuple[Mapping[Any, Any], Collection[Any]]]:
    """Yield what a state dict or module may hold tensors in, and which names are not saved.

    That is parameters, buffers and submodules of an nn.Module; a scripted one has them flat.
    """
    own = holder.attributes if isinstance(holder, StandIn) else holder
    found: list[tuple[Any, Any]] = [(own, ())]
    if isinstance(holder, StandIn) and "_modules" in own:
        hidden = own.get("_non_persistent_buffers_set", ())
        found = [(own.get("_parameters"), ()), (own.get("_buffers"), hidden), (own["_modules"], ())]
    yield from (group for group in found if isinstance(group[0], Mapping))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind."""
    if isinstance(error, KeyError):
        # a KeyError's text is its key alone
        return f"it refers to {printable(str(error), SHOWN)}, which is not there"
    lines = str(error).strip().splitlines()
    return printable(lines[0], SHOWN) if lines else type(error).__name__
