"""How third-party text is shown on a terminal."""

import ast
import sys
from pathlib import Path

import pytest

from rft import commands, start, text
from rft.text import plain, printable, short, shown, to_ascii

HOSTILE = [
    "a\x1b[2Jb", "a\nb", "a\r\nb", "a\x9bb", "a\u2028b", "a\u202eb", "a\u200bb", "a\ufeffb",
    "\ud800",
]  # fmt: skip


def test_a_message_shows_what_a_terminal_would_not():
    assert shown("a\x1b[2Jb") == r"'a\x1b[2Jb'"
    assert shown("été") == "'été'"


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_hostile_name_reaches_a_terminal(name):
    for escape in (plain, printable, shown, short, to_ascii):
        found = escape(name)
        assert found.isascii(), escape
        assert found.isprintable(), escape


def test_a_line_keeps_every_script_and_the_rest_of_a_hostile_name():
    for name in (
        "été",
        "日本\u3000語",
        "\U0001f469\u200d\U0001f52c",
        "\u0646\u0627\u0645\u0647\u200c\u0647\u0627",
        "a\u00a0b",
    ):
        assert plain(name) == name
    assert plain("été\x1b") == "été\\x1b"
    assert plain("a\nb\x1b", kept="\n") == "a\nb\\x1b"


def test_a_name_in_a_message_is_stricter_than_a_line():
    assert printable("été") == "été"
    assert printable("été\x1b") == "\\xe9t\\xe9\\x1b"
    assert printable("a\u00a0b") == "a\\xa0b"


def test_long_texts_are_cut():
    assert printable("a" * 5, 5) == "aaaaa"
    assert printable("a" * 6, 5) == "aaaaa..."
    # after escaping, which makes it longer
    assert printable("\x1b" * 5, 5) == "\\x1b\\..."
    assert short(["a" * 1000]) == "['" + "a" * 78 + "..."
    assert to_ascii("é" * 1000) == "\\xe9" * 1000


@pytest.mark.parametrize("module", [commands, start, text])
def test_what_runs_before_all_else_is_of_the_standard_library(module):
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{name.name}" for name in node.names} | {node.module}
            assert names & {"rft.text", "rft.commands"} or (
                node.module.split(".")[0] in sys.stdlib_module_names
            )
