"""Run two checkouts of rft on the same inputs and compare outputs that must not change.

Compares shard bytes, sample order, weights, counts, reports and --help, and checks that NEW resumes
and reads the runs of OLD. Uses public commands only, so the module layout may differ. Takes ten
minutes. Writes versions.json, versions.md (with lines of code per folder) and help.diff (all
printed texts); exit code 1 if anything differs. Not compared, because it differs between two runs
of one tree or names the commit:

- provenance.json, and "provenance" in other JSON files
- tensorboard/, columns of metrics.jsonl outside COLUMNS, the output of packing, "seconds"
- checkpoints/step-*.pt and progress.json, which has their hash; instead, NEW must resume OLD's
"""

import argparse
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FAILED = "FAILED"  # prefix of a value that could not be computed; such a row always differs
STAMP = re.compile(r"\S+ \S+ \[0\] INFO: ")  # prefix of a log line
PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
PLAIN["OMP_NUM_THREADS"] = "1"  # the thread count changes the order of sums
PARTS = {"tars": "*.tar", "index": "index.npz", "manifest": "manifest.json", "plan": "plan.json"}
COLUMNS = ("step", "epoch", "loss", "ce", "mse", "kd", "replaced", "grad_norm", "lr")
COLUMNS += ("read_mb", "held_out_correct", "held_out_total")
RECIPE, RUNS = "object-mask-single-fill", "demo/runs"
RUN, MODELS = f"{RUNS}/{RECIPE}-seed0", f"{RUNS}/vanilla-seed0 {RUNS}/no-mask-seed0"
# relative to the working folder of each tree: both pack the images of OLD
WORLD = "../old/demo/world"
CLASSES = f"--classes {WORLD}/classes.json"
BATCHES = ((0, 0, 1), (0, 24, 2), (1, 3, 4), (7, 11, 1), (29, 24, 8))  # epoch, step, ranks
PACK = (
    f"tools/shard_imagenet.py --source {WORLD} {CLASSES} --out packed-KIND",
    "tools/shard_ood.py --benchmark imagenet-v2 imagenet-r imagenet-sketch objectnet imagenet-a "
    f"--source {WORLD} {CLASSES} --out packed-KIND",
    f"tools/shard_folder.py --source {WORLD}/imagenet/val --out photos-KIND",
)
DERIVE = (
    "tools/index_shards.py indexed/own/{0..1}.tar --out indexed/own " + CLASSES,
    "tools/verify_shards.py indexed/own --deep --report verified.json",
    f"rft.evaluate.localisation {RUN} --data demo/shards --masks {WORLD}/masks/imagenet/train "
    "--classes all --samples 400 --workers 0",
    f"rft.merge uniform-soup {MODELS} --out made/uniform-soup",
    f"rft.merge greedy-soup {MODELS} --out made/greedy-soup --data demo/shards --workers 0",
    f"rft.convert export {RUN} --to open-clip --out made/open-clip",
    # the other formats require OpenAI's image towers, which the demo does not use
    f"rft.convert export {RUN} --to safetensors --out made/model.safetensors",
    "rft.convert import made/open-clip --data demo/shards --out made/imported",
)
HELP = ("rft.train", "rft.evaluate", "rft.evaluate.localisation", "rft.merge", "rft.merge wise")
HELP += ("rft.merge uniform-soup", "rft.merge greedy-soup", "rft.convert", "rft.convert import")
HELP += ("rft.convert export", "rft.experiments", "rft.demo", "rft.demo paper", "rft.report")
HELP += ("rft.demo pretrain", "rft.data.show", "tools/shard_imagenet.py", "tools/shard_ood.py")
HELP += ("tools/shard_folder.py", "tools/index_shards.py", "tools/verify_shards.py")
SHOW = "rft.data.show {} --epoch {} --step {} --world-size {}"
PRINTED = tuple(f"{name} --help" for name in HELP)
PRINTED += tuple(SHOW.format(RUN, *numbers) for numbers in BATCHES)
PRINTED += ("rft.experiments --runs runs --data data --lines", "rft.env")
COMPARED = ("packed-*/*", "photos-*/*", "indexed/*", "verified.json", "demo/world")
COMPARED += ("demo/shards/*", "demo/report/*", f"{RUNS}/*/*.json", f"{RUNS}/*/*.npz")
COMPARED += (f"{RUNS}/*/checkpoints/*.safetensors", "made/*")
TRAIN = f"rft.train {RECIPE} --data ../old/demo/shards --scale miniature --optim.epochs 2 "
TRAIN += "--log.checkpoint-steps 10 --run-dir"


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A checkout, the working folder of its commands, and their output."""

    path: Path
    revision: str
    folder: Path
    texts: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def start(self, command: str, folder: Path | None = None) -> subprocess.Popen[str]:
        """Start a command: a module of rft or a file in tools/, and its arguments."""
        program, *words = shlex.split(command)
        # call a file through a link with a fixed name, because --help prints and wraps its path
        start = ["-m", program] if program.startswith("rft") else [f"tree/{program}"]
        environment = {**os.environ, **PLAIN, "PYTHONPATH": str(self.path)}
        options: dict[str, Any] = {"cwd": folder or self.folder, "env": environment, "text": True}
        options |= dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, *start, *words], **options)

    def run(self, command: str, folder: Path | None = None) -> str:
        """Run a command and return its output, or one line with the reason of the failure."""
        process = self.start(command, folder)
        output, errors = process.communicate()
        if process.returncode == 0:
            return self.neutral(output)
        last = (errors.strip() or "nothing on stderr").splitlines()[-1]
        self.failures.append(self.neutral(f"{FAILED}: {command}: {last}"))
        print(f"  {self.failures[-1]}", flush=True)
        return self.failures[-1]

    def neutral(self, text: str) -> str:
        """Replace the tree's path and commit in a text by fixed words."""
        text = text.replace(str(self.path), "TREE").replace(self.revision, "COMMIT")
        return re.sub(" +$", "", text, flags=re.MULTILINE)  # table widths depend on the commit

    def digest(self, *paths: Path) -> str:
        """Hash the names and contents of files and folders, without provenance."""
        files = [file for path in sorted(paths) for file in (path, *sorted(path.rglob("*")))]
        files = [file for file in files if file.is_file() and file.name != "provenance.json"]
        known = [f"{file.name} {hashlib.sha256(self._content(file)).hexdigest()}" for file in files]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12] if files else "none"

    def value(self, path: Path) -> str:
        """Hash a file or folder; for a packed set, also its parts."""
        parts = PARTS if (path / "manifest.json").exists() else {}
        hashes = [f"{name} {self.digest(*path.glob(part))}" for name, part in parts.items()]
        return ", ".join([*hashes, self.digest(path)])

    def _content(self, path: Path) -> bytes:
        data = path.read_bytes()
        if path.parent.name == "commit":  # the record of a shard, which includes the packing time
            return re.sub(rb'"seconds": ?[^,}]+', b"", data)
        if path.suffix == ".json" and b'"provenance"' in data:
            return json.dumps({**json.loads(data), "provenance": None}, sort_keys=True).encode()
        return self.neutral(data.decode()).encode() if path.suffix == ".html" else data


