"""Finds a class by a name that may be spelt differently: `Binder (closed)`, `binder_closed`."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from difflib import get_close_matches

from rft.classes import Classes, composed
from rft.shards.label_space import LabelSpace


class Names:
    """A lookup of numbers by names, exact and in `loose_form`; a name may have several numbers.

    `exact` has the names as written, in Unicode's composed form and without surrounding spaces.
    """

    def __init__(self, texts: Iterable[tuple[str, int]]) -> None:
        self.exact: dict[str, set[int]] = defaultdict(set)
        self._loose: dict[str, set[int]] = defaultdict(set)
        for text, number in texts:
            self.exact[composed(text).strip()].add(number)
            self._loose[loose_form(text)].add(number)
        # names of separators only would all be equal
        self._loose.pop("", None)

    def find(self, name: str) -> list[int]:
        """Find the numbers of a name, in order: of its exact form, otherwise of its loose form."""
        exact = self.exact.get(composed(name).strip())
        return sorted(exact or self._loose.get(loose_form(name), ()))


def names_of(labels: LabelSpace | Classes) -> Names:
    """Build the lookup of class ids by folder names and class names."""
    pairs = enumerate(zip(labels.ids, labels.names, strict=True))
    return Names((text, class_id) for class_id, texts in pairs for text in texts)


def folder_hint(name: str, labels: LabelSpace) -> str:
    """Name the class whose folder `name` probably is, as a hint; empty if none is similar."""
    known = names_of(labels)
    similar = [name, *get_close_matches(name[:80], known.exact, n=1)]
    found = next(filter(None, map(known.find, similar)), None)
    return (
        f"did you mean {labels.ids[found[0]]!r}? Folders must have the ids' names" if found else ""
    )


# Runs of separators, in a text of `_shape`'s letters: w letter or mark, d digit, _ space or
# underscore, ( bracket, x any other; all others are themselves.
SEPARATORS = re.compile(
    r"""(?: [_(]
          | (?<!d), | ,(?!d)                           # not in 1,5
          | (?:(?<=[wd])|(?<=w['.]))-(?=[wd])          # joins words; no sign, as in A- and -1
          | (?<=_)-(?=_)
          | (?<=[wd])\.(?!d)                           # not in 1.5 and .net
          | (?<=w)'(?=[^'])                            # no prime, as in a'
          | (?<!d)/(?!d)                               # not in 1/2
        )+""",
    re.VERBOSE,
)


def loose_form(name: str) -> str:
    """Normalise a name by removing case and separators; the result may be empty.

    `Binder (closed)` and `binder_closed` have the same form. Separators are spaces, underscores and
    round brackets, and commas, hyphens, dots, apostrophes and slashes beside or between words. Next
    to a digit they become one space (`B-52` is `B 52`, not `B52`). Everything else is kept:
    combining marks, symbols and emoji (`c`, `c++` and `c#` are three names), a hyphen that is a
    sign (`A-`, `-1`), and punctuation in numbers (`1.5`).
    """
    # composed again, because casefold decomposes some letters (U+01F0)
    text = composed(composed(name).strip().casefold())
    shape = "".join(map(_shape, text))
    kept, end = "", 0
    for run in SEPARATORS.finditer(shape):
        kept += text[end : run.start()]
        beside_digit = "d" in (shape[: run.start()][-1:], shape[run.end() :][:1])
        kept += " " if beside_digit else ""
        end = run.end()
    return (kept + text[end:]).strip()


def _shape(letter: str) -> str:
    category = unicodedata.category(letter)
    if letter in ",./":
        return letter
    if letter in "_()":
        return "_" if letter == "_" else "("
    if letter in "'\N{RIGHT SINGLE QUOTATION MARK}":
        return "'"
    if letter.isspace():
        return "_"
    return {"L": "w", "M": "w", "N": "d"}.get(category[0], "-" if category == "Pd" else "x")
