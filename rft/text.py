"""Escaping of third-party text for one line of a message, a table or a log.

File names, settings and error messages can contain line breaks, control sequences that a terminal
executes, and characters that rearrange or hide their neighbours. Standard library only: `rft.start`
needs this before any other import.
"""

import unicodedata

VALUE_LETTERS = 80  # kept of a wrong value quoted in an error

# these rearrange displayed text; the other format characters belong to words and emoji
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# format characters that never show; unlike joiners, which matter in emoji and Persian words
INVISIBLE = frozenset("\u200b\u2060\ufeff")


def is_hidden(letter: str) -> bool:
    """Whether a character controls the terminal, breaks the line or is invisible."""
    return (
        # controls, lone surrogates (names that are not UTF-8), line and paragraph separators
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
        or letter in BIDIRECTIONAL
        or letter in INVISIBLE
    )


def plain(text: str, kept: str = "") -> str:
    """Escape only hidden characters, except those in `kept`: for printed lines.

    Every script and emoji stays readable, so that a path can be copied from the line.
    """
    # the common case, which avoids checking each character
    if text.isascii() and text.isprintable():
        return text
    letters = (
        ascii(letter)[1:-1] if letter not in kept and is_hidden(letter) else letter
        for letter in text
    )
    return "".join(letters)


def printable(text: str, limit: int | None = None) -> str:
    """Escape a text with any unusual character, and cut it: for names and reasons in a message.

    Stricter than `plain`: one character that Python does not call printable, such as an unusual
    space, turns the full text into ASCII.
    """
    text = text if text.isprintable() else to_ascii(text)
    return text if limit is None else _cut(text, limit)


def shown(text: str) -> str:
    """Quote a name for a message, escaped as by `printable`; the quotes show where it ends."""
    return repr(text) if text.isprintable() else ascii(text)


def short(value: object) -> str:
    """Format any value as short ASCII: for wrong values that an error quotes."""
    return _cut(ascii(value), VALUE_LETTERS)


def counted(number: int, what: str) -> str:
    """Format a number of things: `1 shard`, `1,024 shards`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def to_ascii(text: str) -> str:
    """Escape everything but ASCII: for tables that must be writable in any encoding."""
    return ascii(text)[1:-1]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
