"""JSON documents match their dataclasses, or are an error that names the field."""

import dataclasses
import json
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from rft.config import Config, LoaderConfig, MethodConfig
from rft.storage import documents, files
from rft.storage.documents import Count, Name, Sha256, Text, decode, document, parse


@document
class Part:
    name: Name
    size: Count
    sha256: Sha256 = "0" * 64


@document(name="whole")
class Whole:
    parts: tuple[Part, ...]
    kind: Literal["one", "two"] = "one"
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    words: Text = ""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; it must name at least one")


GOOD = {"parts": [{"name": "a", "size": 3}], "kind": "two", "share": 1}


def test_a_good_document_is_read():
    whole = decode(json.dumps(GOOD).encode(), Whole, "x.json")
    assert whole == Whole(parts=(Part(name="a", size=3),), kind="two", share=1.0)
    again = dataclasses.replace(whole, share=0.25)
    assert decode(json.dumps(dataclasses.asdict(again)).encode(), Whole, "x.json") == again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": 3}, "parts is 3; it must be a list"),
        ({"parts": []}, "parts is empty; it must name at least one"),
        ({"parts": [3]}, r"parts\[0\] is 3; it must be an object"),
        ({"parts": [{"size": 1}]}, r"parts\[0\].name is missing"),
        ({"parts": [{"name": "a", "size": 1, "x": 1}]}, r"parts\[0\].x is an unknown field"),
        ({"parts": [{"name": "", "size": 1}]}, r"parts\[0\].name is ''; it must have at least 1"),
        ({"parts": [{"name": "a\x1b[2J", "size": 1}]}, "it must have no control characters"),
        ({"parts": [{"name": "a", "size": True}]}, "size is True; it must be a whole number"),
        ({"parts": [{"name": "a", "size": 1.5}]}, "size is 1.5; it must be a whole number"),
        ({"parts": [{"name": "a", "size": "1"}]}, "size is '1'; it must be a whole number"),
        ({"parts": [{"name": "a", "size": -1}]}, "size is -1; it must be greater than or equal to"),
        ({"parts": [{"name": "a", "size": 2**60}]}, "it must be less than or equal to"),
        ({"parts": [{"name": "a", "size": 1, "sha256": "../x"}]}, "it must be 64 hex digits"),
        ({"parts": [{"name": "a", "size": 1, "sha256": "A" * 64}]}, "it must be 64 hex digits"),
        ({"kind": "three"}, "kind is 'three'; it must be 'one' or 'two'"),
        ({"share": "0.5"}, "share is '0.5'; it must be a number"),
        ({"share": 2}, "share is 2; it must be less than or equal to 1|share is 2.0; it must be"),
        ({"words": None}, "words is None; it must be a text"),
        ({"words": "x" * 200_000}, r"words is 'x{79}...; it must have at most 100000 characters"),
        ({"strange\x1b": 1}, r"\['strange\\x1b'\] is an unknown field"),
        ({"kind": 1, "share": 2}, r"kind is 1; .* \(and 1 more\)"),
    ],
)
def test_a_wrong_document_is_one_line_that_names_the_place(changes, message):
    with pytest.raises(ValueError, match=rf"^x.json: .*{message}") as raised:
        decode(json.dumps({**GOOD, **changes}).encode(), Whole, "x.json")
    assert str(raised.value).isprintable()
    assert "pydantic" not in str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"share": NaN}',
        b'{"share": Infinity}',
        b'{"share": 1e999}',
        b'{"parts": [], "parts": []}',
        b'{"parts": [{"name": "a", "name": "b"}]}',
        b'{"words": "\\ud800"}',
        b"1" + b"0" * 10_000,
        json.dumps(GOOD).encode("utf-16"),
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        json.dumps(GOOD).encode() + b"x",
    ],
    ids=range(15),
)
def test_what_is_no_json_is_one_line(data):
    with pytest.raises(ValueError, match=r"^x.json") as raised:
        decode(data, Whole, "x.json")
    assert len(str(raised.value).splitlines()) == 1


def test_a_field_named_twice_is_told():
    with pytest.raises(ValueError, match=r"'correct' occurs twice in one object"):
        parse(b'{"correct": 1, "total": 2, "correct": 2}', "results.json")


def test_python_is_checked_as_json_is():
    with pytest.raises(ValueError, match=r"^method.mask is 'objct'; it must be 'none', 'random'"):
        MethodConfig(mask="objct")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match=r"^loader.workers is '4'; it must be a whole number"):
        dataclasses.replace(LoaderConfig(), workers="4")
    with pytest.raises(ValueError, match=r"^config.run is missing$"):
        Config(recipe="vanilla", data="x")  # pyrefly: ignore[missing-argument]


@pytest.mark.parametrize("config", [documents.STRICT, documents.FOREIGN])
@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_no_number_is_too_large_for_a_float(config, number: str):
    """JSON has no infinity, but numbers that overflow to one."""

    @document(config=config)
    class Measured:
        seconds: float

    with pytest.raises(ValueError, match=r"x\.json: seconds is -?inf; it must be a finite number"):
        decode(f'{{"seconds": {number}}}'.encode(), Measured, "x.json")


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_document_is_read_or_refused(value):
    data = json.dumps(value).encode()
    for kind in (Whole, Config):
        with pytest.raises(ValueError, match=r"^x"):
            decode(data, kind, "x")


def test_only_unknown_fields_and_choices_may_be_a_newer_versions():
    for changes, newer in (({"new": 1}, True), ({"kind": "six"}, True), ({"share": "x"}, False)):
        with pytest.raises(ValueError, match="x") as raised:
            decode(json.dumps({**GOOD, **changes}).encode(), Whole, "x")
        assert documents.names_unknown(raised.value) == newer


def test_a_large_document_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD))
    assert files.read_document(str(path), Whole, path.stat().st_size).kind == "two"
    with pytest.raises(ValueError, match=r"x.json: it has more than 10 bytes"):
        files.read_document(str(path), Whole, 10)


def test_a_field_named_twice_among_many_is_found_at_once():
    fields = ", ".join(f'"k{n}": 1' for n in range(120_000))
    with pytest.raises(ValueError, match="'k7' occurs twice"):
        parse(f'{{{fields}, "k7": 2}}'.encode(), "x.json")


@pytest.mark.parametrize("part", [b"[],", b"{},", b"1,"])
def test_values_are_counted_before_they_take_memory(part):
    with pytest.raises(ValueError, match=r"^x.json holds more than 1,000,000 values"):
        parse(b"[" + part * 1_000_001 + b"1]", "x.json")


def test_of_very_many_faults_the_number_is_told():
    data = b"{" + b", ".join(b'"k%d": 1' % n for n in range(20_000)) + b"}"
    with pytest.raises(ValueError, match=r"^x.json: it has 20,001 invalid fields or values"):
        decode(data, Whole, "x.json")
