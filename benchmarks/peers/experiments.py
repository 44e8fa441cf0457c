"""The experiments: each takes a peer and an empty folder and returns its observations.

They are the same for all peers; differences (how a peer reads, writes, caches, resumes) are in
`Peer`.
"""

import gc
import json
import os
import random  # noqa: TID251 - moments to kill at are no part of a training run
import re
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from benchmarks.peers import processes
from benchmarks.peers.processes import Delivered, call, deliver
from benchmarks.peers.samples import (
    COUNT,
    GLOBAL_BATCH,
    NAMES,
    Batch,
    Decode,
    Place,
    Reading,
    Sample,
    damaged,
    descriptors,
    photographs,
)
from benchmarks.servers.faults import Fault

Result = Literal["pass", "fail", "n.a.", "not run"]
TESTS = tuple(f"T{number}" for number in range(1, 14))
# ranks, loader processes: together at most as many as shards
LAYOUTS = ((1, 0), (1, 3), (2, 0), (2, 2), (4, 1), (8, 0), (8, 2))
EVALUATION_RANKS = (1, 3, 7, 8)
FULL_STEPS = COUNT // GLOBAL_BATCH  # what comes after is a tail
KILLS = 60  # the remains of a kill depend on its moment: sometimes there are none
EPOCHS = 12
BOX = 120.0  # seconds per experiment, excluding its last process


@dataclass(frozen=True)
class Verdict:
    """The answer to one question."""

    result: Result
    seen: str
    """The observations, in numbers."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a library is used, according to its documentation."""

    write: Callable[[Sequence[Sample], Path], None]
    """Writes a set in the library's format."""
    train: Callable[[Reading], Callable[[int], Iterator[Batch]]]
    """Builds a loader that starts an epoch by its number: shuffled, over all ranks."""
    evaluate: Callable[[Reading], Iterator[Batch]]
    """One pass for evaluation."""
    first_rank_evaluates: bool = False
    """Whether only the first rank evaluates."""
    suffix: str
    """Of its shards."""
    place: Callable[[Path], Place]
    """Where a shard is damaged."""
    remote: Callable[[str], tuple[str, dict[str, str]]]
    """From the URL of a web server, the URL to read the set `set` there, and the environment."""
    cached: bool = False
    """Whether shards are copied to `Reading.cache` before they are read."""
    peek: Callable[[Reading], Any]
    """Looks at the first sample in the parent; returns the resources that stay open."""
    clients: tuple[str, ...] = ()
    """Modules of the classes that hold connections."""
    pack: Callable[[Sequence[Sample], Path], None] | None = None
    """The library's packer, whose output must be reproducible; None if it has none."""
    time_of_work: bytes = rb"(?!)"
    """Pattern of the times that its JSON records hold, which are not compared; none matches."""
    names: Callable[[Path], list[str]] | None = None
    """Writes photographs under NAMES into a folder and returns the names that come back."""
    own: Mapping[str, Callable[["Peer", Path], Verdict] | str] = field(default_factory=dict)
    """Experiments of its own, and reasons why a question does not apply."""


def run(peer: Peer, test: str, work: Path) -> Verdict:
    """Return a peer's answer to a question; `work` is shared by all its experiments."""
    own = peer.own.get(test)
    if isinstance(own, str):
        return Verdict("n.a.", own)
    return (own or EXPERIMENTS[test])(peer, work)


def whole_set(peer: Peer, work: Path) -> Path:
    """Return the set read by all experiments, created once."""
    folder = work / "set"
    if not folder.exists():
        ended = call(lambda: peer.write(photographs(), folder), work / "made")
        assert ended.error is None, ended.error
    return folder


def reading(source: Path | str, work: Path, **options: Any) -> Reading:
    """Return the settings to read a set with an empty cache."""
    cache = processes.new_path(work, "cache")
    return Reading(source=str(source), cache=str(cache), **options)