def main() -> None:
    """Compare the two trees given on the command line."""
    kept = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kept)
    parser.add_argument("old", type=Path, metavar="OLD", help="folder of a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", help="folder of the checkout to compare")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        old = prepare(arguments.old.resolve(), Path(scratch) / "old")
        new = prepare(arguments.new.resolve(), Path(scratch) / "new")
        for tree in (old, new):
            run_all(tree)
        handed = hand_over(old, new, Path(scratch) / "handed")
        rows = [*handed, *file_rows(old, new), *text_rows(old, new)]
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started),
        "python": sys.version.split()[0],
        "torch": importlib.metadata.version("torch"),
        **{"old": old.revision, "new": new.revision, "rows": rows},
        "lines": {"old": lines_of_python(old.path), "new": lines_of_python(new.path)},
    }
    (arguments.out / "versions.json").write_text(json.dumps(document, indent=2) + "\n")
    (arguments.out / "versions.md").write_text(to_markdown(document))
    print(to_markdown(document))
    lines = [f"{line}\n" for command in PRINTED for line in diff(old, new, command)]
    (arguments.out / "help.diff").write_text("".join(lines))
    sys.exit(0 if all(one["same"] for one in rows) else 1)


def prepare(path: Path, folder: Path) -> Tree:
    """Set up a tree with an empty working folder; check that it imports its own rft."""
    folder.mkdir()
    (folder / "tree").symlink_to(path)
    where = [sys.executable, "-c", "import rft; print(rft.__file__)"]
    options = {"env": {**os.environ, "PYTHONPATH": str(path)}, "cwd": folder}
    found = subprocess.run(where, capture_output=True, text=True, **options).stdout.strip()
    if found != str(path / "rft" / "__init__.py"):
        sys.exit(f"error: rft is imported from {found or 'nowhere'}, not from {path}")
    describe = ["git", "-C", str(path), "describe", "--always", "--dirty", "--abbrev=12"]
    revision = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return Tree(path=path, revision=revision, folder=folder)


