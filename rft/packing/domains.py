"""Sets with domains, given by nested folders: DOMAIN/CLASS/IMAGE, to any depth.

ImageNet-C has two levels, CORRUPTION/SEVERITY/CLASS/IMAGE, and any part of it may be present. A
domain is named by its folders ("fog/3"). As for every benchmark, class folders hold only images and
none may be empty: an incomplete set would still give a number.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from rft.classes import composed
from rft.packing.expected import is_imagenet
from rft.packing.foreign.class_names import folder_hint
from rft.packing.layouts import class_folders, in_threads, list_images
from rft.packing.names import Links
from rft.packing.own_folder import name_classes
from rft.packing.source import Found, Source, make_items
from rft.sets import BENCHMARKS, CORRUPTIONS, ID_SET, SEVERITIES
from rft.shards.label_space import LabelSpace
from rft.text import printable, shown

SHOWN = 12  # names on a line
DOMAIN_LETTERS = 1000  # the manifest's limit of a name


class Listed(NamedTuple):
    """A source to pack as one set, its label space, and notes to print."""

    source: Source
    labels: LabelSpace
    notes: list[str]


def read_domains(
    name: str,
    source: Path,
    depth: int,
    labels: LabelSpace | None,
    allowed_count: int | None = None,
) -> Listed:
    """List the images below `source`, whose class folders lie under `depth` levels of domains.

    The default label space is ImageNet's if all class folders belong to it, otherwise their names.
    Each of ImageNet-C's domains must have as many images as ImageNet's validation set, unless
    `allowed_count` gives their total.

    Raises:
        ValueError: if a folder is empty or a class unknown, a file is not an image, or a domain of
            ImageNet-C is incomplete.
    """
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    links = Links(source)
    domains = _domain_folders(source, depth)
    places = {
        (domain, folder): root / folder
        for domain, root in domains.items()
        for folder in class_folders(root)
    }
    # all folders of all domains at once: listing is latency-bound on network file systems
    listed = in_threads(lambda place: list_images(places[place], links), list(places))
    classes: dict[str, list[Found]] = defaultdict(list)
    for (domain, folder), images in listed.items():
        # folders of one name in several domains are the same class
        above = f"{domain}/" if domain else ""
        classes[composed(folder)] += [
            image._replace(path=above + image.path, domain=domain) for image in images
        ]
    labels = labels or choose_labels(classes)
    require_known(source, classes, labels)
    found = Source(
        dataset=name,
        root=source,
        items=make_items(classes, labels.class_of),
        groups=labels.groups,
        layout=f"{len(classes):,} classes in {len(domains):,} folders of {source}"
        if depth
        else f"{len(classes):,} class folders of {source}",
        links=links.said(),
    )
    check_corrupted(found, labels, allowed_count)
    return Listed(found, labels, missing_corruptions(found.domains))


def choose_labels(folders: Collection[str]) -> LabelSpace:
    """Choose ImageNet's label space if all class folders belong to it, otherwise their names."""
    imagenet = LabelSpace.imagenet()
    return imagenet if set(folders) <= set(imagenet.ids) else name_classes(folders)


def require_known(source: Path, classes: Iterable[str], labels: LabelSpace) -> None:
    """Check that classes belong to a label space.

    Raises:
        ValueError: naming the first that does not.
    """
    if unknown := sorted(set(classes) - set(labels.ids)):
        raise ValueError(
            f"unknown class: {shown(unknown[0])} in {source} is not one of the {len(labels)} "
            f"classes; {folder_hint(unknown[0], labels) or 'remove it or add it to --classes'}"
        )


def only_present(source: Source) -> Source:
    """Let only classes with images compete, as ImageNet-R and -A are scored."""
    present = sorted({item.label for item in source.items})
    return replace(source, groups=tuple((label,) for label in present))


def missing_corruptions(domains: Sequence[str]) -> list[str]:
    """List the missing corruptions and severities of ImageNet-C; nothing for other sets.

    A corruption that lacks all severities is listed once.
    """
    if not is_corrupted(domains):
        return []
    here = {domain.split("/")[0] for domain in domains}
    lines = []
    if whole := [name for name in CORRUPTIONS if name not in here]:
        lines.append(f"missing corruptions of ImageNet-C: {', '.join(whole)}")
    known = map("/".join, product(CORRUPTIONS, SEVERITIES))
    if parts := [one for one in known if one.split("/")[0] in here and one not in domains]:
        more = f" and {len(parts) - SHOWN} more" if parts[SHOWN:] else ""
        lines.append(f"missing severities: {', '.join(parts[:SHOWN])}{more}")
    return lines


def is_corrupted(domains: Sequence[str]) -> bool:
    """Whether all domains have names of ImageNet-C's corruptions and severities."""
    known = set(map("/".join, product(CORRUPTIONS, SEVERITIES)))
    return bool(domains) and set(domains) <= known


def check_corrupted(source: Source, labels: LabelSpace, allowed_count: int | None) -> None:
    """Check the number of images in each domain of ImageNet-C, or the allowed total.

    Raises:
        ValueError: naming the first domain with a different number, or the allowed number.
    """
    # the user's total replaces the check of each domain
    if allowed_count is not None:
        if len(source.items) != allowed_count:
            raise ValueError(
                f"{source.dataset} has {len(source.items):,} images here, --allow-count says "
                f"{allowed_count:,}; it must be the exact number of images"
            )
        return
    if not (is_imagenet(labels) and is_corrupted(source.domains)):
        return
    counts = Counter(item.domain for item in source.items)
    wanted = BENCHMARKS[ID_SET].images
    for domain, count in sorted(counts.items()):
        if count != wanted:
            raise ValueError(
                f"{source.root / domain} has {count:,} images, {wanted:,} were published; extract "
                f"it again, or accept this copy with --allow-count {len(source.items)}"
            )


def _domain_folders(source: Path, depth: int) -> dict[str, Path]:
    """Find the folders at a depth, by the name of their domain."""
    found = {"": source}
    for _ in range(depth):
        found = {
            f"{above}/{name}" if above else name: root / name
            for above, root in found.items()
            for name in class_folders(root)
        }
    for domain in found:
        require_domain(domain, f"{source / domain}")
    return found


def require_domain(domain: str, place: str) -> None:
    """Check that a manifest can hold the name of a domain; `place` is its location, for messages.

    Raises:
        ValueError: if it is too long or not printable.
    """
    if len(domain) > DOMAIN_LETTERS or printable(domain) != domain:
        raise ValueError(
            f"{printable(place, DOMAIN_LETTERS)}: a domain needs a printable name of at most "
            f"{DOMAIN_LETTERS:,} letters; rename it"
        )
