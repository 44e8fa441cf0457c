"""Names of the packed sets below a data root, and the error for a set that does not exist."""

import contextlib
from collections.abc import Iterable
from difflib import get_close_matches

from rft.sets import BENCHMARKS
from rft.shards.folder import MANIFEST, PLAN
from rft.storage import files
from rft.storage.urls import set_name

LOOKED_AT = 50  # folders of a root; each costs a request on a remote store
SHOWN = 12  # sets in a message
UNFINISHED = "packing has not finished; rerun the same command"
CHOOSE = (
    "name one with --train-set NAME (training), --sets NAME (evaluation) or --set NAME (others), "
    "or check --data"
)


def set_names(names: Iterable[str], option: str) -> tuple[str, ...]:
    """Normalise the names of sets, and drop repeated ones.

    Raises:
        ValueError: naming the option, if no name is given, or one is not a valid name of a set.
    """
    found = tuple(dict.fromkeys(set_name(name, option) for name in names))
    if not found:
        raise ValueError(f"{option} needs the name of at least one packed set below --data")
    return found


def packed_sets(root: str, most: int | None = LOOKED_AT) -> list[str]:
    """List the folders of `root` that hold a manifest, sorted.

    At most `most` folders are checked; None checks all.

    Raises:
        OSError: if the store cannot list them.
        ValueError: if the URL cannot be opened.
    """
    folders = files.folders(root)[:most]
    return [name for name in folders if files.exists(files.join(root, name, MANIFEST))]


def why_missing(url: str, *, as_path: bool = False) -> str:
    """Guess from the files around a URL why it has no manifest, as a hint; empty if unknown.

    With `as_path`, sets are named by their paths, for a command without --data.
    """
    if url.startswith(("http://", "https://")):
        return ""  # web servers have no listing
    with contextlib.suppress(OSError, ValueError):
        return _path_hint(url) if as_path else _hint(url)
    return ""


def _path_hint(url: str) -> str:
    root, _, name = url.rstrip("/").rpartition("/")
    if PLAN in files.names(url):
        return UNFINISHED
    found = packed_sets(root or ".")
    if not found:
        return f"no folder of {root or '.'} is a packed set; name the folder of one"
    close = get_close_matches(name, found, n=1)
    which = f"did you mean {files.join(root, *close)}?" if close else "name one of them"
    return f"the packed sets there are {_listed([files.join(root, one) for one in found])}; {which}"


def _hint(url: str) -> str:
    root, _, name = url.rstrip("/").rpartition("/")
    # the plan is written first and the manifest last
    if PLAN in files.names(url):
        return UNFINISHED
    if found := packed_sets(root):
        close = get_close_matches(name, found, n=1)
        hint = f"did you mean {close[0]!r}?" if close else CHOOSE
        if name in BENCHMARKS:  # no typing error
            hint = f"pack {name} too (docs/data.md), or {CHOOSE}"
        return f"{root} has the sets {_listed(found)}; {hint}"
    # --data is one level too deep
    if files.exists(files.join(root, MANIFEST)):
        return f"{root} is a packed set itself; --data is the folder above it"
    # --data is one level too high
    below = files.folders(root)[:LOOKED_AT]
    for folder in below:
        if found := packed_sets(files.join(root, folder)):
            where = files.join(root, folder)
            return f"{where} has the sets {_listed(found)}; did you mean --data {where}?"
    if not below and not files.names(root):
        return f"nothing exists at {root}; check --data"
    return f"no folder of {root} is a packed set; check --data, or pack one (docs/data.md)"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
