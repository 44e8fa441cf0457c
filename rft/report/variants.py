"""Groups runs of one recipe by their settings, and names the resulting rows. Pure.

Runs that differ only in the seed, and in settings that follow from it (`rft.config.settings`), form
one row. If a recipe was run with several settings, each row's name has the settings in which they
differ: `vanilla, lr 1e-05`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rft.storage.files import differing
from rft.text import short, to_ascii

SHOWN = 3  # most settings in a name; a sweep changes one or two
NAME_LETTERS = 40  # limit of a setting's name
ABSENT = "none"  # value of an option that a run does not have, or that is null


def variants(documents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Make for each run the suffix of its recipe in the row's name; empty if there is one setting.

    A run is given by its recipe and its settings. Equal suffixes mean equal settings.
    """
    by_recipe: dict[str, dict[str, Mapping[str, Any]]] = {}
    found = [(recipe, _present(settings)) for recipe, settings in documents]
    keys = [json.dumps(settings, sort_keys=True) for _, settings in found]
    for (recipe, settings), key in zip(found, keys, strict=True):
        by_recipe.setdefault(recipe, {}).setdefault(key, settings)
    named = {recipe: _named(groups) for recipe, groups in by_recipe.items()}
    return [named[recipe][key] for (recipe, _), key in zip(found, keys, strict=True)]


def _present(settings: Any) -> Any:
    """Drop settings that are null, because older versions did not have them."""
    if not isinstance(settings, dict):
        return settings
    return {name: _present(value) for name, value in settings.items() if value is not None}


def _named(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Map the key of each of a recipe's settings to its name."""
    first = next(iter(groups.values()))
    changes = {
        key: {name: new for name, _, new in differing(first, settings)}
        for key, settings in groups.items()
    }
    # if any two settings differ in an option, at least one of them differs from the first in it
    before = {
        name: old for settings in groups.values() for name, old, _ in differing(first, settings)
    }
    short_names = _short_names(before)
    texts: dict[str, str] = {}
    named: dict[str, str] = {}
    for key, changed in changes.items():
        values = {**before, **changed}
        parts = [f"{short_names[name]} {_shown(values[name])}" for name in list(before)[:SHOWN]]
        if len(before) > SHOWN:
            parts.append(f"and {len(before) - SHOWN} more")
        text = ", ".join(parts)
        # 1 and 1.0 are the same setting; otherwise a number distinguishes equal names
        same = [other for other, name in texts.items() if name == text]
        equal = next((other for other in same if groups[other] == groups[key]), None)
        different = {named[other] for other in same}
        texts[key] = text
        named[key] = named[equal] if equal else f"{text} #{len(different) + 1}" if same else text
    return named


def _short_names(leaves: Iterable[str]) -> dict[str, str]:
    """Drop the group from the names of settings if they remain unique."""
    leaves = list(leaves)
    last = [name.rpartition(".")[2] for name in leaves]
    return {
        name: _cut(own if last.count(own) == 1 else name)
        for name, own in zip(leaves, last, strict=True)
    }


def _cut(name: str) -> str:
    # an untrusted document may have any text as a name
    text = to_ascii(name)
    return text if len(text) <= NAME_LETTERS else f"...{text[-NAME_LETTERS:]}"


def _shown(value: Any) -> str:
    if value is None:
        return ABSENT
    return (
        to_ascii(value) if isinstance(value, str) and len(value) <= NAME_LETTERS else short(value)
    )
