"""Reading of pickles and torch archives without running anything that they name.

A pickle is a program that calls functions by name. Here a name is handled in one of three ways. A
few names map to functions of this file, which record where a tensor's bytes are. Classes of models,
optimizers and transforms become empty stand-ins that only keep attributes; nothing is imported. All
other names are refused. Only stand-ins keep attributes. Everything else is a plain value whose
traversal no pickle can change: an OrderedDict is read as a dict. TorchScript archives are read the
same way: their tensors are used, their code is ignored.
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

# packages whose classes get a stand-in, as found in checkpoints of CLIP, wise-ft and torch
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
    "_codecs.encode",  # protocol 2 has no bytes: it encodes a string
    "argparse.Namespace",
    "collections.defaultdict",  # the state of a pickled optimizer
    "torch.Size",
    "torch.device",
    *map(str, DTYPES.values()),  # torch.float32, ...
    # old schedulers stored one of their methods, as getattr(class, name)
    "builtins.getattr",
}

LONGEST_NAME = 1000  # of a tensor, in characters
# of an archive: a checkpoint with its optimizer has four per tensor, of 2,000 tensors
MEMBERS = 30_000
DIRECTORY_BYTES = 2**23  # of an archive: its members' names and offsets
OPERATIONS = 2**21  # of a pickle; a full ViT-bigG-14 with its modules takes less than 2**19
ARGUMENTS = 20  # of a call; torch's longest has seven
STAND_INS = 1000  # different stand-in classes; a model with its transforms has fewer than 50
ENTRIES = 1_000_000  # visited in the search for tensors: modules may share their content
DEPTH = 20  # of nested lists and dicts, in a checkpoint to resume from
DIMENSIONS = 8  # of a tensor; a convolution's weight, a CLIP's largest, has four
PICKLE_BYTES = 2**26  # inside an archive, where the tensors' bytes are separate members
SHOWN = 200  # characters of a name or a reason quoted in an error

# errors that damaged or malicious pickles raise inside the unpickler
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
    """A pickle names something outside the list of allowed names."""


class StandIn:
    """Replaces any class that a pickle names: keeps attributes and does nothing."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    # a pickle calls its classes with any arguments
    def __new__(cls, *_: object, **__: object) -> Self:  # noqa: D102
        return super().__new__(cls)

    def _forget(self, *_: object) -> None:
        pass

    # for stand-ins of lists and dicts, whose content is never needed
    append = extend = __setitem__ = _forget


# immutable, so that checked values cannot change
class Storage(NamedTuple):
    """The flat memory behind tensors, which is not read yet."""

    read: Callable[[], Tensor]
    nbytes: int
    """Size given by the pickle, which the read bytes must match."""
    itemsize: int


