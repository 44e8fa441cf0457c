"""Third-party text in one line of a message, a table or a log: what a terminal may be shown of it.

File names, settings and error messages can hold line breaks, control sequences that a terminal
obeys, and letters that rearrange or hide their neighbours. Standard library only: `rft.start` needs
it before any other import.
"""

import unicodedata

VALUE_LETTERS = 80  # of a wrong value that an error repeats

# they rearrange what a terminal shows; the other format characters belong to words and emoji
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# format characters that show nothing anywhere; a joiner within an emoji or a Persian word does
INVISIBLE = frozenset("\u200b\u2060\ufeff")


def is_hidden(letter: str) -> bool:
    """Whether a terminal obeys a letter, breaks its line there, or shows nothing of it."""
    return (
        # controls, lone surrogates (names that are no UTF-8), separators of lines and paragraphs
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
        or letter in BIDIRECTIONAL
        or letter in INVISIBLE
    )


def plain(text: str, kept: str = "") -> str:
    """Escape hidden letters alone, but those kept: for the lines that a command prints.

    Every script and emoji stays readable, so that a path can be copied from the line.
    """
    # most lines, which spares a look at each letter
    if text.isascii() and text.isprintable():
        return text
    letters = (
        ascii(letter)[1:-1] if letter not in kept and is_hidden(letter) else letter
        for letter in text
    )
    return "".join(letters)


def printable(text: str, limit: int | None = None) -> str:
    """Escape a text that has anything unusual, and cut it: for names and reasons in a message.

    Stricter than `plain`: one letter that Python does not call printable, such as an unusual space,
    makes all of the text ASCII.
    """
    text = text if text.isprintable() else to_ascii(text)
    return text if limit is None else _cut(text, limit)


def shown(text: str) -> str:
    """Return a name for a message as `printable` does, in quotes, which show where it ends."""
    return repr(text) if text.isprintable() else ascii(text)


def short(value: object) -> str:
    """Return any value as ASCII and cut: for what a document holds in place of what it must."""
    return _cut(ascii(value), VALUE_LETTERS)


def to_ascii(text: str) -> str:
    """Escape all but ASCII: for tables that any encoding must be able to write."""
    return ascii(text)[1:-1]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
