"""The page of all commands: what each one's `--help` prints, from its own parser."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence

from rft import entry
from rft.commands import GROUPS, HELP_ALL, RANKS, Command

COLUMNS = "100"


def page() -> str:
    """Write the page."""
    os.environ["COLUMNS"] = COLUMNS
    parts = [
        "# Commands",
        "Every command is `rft COMMAND`; `rft COMMAND --help` prints its options.",
    ]
    parts.append(_block(printed(["--help"])))
    for title, group in GROUPS.items():
        parts.append(f"## {title}")
        for name, found in group.items():
            for words, one in _kinds(name, found):
                # commands with many options print the most used ones first
                text = printed([*words, "--help"])
                if HELP_ALL in text:
                    # one process, also where `rft` would start one for each GPU
                    text = printed([*words, HELP_ALL, *([RANKS, "1"] if one.ranks else [])])
                parts += [
                    f"### rft {' '.join(words)}",
                    f"{one.about[0].upper()}{one.about[1:]}.",
                    _block(text),
                ]
    return "\n\n".join(parts) + "\n"


def _kinds(name: str, found: object) -> Iterator[tuple[list[str], Command]]:
    if isinstance(found, Command):
        yield [name], found
    else:
        assert isinstance(found, dict)
        yield from (([name, kind], one) for kind, one in found.items())


def printed(words: Sequence[str]) -> str:
    """Run `rft` with words that print help.

    Raises:
        ValueError: if it fails.
    """
    out, argv, status = io.StringIO(), sys.argv, 0
    sys.argv = ["rft", *words]
    try:
        with contextlib.redirect_stdout(out):
            entry.main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    finally:
        sys.argv = argv
    if status:
        raise ValueError(f"rft {' '.join(words)} ends with {status}")
    return out.getvalue()


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"