class StoredTensor(NamedTuple):
    """Location of a tensor in a file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load_tensors(named: Mapping[str, StoredTensor], limit: int) -> dict[str, Tensor]:
    """Read tensors, each storage once.

    Args:
        named: the tensors.
        limit: maximal bytes of all storages, and of all tensors; checked before any is read.

    Raises:
        ValueError: if they exceed the limit, bytes are damaged, or a tensor exceeds its storage.
    """
    names: dict[int, list[str]] = {}  # by storage, because only one storage at a time is in memory
    stored_bytes = tensor_bytes = 0
    for name, (storage, _, size, _) in named.items():
        nbytes = math.prod(size) * storage.itemsize
        if nbytes > storage.nbytes:  # strides of 0 can expand one number to any size
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
                # a view beyond its storage raises; clone, so that the rest of the storage is freed
                loaded[name] = flat.as_strided(size, stride, offset).clone()
        except DAMAGE as error:
            raise ValueError(f"damaged tensor: {first_line(error)}") from error
    return {name: loaded[name] for name in named}


def _require_keys(keys: Iterable[Any]) -> None:
    # Keys of other types can be made to share one hash by the thousands. Hashing a tuple that
    # contains the previous tuple twice, nested sixty times, would take forever.
    for key in keys:
        # string hashes are salted; an int this small is its own hash (except -1, which has that of
        # -2)
        if type(key) is not str and not (isinstance(key, int) and abs(key) < 2**32):
            raise TypeError(f"a key of type {type(key).__name__}")


def _require_few(*parts: Any) -> None:
    # arguments are copied, and a pickle can repeat a large one in two bytes
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
    # PUT is the only opcode with a number in decimal digits, of any length
    number = int(reader.readline()[:-1])
    _require_keys([number])
    reader.memo[number] = reader.stack[-1]


def _before(code: bytes, check: Callable[[list[Any]], None]) -> Callable[[Any], None]:
    """Wrap the action of an opcode in a check of the stack."""
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
# these allocate any number of zero bytes, or use extensions registered in the process
_REFUSED = [code[0] for code in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)]

# the pickle module has no public hook before an opcode runs
_ACTIONS: dict[int, Callable[[Any], None]] = {
    **{code: act for code, act in pickle._Unpickler.dispatch.items() if code not in _REFUSED},
    **{code[0]: _before(code, check) for code, check in _CHECKS.items()},
    pickle.PUT[0]: _load_put,
    pickle.BUILD[0]: _load_build,
}


class _Counted(dict[int, Callable[[Any], None]]):
    """The actions of the opcodes, with a count of lookups: each lookup is one operation."""

    left = OPERATIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {OPERATIONS:,} operations")
        return super().__getitem__(code)


# in Python, because the C version allocates a table up to the largest memo number in a pickle
class Unpickler(pickle._Unpickler):
    """The pickle module's Unpickler, restricted to data.

    Args:
        stream: the pickle.
        read_storage: reads the bytes of an archive's storage; None outside an archive.
        nested: maximal total bytes of storages pickled inside the pickle; None if only storage
            types may be named.
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
        """Resolve a name in the pickle; see the top of this file.

        Raises:
            RefusedError: for all names that are not allowed.
        """
        # protocol 2 still writes Python 2's name
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        stood_in = full in STOOD_IN_NAMES or f"{module}.".startswith(_PREFIXES)
        if not stood_in and full not in _FUNCTIONS:
            raise RefusedError(f"it names {printable(full, SHOWN)}")
        if self._nested_left is None:
            raise RefusedError(f"it names {printable(full, SHOWN)} for a storage")
        if not stood_in:
            return _FUNCTIONS[full] or self._nested_storage
        if full not in self._stand_ins:
            if len(self._stand_ins) == STAND_INS:
                raise ValueError(f"it names more than {STAND_INS:,} classes")
            self._stand_ins[full] = type(name, (StandIn,), {})
        return self._stand_ins[full]

    def persistent_load(self, pid: Any) -> Storage:
        """Resolve a storage of the archive, which the pickle names by key, type and length."""
        _require_few(pid)
        kind, dtype, key, _, length, *view = pid  # the old format can have views of storages
        known = isinstance(dtype, torch.dtype) and isinstance(key, str) and _is_size(length)
        if kind != "storage" or view not in ([], [None]) or not known or not self._read_storage:
            raise RefusedError("it names an entry of the archive that is not a storage")
        # one object for all of its tensors, so that `load_tensors` reads it once
        if (key, dtype) in self._storages:
            return self._storages[key, dtype]
        read, nbytes = self._read_storage, length * dtype.itemsize
        self.itemsizes[key] = dtype.itemsize

        def flat() -> Tensor:
            data = read(key)
            if len(data) != nbytes:
                raise ValueError(f"storage {printable(key, SHOWN)} has {len(data)} bytes")
            if not data:  # frombuffer refuses an empty buffer
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(
                bytearray(data), dtype=dtype
            )  # writable, because torch warns of read-only bytes

        return self._storages.setdefault((key, dtype), Storage(flat, nbytes, dtype.itemsize))

    def _nested_storage(self, data: bytes) -> Storage:
        """Read a storage that was pickled as a separate file, in torch's old format."""
        assert self._nested_left is not None
        self._nested_left -= len(data)
        if self._nested_left < 0:
            raise ValueError("its storages are larger than the file")
        # None: a nested storage must not contain another one
        storage = _read_old(lambda: io.BytesIO(data), None)
        if not isinstance(storage, Storage):
            raise TypeError(f"a storage of {type(storage).__name__}")
        return storage


def _is_size(value: object) -> bool:
    # not a bool; no file has more numbers, and torch's own arithmetic checks for overflow
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
    # returned as it is, because a set would copy a list that the pickle can repeat in two bytes
    "builtins.set": lambda items=(): items,
    "builtins.frozenset": lambda items=(): items,
}
_PREFIXES = tuple(f"{package}." for package in STOOD_IN_PACKAGES)


