"""Pack OOD benchmarks of ImageNet into tar shards: `python tools/shard_ood.py`."""

from dataclasses import dataclass, field

import tyro

from rft import cli
from rft.packing.expected import parse_allowed_counts
from rft.packing.pack import Options, pack_all
from rft.sets import Ood
from rft.shards.label_space import choose_labels


@dataclass(frozen=True, kw_only=True)
class ShardOod:
    """Pack out-of-distribution benchmarks into WebDataset tar shards: OUT/<benchmark>.

    The source is the folder that the benchmark's official archive unpacks to, or the folder above
    it. A run is safe to interrupt and rerun with the same arguments, and writes the same bytes for
    any number of workers and tasks. Example:

    python tools/shard_ood.py --benchmark imagenet-v2 objectnet --source /data --out s3://bucket/rft
    """

    benchmark: tuple[Ood, ...]
    """Which benchmarks; several must lie side by side in the source, as their archives unpack."""
    source: str
    """Folder with the class folders (for objectnet images/ and mappings/), or the folder above."""
    out: str
    """Output for the packed sets: a folder, or a URL (s3://, gs://, az://, ...)."""
    classes: str | None = None
    """JSON file with another label space (keys ids, names, templates); None is ImageNet's 1000."""
    allow_count: tuple[str, ...] = ()
    """SET=N: accept an incomplete copy with exactly N images; one value per set, such as
    imagenet-r=29999."""
    packing: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    """How to pack."""


def main() -> None:
    """Pack the benchmarks that the command line names."""
    command = cli.parse(ShardOod, config=(tyro.conf.FlagCreatePairsOff,))
    if not command.benchmark:
        raise ValueError("--benchmark names nothing to pack")
    labels = choose_labels(command.classes)
    allowed = parse_allowed_counts(command.allow_count, command.benchmark)
    if pack_all(command.benchmark, command.source, command.out, labels, command.packing, allowed):
        words = ["-m", "rft.evaluate", "RUN", "--data", command.out, "--sets", *command.benchmark]
        unknown = {"RUN": "folder of a run that was trained"}
        cli.say_next(cli.next_step(words, unknown=unknown, on_gpus=True))