def run_all(tree: Tree) -> None:
    """Run every command in a tree; all output stays in its folder."""
    print(f"running every command in {tree.path} ({tree.revision})", flush=True)
    made = tree.run("rft.demo --out demo --epochs 1")
    # both trees pack the images of OLD's demo; if NEW's demo fails, only its own rows differ
    if made.startswith(FAILED) and tree.folder.name == "old":
        sys.exit(f"error: the demo of {tree.path} failed, so nothing can be compared: {made}")
    for kind in ("original", "jpeg", "pixels"):
        for command in PACK:
            # small shards, so that the demo's sets have several
            options = f"--encoding {kind} --size 48 --shard-mb 2 --workers 1"
            tree.run(f"{command.replace('KIND', kind)} {options}")
    write_tars(tree.folder / WORLD / "imagenet/val", tree.folder / "indexed/own")
    for command in DERIVE:
        tree.run(command)
    # these commands only print, so they can run in parallel
    with ThreadPoolExecutor(2) as pool:
        tree.texts.update(zip(PRINTED, pool.map(tree.run, PRINTED), strict=True))


def write_tars(images: Path, folder: Path) -> None:
    """Write two WebDataset tars from a folder of classes; `tarfile` sets all times to 0."""
    folder.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for label, of_class in enumerate(sorted(images.iterdir())):
                # every twentieth image, different ones in each tar
                for path in sorted(of_class.iterdir())[number::20]:
                    for suffix, data in (("jpg", path.read_bytes()), ("cls", b"%d" % label)):
                        member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, BytesIO(data))


def hand_over(old: Tree, new: Tree, folder: Path) -> Iterator[dict[str, Any]]:
    """Check that NEW finishes a run that OLD started, and recognises finished runs of OLD."""
    print("running NEW on the runs of OLD", flush=True)
    folder.mkdir()
    old.run(f"{TRAIN} whole", folder)
    stopped = stop_part_way(old, f"{TRAIN} part", folder)
    resumed = new.run(f"{TRAIN} part", folder)
    weights = [old.digest(*(folder / run).glob("*/*.safetensors")) for run in ("whole", "part")]
    # if the run could not be stopped or resumed, the reason instead of a hash
    weights[1] = next((text for text in (stopped, resumed) if FAILED in text), weights[1])
    yield row(f"OLD's run, {stopped}, ended by NEW: weights", *weights)
    counts = metrics(folder / "whole", folder / "part", COLUMNS[-2:])
    yield row("OLD's run, ended by NEW: held-out counts", *counts)
    kept = (folder / "whole", old.folder / RUNS)
    before = old.digest(*kept)
    runs = " ".join(f"../old/{RUNS}/{path.name}" for path in sorted((old.folder / RUNS).iterdir()))
    evaluation = f"rft.evaluate {runs} --data ../old/demo/shards"
    for name, command in (("training", f"{TRAIN} whole"), ("evaluation", evaluation)):
        # the first line reports that nothing is left to do
        texts = [tree.run(command, folder).partition("\n")[0] for tree in (old, new)]
        texts = [STAMP.sub("", text) for text in texts]
        yield row(f"OLD's {name}, once more", *texts)
    for tree in (old, new):
        tree.run(f"rft.report {runs} --out {tree.folder.name}", folder)
    tables = [tree.digest(folder / tree.folder.name / "table.csv") for tree in (old, new)]
    yield row("table.csv of a report of OLD's runs", *tables)
    yield row("OLD's run folders, after all this", before, old.digest(*kept))


def stop_part_way(tree: Tree, command: str, folder: Path) -> str:
    """Start a training and stop it cleanly after its first checkpoint; return the step."""
    progress = folder / "part" / "progress.json"
    process = tree.start(command, folder)
    # progress.json appears with the first checkpoint
    while process.poll() is None and not progress.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    if process.returncode != 75 or not progress.exists():  # EX_TEMPFAIL: resumable
        return f"{FAILED}: not stopped, exit code {process.returncode}"
    reached = json.loads(progress.read_text())
    return f"stopped at step {reached['step']} of {reached['of']}"


