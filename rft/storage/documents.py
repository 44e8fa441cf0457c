"""Untrusted JSON documents, read as the dataclasses that the code works with.

`document` makes a dataclass that checks its fields on creation, from Python and from JSON: a wrong
type, an unknown field or choice, and a number that is out of range or not finite are errors.
`decode` reads one from a file's bytes. Annotations define the allowed values, with the types below.
Errors are one line: file, position in it, value and expectation. No torch.
"""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic_core
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from pydantic import ValidationError as PydanticError
from pydantic.dataclasses import dataclass as checked
from pydantic_core import ErrorDetails

from rft.text import is_hidden, short

T = TypeVar("T")

# strict: no number from a text, no 1 from true; unknown fields may be misspelt options
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
# for files of other rft versions or other programs, which may have more fields
FOREIGN = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
# of a document: each takes some hundred bytes of memory; a manifest of 100,000 shards has 500,000
VALUES = 1_000_000
EXPLAINED = 10_000  # faults that are searched for the first one: pydantic lists them all
# pydantic's two names for an unknown field: in a dataclass, in a TypedDict
SURPLUS = {"unexpected_keyword_argument", "extra_forbidden"}
UNKNOWN = {*SURPLUS, "literal_error", "union_tag_invalid"}  # a newer version may have written these
# JSON's terms in place of Python's
OBJECTS = {
    "dataclass_type": "must be an object",
    "dict_type": "must be an object",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "too_short": "must have {min_length} or more elements",
    "too_long": "must have at most {max_length} elements",
}
MISSING = {"missing", "missing_argument"}  # the latter for a NamedTuple, in older pydantic


def _printable(text: str) -> str:
    if any(map(is_hidden, text)):
        raise ValueError("must have no control characters, line breaks or invisible letters")
    return text


