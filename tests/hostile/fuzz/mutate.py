"""Mutations of valid bytes and JSON documents, as lists of edits that print completely."""

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# values at which counters, sizes and signs overflow
EDGES = (0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
EDGES += (2**62, 2**63 - 1, 2**63, 2**64 - 1)
PLACES = (
    2**24
)  # positions are fractions of this, so that they keep their meaning when an example shrinks
LARGEST = 2**20  # bytes to which edits may grow an input


class Edit(NamedTuple):
    """A change of bytes at a position, as a share of the length in 1/PLACES."""

    how: str
    at: int
    value: bytes


def edits(tokens: Sequence[bytes] = ()) -> SearchStrategy[list[Edit]]:
    """Draw edits; `tokens` are pieces of the format to write over or between the bytes."""
    place = st.integers(0, PLACES)
    numbers = st.builds(
        lambda value, size, order: (value % 256**size).to_bytes(size, order),
        st.sampled_from(EDGES) | st.sampled_from([-1, -2, -512]),
        st.sampled_from([1, 2, 4, 8]),
        st.sampled_from(["little", "big"]),
    )
    pieces = numbers | st.binary(min_size=1, max_size=8)
    if tokens:
        pieces |= st.sampled_from(list(tokens))
    kinds = st.sampled_from(["over", "insert", "delete", "repeat", "cut", "flip"])
    return st.lists(st.builds(Edit, kinds, place, pieces), min_size=0, max_size=6)


def edited(data: bytes, changes: Sequence[Edit]) -> bytes:
    """Apply edits to bytes, in order."""
    found = bytearray(data)
    for how, at, value in changes:
        position = at * len(found) // PLACES
        match how:
            case "over":
                found[position : position + len(value)] = value
            case "insert":
                found[position:position] = value
            case "delete":
                del found[position : position + value[0] + 1]
            case "repeat":
                piece = found[position : position + 64]
                found[position:position] = piece * (value[0] % 64)
            case "cut":
                del found[position:]
            case "flip" if position < len(found):
                found[position] ^= 1 << value[0] % 8
        del found[LARGEST:]
    return bytes(found)


class Change(NamedTuple):
    """A change of a JSON document at one of its positions, by number."""

    how: str
    at: int
    value: Any


TEXTS = (
    "",
    " ",
    "..",
    "../../outside/precious.txt",
    "/etc/passwd",
    "a::b",
    "file:///etc/passwd",
    "reference://x",
    "http://127.0.0.1:1/x",
    "\x1b[2J",
    "\0",
    "a\nb",
    "\ud800",
    "\u202e",
    "<script>alert(1)</script>",
    "=HYPERLINK(1)",
    "{c}",
    "0",
    "-1",
    "1e999",
    "nan",
    "a" * 5000,
    "0" * 64,
    "__metadata__",
)
NUMBERS = (*EDGES, -1, -2, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**400, 10**30)


def hostile_values() -> SearchStrategy[Any]:
    """Draw values that are unusual at their position."""
    leaves = st.sampled_from([None, True, False, *NUMBERS, *TEXTS]) | st.text(max_size=5)
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    )


def changes() -> SearchStrategy[list[Change]]:
    """Draw changes of a JSON document."""
    kinds = st.sampled_from(["put", "put", "put", "drop", "add", "twice", "wrap", "swap"])
    one = st.builds(Change, kinds, st.integers(0, 10**4), hostile_values())
    return st.lists(one, min_size=0, max_size=4)


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of every position in a document."""
    pairs: Any = ()
    if isinstance(document, dict):
        pairs = list(document.items())
    elif isinstance(document, list):
        pairs = list(enumerate(document))
    for key, value in pairs:
        yield document, key
        yield from places(value)


def changed(document: Any, made: Sequence[Change]) -> Any:
    """Apply changes to a copy of a JSON document."""
    whole = [copy.deepcopy(document)]  # the root is a position, too
    for how, at, value in made:
        found = list(places(whole))
        container, key = found[at % len(found)]
        here = container[key]
        value = copy.deepcopy(value)  # or a later change may insert it into itself
        match how:
            case "put":
                container[key] = value
            case "drop" if container is not whole:
                del container[key]
            case "add" if isinstance(here, dict):
                here[value if isinstance(value, str) else "surprise"] = value
            case "add" if isinstance(here, list):
                here.append(value)
            case "twice" if isinstance(here, list):
                container[key] = here + here
            case "wrap":
                container[key] = [here]
            case "swap":
                other, place = found[(at * 7 + 1) % len(found)]
                if other is not whole:
                    container[key] = copy.deepcopy(other[place])
    return whole[0]


def to_text(document: Any, style: str = "") -> bytes:
    """Format a document's text, including lone surrogates and numbers that JSON lacks."""
    text = json.dumps(document)
    match style:
        case "mark":
            return b"\xef\xbb\xbf" + text.encode()
        case "utf-16":
            return text.encode("utf-16")
        case "deep":
            return b'{"a":' * 5000 + text.encode() + b"}" * 5000
        case "cut":
            return text.encode()[: len(text) // 2]
    return text.encode()


def styles() -> SearchStrategy[str]:
    """Draw the formatting of a document, mostly the normal one."""
    return st.sampled_from(["", "", "", "", "", "mark", "utf-16", "deep", "cut"])
