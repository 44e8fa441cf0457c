"""The question of equal file names in a cache (T8), for peers with a cache."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers import processes
from benchmarks.peers.experiments import Verdict, short
from benchmarks.peers.samples import Sample, photographs


def equal_names(
    write: Callable[[Sequence[Sample], Path], None],
    read: Callable[[str, str], list[int]],
    work: Path,
    *,
    variables: Callable[[str], tuple[str, dict[str, str]]],
) -> Verdict:
    """Read `train` and then `val`, whose shards have the same names, through the same cache folder.

    `read` takes a set's URL and the cache and returns the numbers that came; `variables` is
    `Peer.remote` for the server's URL.
    """
    import os

    web, cache = work / "names", str(work / "names-cache")
    for name, first in (("train", 0), ("val", 5000)):
        ended = processes.call(
            lambda name=name, first=first: write(photographs(first=first), web / name),
            work / "made",
        )
        assert ended.error is None, ended.error
    with processes.server(web, work / "made", None) as (url, _):
        came = {}
        for name in ("train", "val"):

            def job(name: str = name) -> list[int]:
                root, environment = variables(url)
                os.environ.update(environment)
                return [int(number) for number in read(f"{root}/{name}", cache)]

            ended = processes.call(job, work / "made")
            if ended.error is not None:
                said = f"reading {name} through the same cache folder: {short(ended.error)}"
                if name == "train":  # no earlier file could have been mistaken for its own
                    return Verdict("not run", said)
                return Verdict("pass" if "already" in ended.error.lower() else "fail", said)
            came[name] = ended.value
    wrong = sum(number < 5000 for number in came["val"])
    return Verdict(
        "fail" if wrong or not came["val"] else "pass",
        f"{wrong} of {len(came['val'])} samples of val were those of train",
    )