def read(path: Path) -> tuple[Any, bool]:
    """Read a pickle, a torch archive or a TorchScript archive; and whether it is TorchScript.

    Tensors are returned as `StoredTensor`s, objects as `StandIn`s.

    Raises:
        ValueError: if the file is damaged, or names anything outside the list of allowed names.
    """
    files.require_file(path, "weights")
    try:
        return _read(path)
    except RefusedError as error:
        raise ValueError(
            f"{path} is refused: {error}, which is not an allowed name; nothing in the file was "
            "run (docs/security.md)"
        ) from error
    except (*DAMAGE, OSError) as error:
        # an error without a file name comes from a seek before the file's start
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
            # a plain pickle of tensors, such as wise-ft's, contains a torch file per storage
            return Unpickler(stream, nested=size).load(), False
    # stays open as long as storages may be read from it
    archive = Archive(local.reader(path))
    names = archive.namelist()
    if len(names) > MEMBERS:
        raise ValueError(f"it has {len(names):,} members; a checkpoint has at most {MEMBERS:,}")
    if len(set(names)) != len(names):
        raise ValueError("it has two members with the same name")
    # the folder inside has the name of the file that torch wrote, which may have been renamed since
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
    # only torch.jit.save writes constants, and always does
    return content, f"{folder}constants.pkl" in names


class Archive(zipfile.ZipFile):
    """A zip archive with a bounded directory, which closes its stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        require_small_directory(stream, DIRECTORY_BYTES)
        super().__init__(stream)

    def close(self) -> None:
        """Close the archive and its stream; also called on garbage collection."""
        super().close()
        self._stream.close()


def _read_old(source: Callable[[], BinaryIO], nested: int | None) -> Any:
    """Read torch's format before 1.6: consecutive pickles, then the bytes of the storages."""
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
            # the file stores the length in items
            size = int.from_bytes(stream.read(8), "little") * reader.itemsizes[key]
            places[key] = stream.tell(), size
            stream.seek(size, io.SEEK_CUR)
        # seeking beyond the end of a file is not an error
        if stream.tell() != stream.seek(0, io.SEEK_END):
            raise EOFError("storages are missing")
    return content


def _read_entry(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info, shown = archive.getinfo(name), printable(name, SHOWN)
    # torch does not compress; a few compressed bytes could expand to any size
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{shown} is compressed, which torch never does")
    if not info.file_size == info.compress_size <= limit:
        raise ValueError(f"{shown} has {info.file_size:,} bytes, more than allowed")
    return archive.read(info)


# files of torch before 1.6 begin with this pickled number
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def require_data(content: Any) -> None:
    """Check that a pickle has only numbers, strings, lists, dicts and tensors, and not too many.

    Lists that each contain the previous one twice, nested thirty times, are small only in the file.

    Raises:
        ValueError: if there are too many, counting characters, or it has anything else.
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
            raise ValueError(f"it has more than {ENTRIES:,} entries, or more than {DEPTH} levels")
        rows += [(part, depth + 1) for part in parts]


def named_tensors(content: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of a state dict or of a module's stand-in, with dotted names.

    A shared module is visited once: otherwise each level of modules that contain the next one twice
    would double the number of names.

    Raises:
        ValueError: for an impossible name, or more entries than any model has.
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
                raise ValueError(f"damaged: it has more than {ENTRIES:,} entries")
            skipped = {name for name in hidden if isinstance(name, str)}
            for key, value in group.items():
                if not isinstance(value, (StandIn, StoredTensor)) or key in skipped:
                    continue
                if not isinstance(key, str) or len(prefix) + len(key) > LONGEST_NAME:
                    raise ValueError("damaged: a tensor or module has an impossible name")
                if isinstance(value, StandIn):
                    inner.append((f"{prefix}{key}.", value))
                else:
                    yield f"{prefix}{key}", value
        # a stack, reversed so that the first submodule comes next, as in a state dict
        rows += reversed(inner)


def _groups(holder: Any) -> Iterator[tuple[Mapping[Any, Any], Collection[Any]]]:
    """Yield the mappings of a state dict or module that may have tensors, with unsaved names.

    For an nn.Module these are parameters, buffers and submodules; a scripted one has them flat.
    """
    own = holder.attributes if isinstance(holder, StandIn) else holder
    found: list[tuple[Any, Any]] = [(own, ())]
    if isinstance(holder, StandIn) and "_modules" in own:
        hidden = own.get("_non_persistent_buffers_set", ())
        found = [(own.get("_parameters"), ()), (own.get("_buffers"), hidden), (own["_modules"], ())]
    yield from (group for group in found if isinstance(group[0], Mapping))


def first_line(error: BaseException) -> str:
    """Shorten an error to the first line of its message, or its type."""
    if isinstance(error, KeyError):
        # a KeyError's message is only its key
        return f"it refers to {printable(str(error), SHOWN)}, which does not exist"
    lines = str(error).strip().splitlines()
    return printable(lines[0], SHOWN) if lines else type(error).__name__