def file_rows(old: Tree, new: Tree) -> Iterator[dict[str, Any]]:
    """Compare the packed sets, the demo's world, runs and report, and files derived from them."""
    paths = [path for pattern in COMPARED for path in sorted(old.folder.glob(pattern))]
    for path in paths:
        if path.name not in ("provenance.json", "progress.json"):
            name = str(path.relative_to(old.folder))
            yield row(name, old.value(path), new.value(new.folder / name))
    for path in sorted((old.folder / RUNS).glob("*/metrics.jsonl")):
        name = f"{RUNS}/{path.parent.name}"
        yield row(f"{name}/metrics.jsonl", *metrics(old.folder / name, new.folder / name))


def metrics(old: Path, new: Path, columns: Sequence[str] = COLUMNS) -> list[str]:
    """Summarise the logs of two runs in the columns that OLD has; NEW may have more."""
    files = [[*run.glob("metrics.jsonl")] for run in (old, new)]
    logs = [[json.loads(line) for file in one for line in file.open()] for one in files]
    columns = [name for name in columns if any(name in line for line in logs[0])]
    values = []
    for log in logs:
        lines = [[line.get(name) for name in columns] for line in log if {*columns} & {*line}]
        # in addition to the hash, to show how far two runs differ
        loss = next((line["loss"] for line in log[::-1] if "loss" in line), "none")
        values.append(f"{summary(chr(10).join(map(str, lines)))}, last loss {loss}")
    return values


def summary(text: str) -> str:
    """Summarise a text by its number of lines and its hash."""
    return f"{len(text.splitlines())} lines, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def text_rows(old: Tree, new: Tree) -> Iterator[dict[str, Any]]:
    """Compare printed texts; if they differ, NEW's value counts the changed lines."""
    for name in PRINTED:
        texts = [tree.texts[name] for tree in (old, new)]
        values = [text if FAILED in text else summary(text) for text in texts]
        # skip the two header lines, whose + and - are no changes
        if lines := diff(old, new, name)[2:]:
            added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
            values[1] += f" (+{added} -{removed} lines)"
        yield row(name, *values)
    failures = ["; ".join(tree.failures) or "not one" for tree in (old, new)]
    yield row("commands that failed", *failures)


def diff(old: Tree, new: Tree, name: str) -> list[str]:
    """Make a unified diff of a command's output in both trees; empty if it is the same."""
    before, after = (tree.texts[name].splitlines() for tree in (old, new))
    return list(difflib.unified_diff(before, after, f"OLD {name}", f"NEW {name}", lineterm=""))


def lines_of_python(tree: Path) -> dict[str, int]:
    """Count the lines of Python in each folder of a checkout and each package of rft."""
    listed = ["git", "-C", str(tree), "ls-files", "*.py"]
    counts: Counter[str] = Counter()
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split():
        folders = name.split("/")[:-1]
        lines = len((tree / name).read_bytes().splitlines())
        counts[folders[0] if folders else "."] += lines
        if folders[:1] == ["rft"]:
            counts["rft/" + "/".join(folders[1:2])] += lines
    return dict(sorted(counts.items()))


def to_markdown(document: dict[str, Any]) -> str:
    """Format the result as a page: the number of differing rows, all rows, lines of Python."""
    rows, page = document["rows"], "OLD is {old}, NEW is {new}; {date}, Python {python}, "
    lines = [(page + "torch {torch}, {seconds} s.").format(**document)]
    lines += [f"{sum(not one['same'] for one in rows)} of {len(rows)} rows differ.", ""]
    lines += ["| compared | OLD | NEW | same |", "|---|---|---|---|"]
    for one in rows:
        new, same = ("=", "yes") if one["same"] else (one["new"], "**no**")
        lines.append(f"| {one['name']} | {one['old']} | {new} | {same} |")
    lines += ["", "| lines of Python | OLD | NEW |", "|---|--:|--:|"]
    before, after = document["lines"]["old"], document["lines"]["new"]
    for name in sorted({**before, **after}):
        lines.append(f"| {name} | {before.get(name, 0):,} | {after.get(name, 0):,} |")
    return "\n".join(lines) + "\n"


def row(name: str, old: str, new: str) -> dict[str, Any]:
    """Make one row of the comparison; a failure in both trees does not count as the same."""
    return {
        "name": name,
        "old": old,
        "new": new,
        "same": old == new and old != "none" and FAILED not in old,
    }


if __name__ == "__main__":
    main()
