"""Pack any other test set into tar shards: `python tools/shard_set.py`."""

import logging
from collections import Counter
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, get_args

import tyro
from pydantic import Field

from rft import cli
from rft.packing.domains import Listed, only_present, read_domains
from rft.packing.pack import Options, pack_source
from rft.packing.source import Source, require_apart
from rft.packing.table import Table, read_table
from rft.sets import BENCHMARKS, DomainScore, Score
from rft.shards.label_space import LabelSpace, doubts
from rft.storage.documents import Name, Whole, document
from rft.storage.urls import set_name
from rft.text import printable

log = logging.getLogger("rft.tools")


@document(name="--")
class ShardSet:
    r"""Pack any set of images as one set of WebDataset tar shards: OUT/NAME.

    The source holds class folders, optionally below folders of domains (--domains), or files that a
    table lists (--metadata). Images are read as torchvision and open_clip do. A run is safe to
    interrupt and rerun with the same arguments, and writes the same bytes for any number of workers
    and tasks. Examples, for ImageNet-C (or any part of it) and iWildCam:

    python tools/shard_set.py --name imagenet-c --source /data/imagenet-c --domains 2 --out shards

    python tools/shard_set.py --name iwildcam-test --source /data/iwildcam_v2.0 --out shards \
    --metadata /data/iwildcam_v2.0/metadata.csv --split test --file 'train/{filename}' \
    --domain '{location_remapped}' --classes iwildcam.json
    """

    name: Name
    """Name of the set: its folder below --out, for --sets and --train-set."""
    source: str
    """Folder of the images."""
    out: str
    """Output for the packed set: a folder, or a URL (s3://, gs://, az://, ...)."""
    domains: Annotated[Whole, Field(le=8)] = 0
    """Levels of folders above the class folders that name the domain: 2 for ImageNet-C's
    CORRUPTION/SEVERITY/CLASS/IMAGE, 1 for DOMAIN/CLASS/IMAGE."""
    table: tyro.conf.OmitArgPrefixes[Table] = field(default_factory=Table)
    """How a table describes the images, instead of folders."""
    classes: str | None = None
    """JSON file with the label space (keys ids, names, templates). None uses ImageNet's if all
    class folders belong to it, otherwise the names of the folders or the labels in the table."""
    only_present: bool = False
    """Let only classes with images compete, as ImageNet-R and -A are scored."""
    score: Score | None = None
    """Headline metric of the set. None is mean-over-domains for folders of domains, worst-domain
    for a table with domains, and top1 otherwise."""
    ood: bool = False
    """Declare an out-of-distribution test set: it counts in the OOD average, and training refuses
    its images."""
    allow_count: Whole | None = None
    """Accept an incomplete copy of ImageNet-C with exactly this many images."""
    packing: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    """How to pack."""


def main() -> None:
    """Pack the set that the command line names."""
    command = cli.parse(ShardSet, config=(tyro.conf.FlagCreatePairsOff,))
    name, source = set_name(command.name, "--name"), Path(command.source)
    # under a benchmark's name, its own tool checks classes and number of images
    if name in BENCHMARKS:
        tool = "shard_imagenet.py" if name in ("imagenet-train", "imagenet-val") else "shard_ood.py"
        raise ValueError(f"{name} is a benchmark with a known number of images: use tools/{tool}")
    require_apart([source], command.out, [name])
    labels = LabelSpace.load(command.classes) if command.classes else None
    listed = read(command, name, source, labels)
    found = only_present(listed.source) if command.only_present else listed.source
    found = replace(found, score=choose_score(command, found), ood=command.ood)
    say(listed._replace(source=found))
    if pack_source(found, command.out, listed.labels, command.packing):
        words = ["-m", "rft.evaluate", "RUN", "--data", command.out, "--sets", name]
        unknown = {"RUN": "folder of a run that was trained"}
        cli.say_next(cli.next_step(words, unknown=unknown, on_gpus=True))


def read(command: ShardSet, name: str, source: Path, labels: LabelSpace | None) -> Listed:
    """List the images in folders or in a table."""
    if command.table.metadata:
        if command.domains:
            raise ValueError("--domains counts folders, but --metadata lists files; use --domain")
        return read_table(name, source, command.table, labels)
    if command.table != Table():
        raise ValueError("--file, --label, --domain and --split need a table: add --metadata")
    return read_domains(name, source, command.domains, labels, command.allow_count)


def choose_score(command: ShardSet, source: Source) -> Score:
    """Return the declared score, or the default for this kind of set."""
    if command.score is None:
        by_domain: Score = "worst-domain" if command.table.metadata else "mean-over-domains"
        return by_domain if source.domains else "top1"
    if command.score in get_args(DomainScore) and not source.domains:
        raise ValueError(
            f"--score {command.score} needs domains; name them with --domains or --domain"
        )
    return command.score


def say(listed: Listed) -> None:
    """Print a summary of the set, and warnings."""
    source, labels = listed.source, listed.labels
    print(f"found {len(source.items):,} images: {printable(source.layout)}")
    for note in [*listed.notes, *filter(None, [source.links])]:
        print(printable(note))
    if source.domains:
        counts = Counter(item.domain for item in source.items).values()
        print(
            f"domains: {len(source.domains):,}, with {min(counts):,} to {max(counts):,} images each"
        )
    present = len({item.label for item in source.items})
    print(
        f"classes: {present:,} of {len(labels):,} have images; {len(source.groups):,} compete; "
        f"score: {source.score}; in the OOD average: {'yes' if source.ood else 'no'}"
    )
    for doubt in doubts(labels) if labels != LabelSpace.imagenet() else ():
        log.warning(doubt)
