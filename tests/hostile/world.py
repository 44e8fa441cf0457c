"""The small valid world that rows damage: the commands themselves created all of it.

Names are relative to the folder in which a row's command runs.
"""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from PIL import Image

from benchmarks import tiny_world
from rft.shards.index import Index
from rft.shards.manifest import Manifest
from rft.storage import files
from tests.hostile.sandbox import ROOT, Outcome, Request, Sandbox, environment
from tests.packing.test_foreign import write_tar

COLOURS = ("red", "green")
CLASSES = {"ids": list(COLOURS), "names": list(COLOURS), "templates": ["a {c} square"]}
SETTINGS = "SBATCH_OPTIONS=() CPU_OPTIONS=() TRAIN_OPTIONS=() TORCHRUN_OPTIONS=()\n" + "\n".join(
    f"{name}={value}"
    for name, value in {
        "TIME": "30",
        "GPUS_PER_NODE": "0",
        "CPUS_PER_NODE": "1",
        "PROCESSES_PER_NODE": "1",
        "DATA": "$PWD/shards",
        "RUNS": "$PWD/runs",
    }.items()
)

# commands of rows that differ only in the damage
PACK = ("tools/shard_folder.py", "--source", "photos", "--out", "shards", "--classes")
PACK += ("classes.json", "--encoding", "pixels", "--size", "16", "--workers", "1")
ORIGINAL = (*PACK[:4], "original", *PACK[5:7], "--workers", "1")  # the images' own bytes
INDEX = ("tools/index_shards.py", "foreign/{0..1}.tar", "--out", "indexed/test")
INDEX += ("--classes", "classes.json", "--workers", "1")
VERIFY = ("tools/verify_shards.py", "shards/test", "--workers", "1")
DEEP = (*VERIFY, "--deep")
MODEL = ("--model.clip", "local-dir:clip", "--loader.workers", "0", "--device", "cpu")
SMALL = ("--loader.batch-size", "4", "--loader.held-out", "4", "--log.image-steps", "0")
SMALL += ("--optim.epochs", "1", "--scale", "miniature", *MODEL)
NEW = ("rft.train", "vanilla", "--data", "shards", "--train-set", "train")
TRAIN = (*NEW, "--run-dir", "run", *SMALL)
FRESH = (*NEW, "--run-dir", "new", *SMALL)
DRY = (*FRESH, "--dry-run")
ZERO = ("rft.train", "zero-shot", "--data", "shards", "--train-set", "train", "--run-dir", "zero")
ZERO += (*SMALL[:6], "--scale", "miniature", *MODEL)
COUNT = ("--data", "shards", "--sets", "test", "--workers", "0", "--device", "cpu")
EVALUATE = ("rft.evaluate", "run", *COUNT)
LOCALISE = ("rft.evaluate.localisation", "run", "--data", "shards", "--set", "test", "--masks")
LOCALISE += ("masks", "--classes", "all", "--workers", "0", "--device", "cpu")
WISE = ("rft.merge", "wise", "zero", "run", "--out", "merged")
SOUP = ("rft.merge", "uniform-soup", "run", "zero", "--out", "merged")
GREEDY = ("rft.merge", "greedy-soup", "run", "zero", "--data", "shards", "--out", "merged")
REPORT = ("rft.report", "run", "--out", "report")
PREDICT = ("rft.predict", "run", "photos", "--device", "cpu")
SHOW = ("rft.data.show", "run", "--step", "0")
IMPORT = ("rft.convert", "import", "model.pt", "--out", "imported", "--clip", "local-dir:clip")
HUB = ("rft.convert", "import", "hub", "--out", "imported")
EXPORT = ("rft.convert", "export", "run", "--to", "open-clip", "--out", "exported")


@dataclass(frozen=True)
class Place:
    """A copy of the world for one row: its working folder, and other folders in reach."""

    root: Path
    url: str = ""
    """Of the row's server, if any."""

    @property
    def work(self) -> Path:
        """The working folder: the copy itself."""
        return self.root / "work"

    @property
    def outside(self) -> Path:
        """A folder of the user's that no command may touch."""
        return self.root / "outside"

    def __truediv__(self, name: str) -> Path:
        return self.work / name

    def read(self, name: str) -> Any:
        """Return a JSON document of the world."""
        return json.loads((self / name).read_text())

    def write(self, name: str, document: object) -> None:
        """Replace a JSON document."""
        (self / name).write_text(json.dumps(document))

    def edit(self, name: str, **values: object) -> None:
        """Replace fields of a JSON document."""
        self.write(name, {**self.read(name), **values})

    def edit_shard(self, dataset: str = "shards/test", **values: object) -> None:
        """Replace fields of the first shard in a manifest."""
        first, *rest = self.read(f"{dataset}/manifest.json")["shards"]
        self.edit(f"{dataset}/manifest.json", shards=[{**first, **values}, *rest])

    def publish_index(self, data: bytes, name: str = "shards/test") -> None:
        """Write other bytes as a set's index, with a matching manifest."""
        (self / name / "index.npz").write_bytes(data)
        self.edit(f"{name}/manifest.json", index_sha256=files.sha256_bytes(data))

    def publish_samples(self, data: bytes, name: str = "shards/test") -> None:
        """Write other bytes as a set's samples.npz, with a matching manifest."""
        (self / name / "samples.npz").write_bytes(data)
        self.edit(f"{name}/manifest.json", samples_sha256=files.sha256_bytes(data))

    def publish_shard(self, data: bytes, name: str = "shards/test") -> None:
        """Write other bytes as a set's first shard, with a matching manifest."""
        shard = self.read(f"{name}/manifest.json")["shards"][0]["name"]
        (self / name / shard).write_bytes(data)
        self.edit_shard(name, bytes=len(data), sha256=files.sha256_bytes(data))

    def columns(self, name: str = "shards/test") -> dict[str, np.ndarray]:
        """Return the columns of a set's index."""
        index = Index.load(str(self / name), Manifest.load(str(self / name)))
        return {column: np.array(values) for column, values in vars(index).items()}

    def run(self, sandbox: Sandbox, words: Sequence[str], **options: Any) -> "Ran":
        """Run a command here."""
        return run(self.root, sandbox, words, **options)


