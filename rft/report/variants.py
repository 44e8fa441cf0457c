"""Rows of one recipe with different settings: which runs are one row, and what it is called. Pure.

Runs that differ in nothing but the seed, and what follows from it (`rft.config.settings`), are one
row. Where a recipe was run with several settings, each row's name says those in which they differ:
`vanilla, lr 1e-05`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rft.storage.files import differing
from rft.text import short, to_ascii

SHOWN = 3  # settings in a name; a sweep changes one or two
NAME_LETTERS = 40  # of a setting's name
ABSENT = "none"  # of an option that one of the runs did not have, or that is null


def variants(documents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return for each run what follows its recipe in the name of its row; empty for one setting.

    A run is its recipe and its settings. Equal texts are equal settings.
    """
    by_recipe: dict[str, dict[str, Mapping[str, Any]]] = {}
    found = [(recipe, _present(settings)) for recipe, settings in documents]
    keys = [json.dumps(settings, sort_keys=True) for _, settings in found]
    for (recipe, settings), key in zip(found, keys, strict=True):
        by_recipe.setdefault(recipe, {}).setdefault(key, settings)
    named = {recipe: _named(groups) for recipe, groups in by_recipe.items()}
    return [named[recipe][key] for (recipe, _), key in zip(found, keys, strict=True)]


def _present(settings: Any) -> Any:
    """Return settings without those that are null: older versions did not have them."""
    if not isinstance(settings, dict):
        return settings
    return {name: _present(value) for name, value in settings.items() if value is not None}


def _named(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return key -> name of each of a recipe's settings."""
    first = next(iter(groups.values()))
    changes = {
        key: {name: new for name, _, new in differing(first, settings)}
        for key, settings in groups.items()
    }
    # every leaf in which two of them differ is one in which one of them differs from the first
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
        # 1 and 1.0 are one setting; others differ in what the name does not show
        same = [other for other, name in texts.items() if name == text]
        equal = next((other for other in same if groups[other] == groups[key]), None)
        different = {named[other] for other in same}
        texts[key] = text
        named[key] = named[equal] if equal else f"{text} #{len(different) + 1}" if same else text
    return named


def _short_names(leaves: Iterable[str]) -> dict[str, str]:
    """Return each setting's name without its group, where that is enough to know it by."""
    leaves = list(leaves)
    last = [name.rpartition(".")[2] for name in leaves]
    return {
        name: _cut(own if last.count(own) == 1 else name)
        for name, own in zip(leaves, last, strict=True)
    }


def _cut(name: str) -> str:
    # a document of others may have any text for a name
    text = to_ascii(name)
    return text if len(text) <= NAME_LETTERS else f"...{text[-NAME_LETTERS:]}"


def _shown(value: Any) -> str:
    if value is None:
        return ABSENT
    return (
        to_ascii(value) if isinstance(value, str) and len(value) <= NAME_LETTERS else short(value)
    )
