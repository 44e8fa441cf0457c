"""The few-shot choice, one class and one image at a time."""

from collections.abc import Mapping

from rft import rng


def choose(labels: Mapping[str, int], shots: int, seed: int) -> set[str]:
    """The training ids, from the ids that are not held out and their classes."""
    chosen = set()
    for label in set(labels.values()):
        ids = [one for one, its in labels.items() if its == label]
        chosen.update(sorted(ids, key=lambda one: rng.derive(seed, "shots", one))[:shots])
    return chosen