@dataclass(frozen=True)
class Ran:
    """A finished command and its output."""

    outcome: Outcome
    stdout: str
    stderr: str


def run(
    root: Path,
    sandbox: Sandbox,
    words: Sequence[str],
    variables: dict[str, str] | None = None,
    stdout: str = "",
) -> Ran:
    """Run a command in `root`/work; `stdout` may be "closed" or "left" (see the sandbox)."""
    outputs = [root / "stdout", root / "stderr"]
    for path in outputs:
        path.write_bytes(b"")
    request = Request(
        words=tuple(words),
        folder=str(root / "work"),
        environment=environment(root / "home", root / "tmp", variables or {}),
        stdout=stdout or str(outputs[0]),
        stderr=str(outputs[1]),
    )
    outcome = sandbox.run(request)
    texts = [path.read_bytes().decode("utf-8", "surrogateescape") for path in outputs]
    for path in outputs:
        path.unlink()
    return Ran(outcome, *texts)


def pack(root: Path, sandbox: Sandbox) -> None:
    """Create photos, their sets, a CLIP and third-party shards in an empty folder."""
    for name in ("work", "home", "tmp", "outside"):
        (root / name).mkdir(parents=True)
    (root / "outside" / "precious.txt").write_text("a file of the user's own\n")
    work = root / "work"
    write_photos(work / "photos")
    (work / "classes.json").write_text(json.dumps(CLASSES))
    tiny_world.write_clip(work / "clip")
    write_foreign(work / "foreign")
    (work / "launch").mkdir()
    for path in (ROOT / "launch").glob("*.s*"):
        shutil.copy(path, work / "launch")
    (work / "launch" / "cluster.env").write_text(f"{SETTINGS}\nsetup() {{ :; }}\n")
    for words in (PACK, ORIGINAL, INDEX):
        done(root, sandbox, words)
    write_masks(work)


def train(root: Path, sandbox: Sandbox) -> None:
    """Train a run."""
    done(root, sandbox, TRAIN)


def finish(root: Path, sandbox: Sandbox) -> None:
    """Create the zero-shot run, evaluate both and export one."""
    for words in (
        ZERO,
        ("rft.evaluate", "run", "zero", *COUNT),
        ("rft.convert", "export", "run", "--to", "open-clip", "--out", "hub"),
    ):
        done(root, sandbox, words)
    write_model(root / "work")


def done(root: Path, sandbox: Sandbox, words: tuple[str, ...]) -> None:
    """Run a command that must succeed."""
    ran = run(root, sandbox, words)
    assert ran.outcome.code == 0, (words, ran)


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(8):
            image = Image.fromarray(picture(rng, colour))
            image.save(folder / colour / f"{colour}{number}.png")


def picture(rng: np.random.Generator, colour: str) -> np.ndarray:
    pixels = np.array(tiny_world.COLOURS[colour]) + rng.normal(0, 40, (20, 24, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def write_foreign(folder: Path) -> None:
    """Write two third-party shards of three samples each."""
    rng = np.random.default_rng(1)
    for shard in range(2):
        members = []
        for number in range(3):
            label = (shard + number) % 2
            stream = io.BytesIO()
            Image.fromarray(picture(rng, COLOURS[label])).save(stream, "JPEG")
            key = f"s{shard}{number}"
            members += [(f"{key}.jpg", stream.getvalue()), (f"{key}.cls", str(label).encode())]
        write_tar(folder / f"{shard}.tar", members)


def write_masks(work: Path) -> None:
    """Write an object mask for each image of the test set."""
    (work / "masks").mkdir()
    manifest = Manifest.load(str(work / "shards" / "test"))
    for key in Index.load(str(work / "shards" / "test"), manifest).key:
        mask = np.zeros((20, 24), np.uint8)
        mask[5:15, 5:15] = 255
        Image.fromarray(mask).save(work / "masks" / f"{key.decode()}.png")


def write_model(work: Path) -> None:
    """Write the run's weights as a third-party state dict."""
    import torch

    from rft.clip.classifier import load_state

    torch.save(load_state(work / "run/checkpoints/best.safetensors").state, work / "model.pt")


def once(root: Path, part: str, make: Callable[[Path], None]) -> Path:
    """Create a part of the world unless another process of this test run has done so."""
    mark = root.with_name(f"{root.name}-{part}")
    with filelock.FileLock(f"{mark}.lock"):
        if not mark.exists():
            make(root)
            mark.touch()
    return root


def copy(source: Path, target: Path) -> Path:
    """Copy the world for one row."""
    return Path(shutil.copytree(source, target, symlinks=True))