def _sha256(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("must be 64 hex digits")
    return text


def _schema(number: int) -> int:
    if number != 1:
        raise ValueError("must be 1; a file of a newer version needs a newer rft")
    return number


def _part(number: float) -> float:
    # one text for both bounds: a share of 1 and one of 2 are the same mistake
    if not 0 < number < 1:
        raise ValueError("must be above 0 and below 1, such as 0.2")
    return number


Schema = Annotated[int, AfterValidator(_schema)]
"""Version of a document; not a Literal, because `Literal[1]` accepts true."""
Sha256 = Annotated[str, AfterValidator(_sha256)]
"""A hash as hashlib writes it; a file may be named after it."""
Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of items or bytes, up to the largest whole number on which all JSON readers agree."""
Whole = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
BatchSize = Annotated[int, Field(gt=0, le=1_000_000)]
Epochs = Annotated[int, Field(ge=0, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Range that NumPy and scikit-learn accept as well."""
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, AfterValidator(_part)]
"""A share that leaves neither side empty."""
Beta = Annotated[float, Field(ge=0, lt=1)]
From0 = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Megapixels = Annotated[float, Field(gt=0, lt=1e6)]
Name = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_printable)]
"""A text to print, or a name; any terminal can show it."""
Text = Annotated[str, Field(max_length=100_000)]
"""A text for a model or a message; it may have several lines."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def document(cls: type[T] | None = None, /, *, name: str = "", config: ConfigDict = STRICT) -> Any:
    """Make a frozen, keyword-only dataclass whose fields are checked on creation.

    `name` precedes a field in errors raised from Python: "--" for the options of a command. With
    `FOREIGN` as pydantic's `config`, unknown fields are ignored.
    """
    if cls is None:
        return functools.partial(document, name=name, config=config)
    made: Any = checked(cls, frozen=True, kw_only=True, config=config)
    # for callers in Python: pydantic reads JSON without __init__, and `typed` words those errors
    check: Callable[..., None] = made.__init__

    @functools.wraps(check)
    def init(self: T, **values: Any) -> None:
        try:
            check(self, **values)
        except PydanticError as error:
            raise ValueError(explain(error, (name,) if name else ())) from error

    made.__init__ = init
    return made


def parse(data: bytes, where: str, *, nan: bool = False, values: int = VALUES) -> Any:
    """Parse any JSON document into Python objects; `where` is its file, for messages.

    `nan` admits NaN and infinities. The bound on `values` is a bound on memory.

    Raises:
        ValueError: if it is not JSON (which has no NaN and no lone surrogates), is nested too
            deeply, holds too many values, or repeats a field of an object.
    """
    # counted before parsing, so commas inside texts count too
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > values:
        raise ValueError(f"{where} holds more than {values:,} values, too many for this file")
    try:
        # parsed twice: json finds repeated fields, pydantic_core refuses NaN and lone surrogates
        json.loads(data, object_pairs_hook=_unique)
        return pydantic_core.from_json(data, allow_inf_nan=nan)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {str(error).splitlines()[0]}") from error


def decode(data: bytes, kind: Callable[..., T] | Any, where: str, *, values: int = VALUES) -> T:
    """Read JSON as a typed document; `where` and `values` are those of `parse`.

    The type is a class made by `document`, or any that pydantic checks.

    Raises:
        ValueError: with position and expectation, if it does not match the type.
    """
    parse(data, where, values=values)
    return typed(data, kind, where)


def typed(data: bytes, kind: Callable[..., T] | Any, where: str) -> T:
    """Read JSON that `parse` has accepted as a typed document; see `decode`."""
    try:
        # from bytes: with Python objects, strict mode refuses a list for a tuple and a dict for a
        # dataclass
        return _adapter(kind).validate_json(data)
    except PydanticError as error:
        raise ValueError(f"{where}: {explain(error)}") from error


def convert(value: Any, kind: Callable[..., T] | Any, where: str) -> T:
    """Read a parsed JSON value as a typed document; see `decode`."""
    return decode(json.dumps(value).encode(), kind, where)


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # pydantic refuses a second config for a dataclass
    return TypeAdapter(kind, config=None if dataclasses.is_dataclass(kind) else STRICT)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{short(twice)} occurs twice in one object")
    return found


def names_unknown(error: ValueError) -> bool:
    """Whether `decode` failed only on fields or choices that this version does not know."""
    cause = error.__cause__
    return isinstance(cause, PydanticError) and {e["type"] for e in cause.errors()} <= UNKNOWN


def explain(error: PydanticError, at: Sequence[str | int] = ()) -> str:
    """Describe on one line the first fault, and count the others."""
    if error.error_count() > EXPLAINED:
        return f"it has {error.error_count():,} invalid fields or values"
    faults = error.errors(include_url=False)
    # a different schema version explains all other faults
    first = next((fault for fault in faults if fault["loc"] == ("schema",)), faults[0])
    rest = f" (and {len(faults) - 1} more)" if faults[1:] else ""
    return f"{_explain(first, at)}{rest}"


def _explain(fault: ErrorDetails, at: Sequence[str | int]) -> str:
    place = _place([*at, *fault["loc"]])
    kind, message = fault["type"], fault["msg"]
    if kind.startswith("union_tag"):  # one field of the object decides which others it has
        context = fault["ctx"]
        field = context["discriminator"].strip("'")
        place = f"{place}.{field}" if place else field
        if kind == "union_tag_not_found":
            return f"{place} is missing"
        return f"{place} is {short(context['tag'])}; it must be one of {context['expected_tags']}"
    if kind in MISSING:
        return f"{place} is missing"
    if kind in SURPLUS:
        return f"{place} is an unknown field"
    if kind == "value_error" and not isinstance(fault["input"], str | int | float):
        # for an entire object or list; the message itself names the fields
        message = message.removeprefix("Value error, ")
        alone = place in ("", "--") or message.startswith(place)
        return message if alone else f"{place}: {message}"
    wanted = OBJECTS[kind].format(**fault.get("ctx", {})) if kind in OBJECTS else message
    wanted = wanted.removeprefix("Value error, ")
    wanted = re.sub("^(Input|String|Tuple|List|Dictionary) should", "it must", wanted)
    wanted = f"it {wanted}" if wanted.startswith("must ") else wanted
    return f"{place or 'it'} is {short(fault['input'])}; {wanted}"


def _place(parts: Sequence[str | int]) -> str:
    """Format the path of a value in a document, such as `shards[3].name`."""
    if parts[:1] == ["--"]:
        return "--" + _place(parts[1:]).replace("_", "-")
    place = ""
    for part in parts:
        if part == "[key]":  # pydantic's mark for a field's name, which the path has already
            continue
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() or part.replace("-", "_").isidentifier():
            place += f".{part}" if place else part
        else:
            place += f"[{short(part)}]"
    return place
