"""Third-party readers read our shards: webdataset, timm and open_clip, run for real."""

import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
from PIL import Image

from benchmarks import environments
from rft.loading.dataset import PackedDataset
from rft.packing.pack import Options, pack
from rft.shards.label_space import LabelSpace
from tests.packing.peer_readers import SIZE

pytestmark = pytest.mark.slow

LABELS = LabelSpace(
    ids=("n01", "n02", "n03"), names=("one", "two", "three"), templates=("a {c}.", "the {c}.")
)
KINDS = ("original", "jpeg", "pixels")
FORMATS = ("JPEG", "JPEG", "PNG", "WEBP")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """23 images of three classes, packed in each way; colours, greys, JPEG, PNG and WebP."""
    root = tmp_path_factory.mktemp("peers")
    rng = np.random.default_rng(0)
    for n in range(23):
        wnid = LABELS.ids[n % 3]
        path = root / "source" / "train" / wnid / f"image {n}.v1.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*rng.integers(SIZE, 40, 2), 3) if n % 5 else tuple(rng.integers(SIZE, 40, 2))
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(path, FORMATS[n % 4])
    for kind in KINDS:
        shard_mb = 0.002 if kind == "jpeg" else 0.006
        options = Options(encoding=kind, size=SIZE, shard_mb=shard_mb, workers=1)
        pack("imagenet-train", str(root / "source"), str(root / kind), LABELS, options)
    return {kind: root / kind / "imagenet-train" for kind in KINDS}


@pytest.fixture(scope="module")
def old_webdataset() -> dict[str, str]:
    """Environment variables with the webdataset version that open_clip and timm need."""
    environments.BUILD.mkdir(parents=True, exist_ok=True)
    # the tests of this file can run in several processes
    with filelock.FileLock(environments.BUILD / "open_clip.lock"):
        environments.install("open_clip")
    absence = environments.absence("open_clip")
    if absence is not None:
        pytest.skip(f"webdataset 0.2 is not there: {absence}")
    return environments.variables("open_clip")


def run(
    peer: str, folders: list[Path], out: Path, variables: dict[str, str], version: str = "0.2"
) -> list[list]:
    """Return the samples that a peer delivers from each folder, as sorted (label, pixels)."""
    command = [sys.executable, "-m", "tests.packing.peer_readers", peer, str(out)]
    result = subprocess.run(
        [*command, *map(str, folders)],
        env={**variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"webdataset {version}."), result.stdout
    found = []
    for number in range(len(folders)):
        with np.load(out / f"{number}.npz", allow_pickle=False) as data:
            pairs = zip(data["labels"].tolist(), data["images"], strict=True)
            found.append(sorted((label, image.tobytes()) for label, image in pairs))
    return found


def ours(folder: Path) -> list[tuple[int, bytes]]:
    data = PackedDataset(str(folder))
    assert len(data.manifest.shards) > 2
    assert len(data) == 23
    pairs = [(int(data.index.label[n]), data.image(n, SIZE).tobytes()) for n in range(len(data))]
    assert len(set(pairs)) == 23
    return sorted(pairs)


def test_webdataset(packed: dict[str, Path], tmp_path: Path) -> None:
    folders = list(packed.values())
    found = run("webdataset", folders, tmp_path, environments.variables(None), version="1")
    assert found == [ours(folder) for folder in folders]


def test_old_webdataset(
    packed: dict[str, Path], tmp_path: Path, old_webdataset: dict[str, str]
) -> None:
    folders = list(packed.values())
    found = run("webdataset", folders, tmp_path, old_webdataset)
    assert found == [ours(folder) for folder in folders]


def test_timm(packed: dict[str, Path], tmp_path: Path, old_webdataset: dict[str, str]) -> None:
    """timm reads images; `pixels` holds arrays, which it does not support."""
    folders = [packed["original"], packed["jpeg"]]
    found = run("timm", folders, tmp_path, old_webdataset)
    assert found == [ours(folder) for folder in folders]


def test_open_clip(packed: dict[str, Path], tmp_path: Path, old_webdataset: dict[str, str]) -> None:
    """open_clip trains on images and captions; a sample's caption is its class's name."""
    folders = [packed["original"], packed["jpeg"]]
    found = run("open_clip", folders, tmp_path, old_webdataset)
    assert found == [ours(folder) for folder in folders]
