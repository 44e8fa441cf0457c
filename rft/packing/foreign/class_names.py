"""Finding a class by a name that may be spelt otherwise: `Binder (closed)`, `binder_closed`."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from rft.classes import composed
from rft.shards.label_space import LabelSpace


@dataclass(frozen=True, kw_only=True)
class Names:
    """Numbers by the texts that name them, as written and in `loose_form`."""

    exact: dict[str, list[int]]
    loose: dict[str, list[int]]

    @staticmethod
    def of(texts: Iterable[tuple[str, int]]) -> "Names":
        """Return the lookup of texts, each with its number; a text may have several."""
        exact: dict[str, set[int]] = {}
        loose: dict[str, set[int]] = {}
        for text, number in texts:
            exact.setdefault(composed(text).strip(), set()).add(number)
            loose.setdefault(loose_form(text), set()).add(number)
        loose.pop("", None)
        return Names(
            exact={text: sorted(numbers) for text, numbers in exact.items()},
            loose={text: sorted(numbers) for text, numbers in loose.items()},
        )

    def find(self, name: str) -> list[int]:
        """Return the numbers that a name means, in order: as written, else by its loose form."""
        return self.exact.get(composed(name).strip()) or self.loose.get(loose_form(name), [])


def names_of(labels: LabelSpace) -> Names:
    """Return the lookup of class ids by folder names and class names."""
    pairs = enumerate(zip(labels.ids, labels.names, strict=True))
    return Names.of((text, class_id) for class_id, texts in pairs for text in texts)


# Runs of separators, in a text of `_shape`'s letters: w letter or mark, d digit, _ space or
# underscore, ( bracket, x any other; the rest stand for themselves.
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
    """Return what is left of a name without case and separators; it may be empty.

    `Binder (closed)` and `binder_closed` have one form. Separators are spaces, underscores and
    round brackets, and commas, hyphens, dots, apostrophes and slashes where they stand beside or
    between words. Beside a digit they become one space (`B-52` is `B 52`, not `B52`). All else
    stays: combining marks, symbols and emoji (`c`, `c++` and `c#` are three names), a hyphen that
    is a sign (`A-`, `-1`), and punctuation in numbers (`1.5`).
    """
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
