"""Brace patterns for shards: `folder/{000..127}.tar` is counted before it is expanded."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from braceexpand import (
    alphabet,
    braceexpand,
    char_range_re,  # pyrefly: ignore[missing-module-attribute]
    int_range_re,  # pyrefly: ignore[missing-module-attribute]
)

SHARDS = 1_000_000  # of a set
PATTERN_LETTERS = 4096  # Linux's limit of a path
URL_LETTERS = 2**28  # of all URLs together
NOT_EXPANDED = re.compile(r"[{}*]")
LAST_NUMBER = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)
DEPTH = 32  # of nested braces, for which braceexpand recurses


def expand(patterns: Sequence[str]) -> list[str]:
    """Expand brace patterns into URLs, in order.

    Raises:
        ValueError: if a pattern is malformed, no shard is named, or one is named twice.
    """
    urls: list[str] = []
    for pattern in patterns:
        if len(pattern) > PATTERN_LETTERS:
            raise ValueError(f"a shard pattern has {len(pattern):,} letters: {pattern[:40]!r}...")
        count = count_expanded(pattern)
        if len(urls) + count > SHARDS or count * len(pattern) > URL_LETTERS:
            # counts multiply, so this number may have thousands of digits
            named = f"{count:,}" if count < 10**30 else "uncounted"
            raise ValueError(f"{pattern[:99]!r} names {named} shards; a set has at most {SHARDS:,}")
        # without escapes, which `count_expanded` does not handle
        found = list(braceexpand(pattern, escape=False))
        for url in found:
            # the name of an existing local file may contain such a sign
            if (sign := NOT_EXPANDED.search(url)) and not _is_local_file(url):
                raise ValueError(
                    f"{pattern!r}: {sign[0]!r} is not expanded; name shards one by one or with a "
                    f"range in braces, such as 'folder/{{000..127}}.tar' or '{{0..3}}.tar'"
                )
        urls += found
    if not urls:
        raise ValueError("name the shards, such as 'folder/{000..127}.tar'")
    twice = [url for url, count in Counter(urls).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    return urls


def count_expanded(pattern: str) -> int:
    """Count the texts that `braceexpand` would make of a pattern, without expanding it.

    Raises:
        ValueError: if its braces do not match.
    """
    # for each open group: the alternatives before the last comma, those since then, and its start
    groups = [(0, 1, 0)]
    for place, letter in enumerate(pattern):
        before, count, start = groups[-1]
        if letter == "{":
            groups.append((0, 1, place + 1))
            if len(groups) > DEPTH:
                raise ValueError(f"braces are nested more than {DEPTH} deep in {pattern!r}")
        elif letter == "," and groups[1:]:
            groups[-1] = (before + count, 1, start)
        elif letter == "}":
            if not groups[1:]:
                raise ValueError(f"braces do not match in {pattern!r}")
            groups.pop()
            within = _count_range(pattern[start:place]) or before + count
            above, beside, start = groups[-1]
            groups[-1] = (above, beside * within, start)
    if groups[1:]:
        raise ValueError(f"braces do not match in {pattern!r}")
    return groups[0][1]


def as_patterns(names: Sequence[str]) -> list[str]:
    """Write names as brace patterns: those with consecutive last numbers become one range."""
    found = [LAST_NUMBER.fullmatch(name) for name in names]
    # shorter numbers first, so that 10 follows 9
    parts = sorted((one[1], one[3], len(one[2]), one[2]) for one in found if one)
    padded = {part[:3] for part in parts if part[2] > 1 and part[3].startswith("0")}
    # numbers without leading zeros may have different lengths
    groups = groupby(parts, key=lambda part: (*part[:2], part[2] if part[:3] in padded else 0))
    patterns = []
    for (before, after, _), group in groups:
        runs: list[list[str]] = []
        for *_, text in group:
            if runs and int(runs[-1][-1]) + 1 == int(text):
                runs[-1].append(text)
            else:
                runs.append([text])
        numbers = [f"{{{run[0]}..{run[-1]}}}" if run[1:] else run[0] for run in runs]
        patterns += [f"{before}{number}{after}" for number in numbers]
    return sorted([*patterns, *(name for name, one in zip(names, found, strict=True) if not one)])


def _count_range(text: str) -> int:
    """Count the texts of `1..9`, `a..z` or either with a step; 0 for any other text."""
    for known, number in ((int_range_re, int), (char_range_re, alphabet.index)):
        if found := known.match(text):
            first, last = number(found[1]), number(found[2])
            return abs(last - first) // (int(found[3] or 1) or 1) + 1
    return 0


def _is_local_file(url: str) -> bool:
    return "://" not in url and Path(url).is_file()