def train_job(
    peer: Peer,
    source: Path,
    work: Path,
    world_size: int,
    workers: int,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> list[Delivered]:
    """Return the samples of a training job's ranks in the first epoch, or after `state`."""
    order = reading(
        source,
        work / "jobs",
        batch_size=GLOBAL_BATCH // world_size,
        workers=workers,
        state=state,
    )
    return deliver(lambda rank: peer.train(order)(0), world_size, work / "jobs", **options)


def global_batches(ranks: Sequence[Delivered]) -> list[list[int]]:
    """Return the numbers of each step that all ranks did, in the order of the ranks."""
    steps = min(len(rank.numbers) for rank in ranks)
    return [
        list(chain.from_iterable(rank.numbers[step] for rank in ranks)) for step in range(steps)
    ]


def first_error(ranks: Sequence[Delivered]) -> str | None:
    """Return the first error of a job's ranks, shortened."""
    errors = [rank.error for rank in ranks if rank.error is not None]
    return short(errors[0]) if errors else None


def short(text: str, limit: int = 160) -> str:
    """Format a message as one line, without folders of this run, cut at the limit."""
    words = " ".join(text.split())
    words = " ".join(
        word if "/" not in word else word.rsplit("/", 1)[1] or word for word in words.split(" ")
    )
    return words if len(words) <= limit else f"{words[:limit]}..."


def count_of(samples: Sequence[int]) -> str:
    """Count the missing and the repeated samples of the set, in words."""
    counts = Counter(samples)
    again = sum(count - 1 for count in counts.values())
    missing = COUNT - len(counts.keys() & set(range(COUNT)))
    return f"{missing} of {COUNT} missing, {again} repeated"


def layouts(peer: Peer, work: Path) -> dict[tuple[int, int], list[Delivered]]:
    """Return the first epoch in all layouts, read once for two questions."""
    kept = work / "layouts.json"
    if not kept.exists():
        source = whole_set(peer, work)
        began = time.monotonic()
        found = []
        for ranks, workers in LAYOUTS:
            if time.monotonic() - began < BOX:
                job = train_job(peer, source, work, ranks, workers)
                found.append([ranks, workers, [vars(rank) for rank in job]])
        kept.write_text(json.dumps(found))
    document = json.loads(kept.read_text())
    return {(row[0], row[1]): [Delivered(**rank) for rank in row[2]] for row in document}


def t1(peer: Peer, work: Path) -> Verdict:
    """Compare the global batches of all layouts with those of one rank without workers."""
    found = layouts(peer, work)
    expected = global_batches(found[1, 0])[:FULL_STEPS]
    notes, equal, ordered = [], True, True
    for (ranks, workers), job in found.items():
        error = first_error(job)
        batches = global_batches(job)[:FULL_STEPS]
        same = sum(set(a) == set(b) for a, b in zip(batches, expected, strict=False))
        equal &= error is None and same == len(expected) == len(batches)
        ordered &= batches == expected
        if error is not None:
            notes.append(f"{ranks} ranks x {workers} workers: {error}")
        else:
            notes.append(f"{ranks} x {workers}: {same} of {len(expected)}")
    said = "; ".join(notes[1:])
    if equal:
        how = "in the same order" if ordered else "as sets; the order inside a batch differs"
        return Verdict(
            "pass", f"all {len(expected)} global batches equal, {how}, in {len(found)} layouts"
        )
    return Verdict(
        "fail",
        "global batches with the same samples as on one rank without workers "
        f"(ranks x workers): {said}",
    )


def t2(peer: Peer, work: Path) -> Verdict:
    """Compare each sample's tensor in all layouts; the transform has no randomness."""
    tensors: dict[int, set[int]] = {}
    found = layouts(peer, work)
    for job in found.values():
        for rank in job:
            for numbers, checksums in zip(rank.numbers, rank.checksums, strict=True):
                for number, checksum in zip(numbers, checksums, strict=True):
                    tensors.setdefault(number, set()).add(checksum)
    different = sum(len(checksums) > 1 for checksums in tensors.values())
    return Verdict(
        "fail" if different else "pass",
        f"{different} of {len(tensors)} samples have different tensors in {len(found)} layouts",
    )


def t3(peer: Peer, work: Path) -> Verdict:
    """SIGKILL two ranks in the middle of an epoch; resume with one and with four."""
    source = whole_set(peer, work)
    expected = global_batches(train_job(peer, source, work, 2, 0))[:FULL_STEPS]
    before = train_job(peer, source, work, 2, 0, kill_after=4)
    done = global_batches(before)
    state = before[0].states[len(done) - 1]
    if not len(expected) > len(done) > 0:
        return Verdict("not run", f"the kill came after step {len(done)} of {len(expected)}")
    left = expected[len(done) :]
    before_kill = sum(set(a) == set(b) for a, b in zip(done, expected, strict=False))
    notes, good = [], before_kill == len(done)
    for ranks in (1, 4):
        after = train_job(peer, source, work, ranks, 0, state)
        rest = global_batches(after)[: len(left)]
        same = sum(set(a) == set(b) for a, b in zip(rest, left, strict=False))
        again = set(chain.from_iterable(done)) & set(chain.from_iterable(rest))
        note = (
            f"on {ranks} ranks {same} of the {len(left)} batches left hold the same samples, "
            f"{len(again)} of the {GLOBAL_BATCH * len(done)} samples from before it came again"
        )
        notes.append(f"on {ranks} ranks {error}" if (error := first_error(after)) else note)
        good &= same == len(left) == len(rest)
    how = "killed after step {} of {}, resumed{}: {}".format(
        len(done),
        len(expected),
        "" if state else " (from the epoch's start: no state)",
        "; ".join(notes),
    )
    return Verdict("pass" if good else "fail", how)


def t4(peer: Peer, work: Path) -> Verdict:
    """Count an epoch of training on two ranks with two workers each."""
    job = train_job(peer, whole_set(peer, work), work, 2, 2)
    return epoch_verdict(job)


def epoch_verdict(job: Sequence[Delivered]) -> Verdict:
    """Return whether an epoch is complete: all samples once, except a tail, and equal steps."""
    if error := first_error(job):
        return Verdict("fail", error)
    samples = list(chain.from_iterable(rank.samples for rank in job))
    steps = [len(rank.numbers) for rank in job]
    whole = max(Counter(samples).values()) == 1 and len(samples) > COUNT - GLOBAL_BATCH
    seen = f"{count_of(samples)}; batches on each rank: {', '.join(map(str, steps))}"
    return Verdict("pass" if whole and len(set(steps)) == 1 else "fail", seen)


def t5(peer: Peer, work: Path) -> Verdict:
    """Count the samples that an evaluation sees."""
    source = whole_set(peer, work)
    notes, good = [], True
    for ranks in EVALUATION_RANKS:
        order = reading(source, work / "jobs", batch_size=8, workers=2)
        taking_part = 1 if peer.first_rank_evaluates else ranks
        job = deliver(lambda rank, order=order: peer.evaluate(order), taking_part, work / "jobs")
        samples = list(chain.from_iterable(rank.samples for rank in job))
        good &= sorted(samples) == list(range(COUNT)) and first_error(job) is None
        notes.append(f"{ranks} ranks: {first_error(job) or count_of(samples)}")
    return Verdict("pass" if good else "fail", "; ".join(notes))


def t6(peer: Peer, work: Path) -> Verdict:
    """Damage one shard in three ways and read the set."""
    source = work / "damaged"
    shutil.copytree(whole_set(peer, work), source)
    shard = sorted(source.glob(f"*{peer.suffix}"))[2]
    intact = read_all(peer, reading(source, work / "jobs", batch_size=8), work)
    assert intact.error is None, intact.error
    expected = checksums_of(intact)
    notes, good = [], True
    for name in damaged(shard, peer.place(shard)):
        order = reading(source, work / "jobs", batch_size=8)
        good &= told_of_damage(peer, order, work, shard, expected, name, notes)
    if peer.cached:
        order = reading(source, work / "jobs", batch_size=8)
        read_all(peer, order, work)
        copy = next(Path(order.cache).rglob(shard.name), None)
        if copy is not None:
            for name in damaged(copy, peer.place(copy)):
                where = f"{name} in the cache"
                good &= told_of_damage(peer, order, work, shard, expected, where, notes)
    return Verdict("pass" if good else "fail", "; ".join(notes))


def told_of_damage(
    peer: Peer,
    order: Reading,
    work: Path,
    shard: Path,
    expected: Mapping[int, int],
    name: str,
    notes: list[str],
) -> bool:
    """Read a damaged set, note the result, and return whether no loss was silent.

    Where the shard was refused on its way into a cache, the set is read again with the same cache.
    """
    good = True
    for run in ("", ", read again"):
        one = read_all(peer, order, work)
        wrong = sum(expected.get(n) != c for n, c in checksums_of(one).items())
        came = len(set(one.samples))
        if one.error is None:
            what = f"{came} of {COUNT} samples, {wrong} of them changed, no exception"
        else:
            what = f"{short(one.error)}" + (f" after {wrong} changed samples" if wrong else "")
        notes.append(f"{name}{run}: {what}")
        named = one.error is not None and shard.name in one.error
        good &= (named and not wrong) or (came == COUNT and not wrong)
        if not (peer.cached and one.error is not None and not run):
            break
    return good


def read_all(peer: Peer, order: Reading, work: Path, **options: Any) -> Delivered:
    """Return one pass over a set by one process."""
    return deliver(lambda rank: peer.evaluate(order), 1, work / "jobs", **options)[0]


def checksums_of(one: Delivered) -> dict[int, int]:
    """Return the checksum of each sample's tensor."""
    return dict(
        zip(chain.from_iterable(one.numbers), chain.from_iterable(one.checksums), strict=True)
    )


def t7(peer: Peer, work: Path) -> Verdict:
    """Read from a web server that interrupts every third answer."""
    whole_set(peer, work)
    notes, good = [], True
    for kind, what in (("fin", "closed"), ("rst", "reset")):
        with processes.server(work, work / "made", Fault(kind=kind, after=20_000)) as (url, counts):
            source, variables = peer.remote(url)
            order = reading(source, work / "jobs", batch_size=8)
            one = read_with(peer, order, work, variables)
            time.sleep(0.1)
            _, requests, fired = json.loads(counts.read_text())
        what = f"{fired} of {requests} answers {what} after 20 kB: "
        if one.error is None:
            what += f"{count_of(one.samples)}, no exception"
        else:
            what += f"{short(one.error)} after {len(one.samples)} samples"
        if not fired:
            return Verdict("not run", f"no request met the fault: {what}")
        notes.append(what)
        good &= one.error is None and sorted(one.samples) == list(range(COUNT))
    return Verdict("pass" if good else "fail", "; ".join(notes))


def read_with(peer: Peer, order: Reading, work: Path, variables: Mapping[str, str]) -> Delivered:
    """Return one pass by a process with additional environment variables."""

    def batches(rank: int) -> Iterator[Batch]:
        os.environ.update(variables)
        return peer.evaluate(order)

    return deliver(batches, 1, work / "jobs", seconds=15)[0]


def t9(peer: Peer, work: Path) -> Verdict:
    """Kill the packer at random moments and restart it."""
    if peer.pack is None:
        return Verdict("n.a.", "it has no packer")
    pack, samples = peer.pack, photographs()
    began = time.monotonic()
    times = []
    for name in ("reference", "again"):
        started = time.monotonic()
        ended = call(lambda name=name: pack(samples, work / "packed" / name), work / "made")
        times.append(time.monotonic() - started)
        if ended.error is not None:
            return Verdict("fail", f"a packing that nobody killed: {short(ended.error)}")
    expected = tree(work / "packed" / "reference", peer.time_of_work)
    if tree(work / "packed" / "again", peer.time_of_work) != expected:
        return Verdict("fail", "two packings that nobody killed give different bytes")
    chance, done, same, errors, cut = random.Random(0), 0, 0, [], 0
    other, left = 0, set()
    while done < KILLS and time.monotonic() - began < BOX:
        folder = work / "packed" / f"kill{done}"
        child = processes.Child(
            lambda folder=folder: pack(samples, folder), processes.new_path(work / "made", "pack")
        )
        time.sleep(chance.uniform(0, times[1]))
        child.kill()
        cut += folder.exists() and tree(folder, peer.time_of_work) != expected
        ended = call(lambda folder=folder: pack(samples, folder), work / "made")
        errors += [short(ended.error)] if ended.error is not None else []
        found = tree(folder, peer.time_of_work)
        same += ended.error is None and found == expected
        left |= found.keys() - expected.keys()
        other += any(found.get(name) != data for name, data in expected.items())
        done += 1
    seen = f"{same} of {done} times the same files; {cut} of the kills left files behind"
    seen += f"; {other} times other bytes in a file of the set" if same < done else ""
    seen += f"; files too many after the second run: {', '.join(sorted(left))}" if left else ""
    seen += f"; {len(errors)} of the second runs failed: {errors[0]}" if errors else ""
    return Verdict("pass" if same == done else "fail", seen)


def tree(folder: Path, time_of_work: bytes) -> dict[str, bytes]:
    """Return the files of a folder and their bytes, without the times that JSON files hold."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            plain = re.sub(time_of_work, b"", data) if path.suffix == ".json" else data
            found[str(path.relative_to(folder))] = plain
    return found


def t10(peer: Peer, work: Path) -> Verdict:
    """Write photographs under ImageNet-A's names and read them back."""
    assert peer.names is not None
    names = peer.names
    ended = call(lambda: names(work / "named"), work / "made")
    if ended.error is not None:
        return Verdict("fail", short(ended.error))
    good = sorted(ended.value) == sorted(NAMES)
    return Verdict(
        "pass" if good else "fail",
        f"{len(NAMES)} names in, {len(ended.value)} samples out, "
        f"{len(set(ended.value) & set(NAMES))} of them with their name"
        + ("" if good else f"; the first is {ended.value[0]!r}" if ended.value else ""),
    )


def t11(peer: Peer, work: Path) -> Verdict:
    """Measure this process's memory and descriptors after each of twelve epochs."""
    source = whole_set(peer, work)
    notes, good = [], True
    for workers in (0, 2):
        order = reading(source, work / "jobs", workers=workers)

        def epochs(order: Reading = order) -> list[tuple[int, int]]:
            loader, after = peer.train(order), []
            for epoch in range(EPOCHS):
                for _ in loader(epoch):
                    pass
                gc.collect()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                after.append((pages * resource.getpagesize(), len(descriptors())))
            return after

        ended = call(epochs, work / "made")
        if ended.error is not None:
            return Verdict("fail", f"{workers} workers: {short(ended.error)}")
        settled = ended.value[2:]
        growth = max(size for size, _ in settled) / settled[0][0] - 1
        counts = [count for _, count in settled]
        half = len(counts) // 2
        # waited for, because processes that have just ended may still be listed
        good &= growth <= 0.05 and counts[-1] <= max(counts[:half])
        notes.append(
            f"{workers} workers: memory {100 * growth:+.1f}%, "
            f"descriptors {counts[0]}, at most {max(counts)}, at last {counts[-1]} "
            f"in {len(settled)} epochs"
        )
    return Verdict("pass" if good else "fail", "; ".join(notes))


def t12(peer: Peer, work: Path) -> Verdict:
    """Look at a sample in the parent, then start workers and inspect their inherited resources."""
    whole_set(peer, work)
    notes, good = [], True
    with processes.server(work, work / "made", None) as (url, _):
        remote, variables = peer.remote(url)
        for where, source in (("local", str(work / "set")), ("remote", remote)):
            report = processes.new_path(work / "made", "inherited")
            order = reading(source, work / "jobs", batch_size=8)

            def job(order: Reading = order, report: Path = report) -> list[int]:
                os.environ.update(variables)
                return inheritance(peer, order, report)

            ended = call(job, work / "made")
            told = [path.read_text().split() for path in report.parent.glob(f"{report.name}.*")]
            if ended.error is not None or not told:
                return Verdict(
                    "not run", f"{where}: {short(ended.error or 'no worker read anything')}"
                )
            parent, clients = ended.value
            forked = any(int(words[0]) == parent for words in told)
            held = max(int(words[1]) for words in told)
            clients = clients if forked else 0
            good &= held == clients == 0
            notes.append(
                f"{where}: {held} of the parent's descriptors and {clients} of its clients in a "
                f"worker, which is {'forked from it' if forked else 'not its child'}"
            )
    return Verdict("pass" if good else "fail", "; ".join(notes))


def inheritance(peer: Peer, order: Reading, report: Path) -> list[int]:
    """Peek, then read with two reporting workers; return this process and its client count."""
    before = set(descriptors().values())
    held = peer.peek(order)
    opened = tuple(target for target in descriptors().values() if target not in before)
    # some extension types have a descriptor instead of a name
    modules = (str(type(thing).__module__) for thing in gc.get_objects())
    clients = sum(module.startswith(peer.clients) for module in modules)
    watched = replace(order, workers=2, decode=Decode(str(report), opened))
    for _ in peer.train(watched)(0):
        pass
    del held
    return [os.getpid(), clients]


def t13(peer: Peer, work: Path) -> Verdict:
    """Resume from a state with a different seed, set at the same URL, or batch."""
    source = whole_set(peer, work)
    job = train_job(peer, source, work, 1, 0, kill_after=3)
    state = job[0].states[2]
    other = work / "other"
    call(lambda: peer.write(photographs(first=1000), other), work / "made")
    place, kept = work / "set", work / "kept"
    notes, good = [], True
    for what, options, swapped in (
        ("another seed", {"seed": 7}, False),
        ("half the batch", {"batch_size": GLOBAL_BATCH // 2}, False),
        ("another set in the same place", {}, True),
    ):
        if swapped:
            place.rename(kept)
            shutil.copytree(other, place)
        order = reading(source, work / "jobs", state=state, **options)
        one = deliver(lambda rank, order=order: peer.train(order)(0), 1, work / "jobs")[0]
        if swapped:
            shutil.rmtree(place)
            kept.rename(place)
        good &= one.error is not None
        went_on = f"went on, {len(one.samples)} samples, no exception"
        notes.append(f"{what}: {short(one.error) if one.error else went_on}")
    return Verdict("pass" if good else "fail", "; ".join(notes))


EXPERIMENTS: dict[str, Callable[[Peer, Path], Verdict]] = {
    "T1": t1,
    "T2": t2,
    "T3": t3,
    "T4": t4,
    "T5": t5,
    "T6": t6,
    "T7": t7,
    "T9": t9,
    "T10": t10,
    "T11": t11,
    "T12": t12,
    "T13": t13,
}
