"""The wheel and the sdist: built, installed and used, without access to the checkout.

rft's dependencies are those of this environment; rft itself comes only from the wheel.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.program]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Build both; the wheel is built from the sdist, as users of a package index may do."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "uv", "build", "--quiet", "--no-build-isolation"]
    subprocess.run([*build, "--out-dir", str(out), str(ROOT)], check=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(tmp_path_factory, built) -> Path:
    """Return the folder of the commands of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--python", str(python), str(built[0])], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file is searched, but its own .pth files, such as rft's, are not read
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_everything_that_runs_is_in_them(built):
    wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "rft").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names
    for path in (ROOT / "launch").iterdir():
        # without the user's own settings
        if path.name != "cluster.env":
            assert f"rft/launch/{path.name}" in names
    assert not any("cluster.env" in name and not name.endswith("example") for name in names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"rft"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"rft/cli.py", "tools/shard_folder.py", "launch/submit.sh", "README.md"} <= inside


def test_a_package_index_shows_what_it_is(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert "\nName: rft-clip\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    for extra in ("s3", "gcs", "wandb", "hub", "dev"):
        assert f"\nProvides-Extra: {extra}\n" in metadata


def test_packs_trains_and_reports(installed, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8"}
    environment |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}

    def rft(*words: str) -> str:
        command = [str(installed / "rft"), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    draws = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    # the vocabulary of the tiny CLIP's tokenizer
    space = {"ids": ["cat", "dog"], "names": ["star", "ring"], "templates": ["a photo of a {c}"]}
    (tmp_path / "classes.json").write_text(json.dumps(space))
    where = [str(installed / "python"), "-c", "import rft; print(rft.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(installed.parent)
    packed = rft(
        "pack", "folder", "--source", "photos", "--out", "shards", "--classes", "classes.json"
    )
    assert "next: rft train" in packed
    rft("verify", "shards/train", "--deep")
    options = ["--data", "shards", "--train-set", "train", "--scale", "small"]
    options += ["--model.clip", "rft-miniature", "--optim.epochs", "2", "--loader.workers", "0"]
    trained = rft("train", "vanilla", "--ranks", "2", *options, "--run-dir", "runs/first")
    (line,) = (line for line in trained.splitlines() if line.startswith("next: "))
    assert line.startswith("next: rft evaluate runs/first --data shards --sets test")
    rft(*line.removeprefix("next: rft ").split(), "--workers", "0")
    rft("report", "runs", "--out", "report")
    assert "runs/first" in (tmp_path / "report" / "index.html").read_text()
    # nothing is kept that the user did not request
    assert not [path for path in home.rglob("*") if path.suffix == ".safetensors"]
