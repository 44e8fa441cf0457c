"""The counts of a checkpoint on disk: whether they are of these weights and sets, and their record.

Results belong to weights: a file of counts names the hash of the weights that they were counted
with, and counts of other weights are as good as none.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rft import cli
from rft.evaluate.checkpoints import Loaded
from rft.runs.folder import current_results, results_path
from rft.runs.records import Results, SetCount
from rft.shards.manifest import Manifest
from rft.storage import files


def is_current(checkpoint: Path, sets: Mapping[str, Manifest]) -> bool:
    """Whether the recorded counts belong to these weights and are of these sets, all of each."""
    recorded = current_results(checkpoint)
    counts = recorded.sets if recorded else {}
    found = {name: (count.manifest_sha256, count.total) for name, count in counts.items()}
    return all(found.get(name) == (one.sha256, one.samples) for name, one in sets.items())


def write_results(one: Loaded, sets: dict[str, SetCount]) -> None:
    """Record and print one checkpoint's counts.

    Raises:
        ValueError: if its weights were replaced since they were loaded.
    """
    record = one.record()
    # None for counts of other weights, which are dropped
    earlier = current_results(one.path)
    # what an earlier call counted for the same weights stays
    results = Results(**record, sets={**(earlier.sets if earlier else {}), **sets})
    files.write_json(str(results_path(one.path)), asdict(results))
    shares = (f"{name} {100 * c.correct / c.total:.2f}" for name, c in sets.items())
    cli.say(f"{one.path}{one.state_of_run}: {', '.join(shares)}")
