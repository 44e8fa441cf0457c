"""`rft photos` on ten kinds of folders: what it finds, what it makes, what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.tiny_world import environment
from rft.photos import command
from rft.report.read import load_runs
from rft.shards.manifest import Manifest
from rft.storage import files
from tests import tiny
from tests.photos.photo_folders import name_classes, picture, write

CLIP = ("--model.clip", "rft-miniature")
RUNS = {
    "zero-shot",
    "vanilla",
    "object-mask-single-fill",
    "wise-ft-0.5",
    "wise-object-mask-single-fill-0.5",
}


def ids(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def words(root: Path, out: Path, *options: object, folders: list[str] | None = None) -> list[str]:
    classes = name_classes(out.with_name(f"{out.name}.json"), folders or ids(root))
    return list(map(str, (root, "--out", out, *CLIP, "--classes", classes, *options)))


def photos(root: Path, out: Path, *options: object, **kept) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return tiny.torchrun(1, "rft.photos", *words(root, out, *options, **kept))


def dry(root: Path, out: Path, *options: object, **kept) -> str:
    """Return what a dry run prints; it makes nothing."""
    result = photos(root, out, *options, "--dry-run", **kept)
    assert result.returncode == 0, result.stderr
    assert not out.exists()
    return result.stdout + result.stderr


def state(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.stat().st_mtime_ns, files.sha256_file(path))
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def made(out: Path) -> dict[str, int]:
    """Return when each file of a run, and the export, was written."""
    kept = [*out.glob("runs/*/checkpoints/*.safetensors"), *out.glob("runs/*/training.json")]
    return {str(path): path.stat().st_mtime_ns for path in (*kept, *out.glob("shards/*/*"))}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str], dict]:
    """Two classes of 130 photos, so that some are held out, to the end."""
    folder = tmp_path_factory.mktemp("two")
    root = write(folder / "photos", [130, 130])
    before = state(root)
    return root, folder / "out", photos(root, folder / "out", "--epochs", 1), before


@pytest.mark.slow
def test_two_classes_end_in_a_report_and_an_export(two):
    root, out, result, before = two
    assert result.returncode == 0, result.stderr
    assert state(root) == before
    assert {path.name for path in (out / "runs").iterdir()} == RUNS
    choice = json.loads((out / "choice.json").read_text())
    assert choice["images"] == 20
    counts = {Path(one["path"]).name: one["correct"] for one in choice["candidates"]}
    assert counts.keys() == RUNS
    assert counts[Path(choice["chosen"]).name] == max(counts.values())
    for run in load_runs([out / "runs"]):
        assert run.counts["test"].total == 52
    card = json.loads((out / "model" / "card.json").read_text())
    assert card["source"]["path"] == choice["chosen"]
    assert card["classes"] == ["red bricks zero", "red bricks one"]
    page = (out / "report" / "index.html").read_text()
    assert "Classes and mistakes" in page
    assert result.stdout.splitlines()[-3:] == [
        f"chosen: {Path(choice['chosen']).name}",
        f"report: {out}/report/index.html",
        f"model:  {out}/model",
    ]
    # every stage is a command that can be pasted
    stages = [line for line in result.stdout.splitlines() if line.startswith("$ ")]
    assert [line.split()[1] for line in stages] == ["python"] * len(stages)
    assert "260 photos of 2 classes; 208 to train on, 52 to test with" in result.stdout


@pytest.mark.slow
def test_the_same_command_again_makes_nothing_anew(two):
    root, out, _, _ = two
    before = made(out)
    result = photos(root, out, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert made(out) == before


def test_one_photo_in_a_class_is_refused_with_what_to_do(tmp_path, refused):
    root = write(tmp_path / "photos", [6, 1])
    line = refused(command, *words(root, tmp_path / "out"))
    assert "class folder 'c001' has one image" in line
    assert "--ignore 'c001'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unbalanced_classes_are_named(tmp_path):
    text = dry(write(tmp_path / "photos", [200, 2]), tmp_path / "out")
    assert "unbalanced: red bricks zero has 160 photos to train on, red bricks one 1;" in text
    assert "too few photos to hold some out of training" in text
    assert "wise-object-mask-single-fill-0.5 is exported" in text


@pytest.mark.slow
def test_nested_folders_belong_to_their_class(tmp_path):
    root = write(tmp_path / "photos", [10, 10], below="2024/summer")
    write(root, [5, 5], first=10)
    text = dry(root, tmp_path / "out")
    assert "30 photos of 2 classes; 24 to train on, 6 to test with" in text
    assert re.search(r"^  train object-mask-single-fill +(about|a few)", text, re.M)
    assert "nothing was started (--dry-run)" in text


@pytest.mark.slow
def test_split_folders_are_kept(tmp_path):
    root = tmp_path / "photos"
    write(root / "Train", [12, 12])
    write(root / "Test", [3, 3], first=12)
    text = dry(root, tmp_path / "out", folders=["c000", "c001"])
    assert "30 photos of 2 classes; 24 to train on, 6 to test with" in text


@pytest.mark.slow
def test_corrupt_and_heic_files_are_named(tmp_path, refused):
    root, out = write(tmp_path / "photos", [8, 8]), tmp_path / "out"
    (root / "c000" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    (root / "c001" / "7.png").write_bytes((root / "c001" / "7.png").read_bytes()[:200])
    line = refused(command, *words(root, out))
    assert "IMG_1.HEIC" in line
    assert "--ignore '*.heic'" in line
    options = ("--ignore", "*.heic", "--epochs", 0)
    result = photos(root, out, *options)
    assert result.returncode != 0
    (line,) = [line for line in tiny.complaints(result.stderr) if line.startswith("error: ")]
    assert "7.png" in line
    result = photos(root, out, *options, "--max-bad", 1)
    assert result.returncode == 0, result.stderr
    packed = [Manifest.load(str(out / "shards" / name)).samples for name in ("train", "test")]
    assert sum(packed) == 15
    assert (out / "model" / "card.json").exists()


@pytest.mark.slow
def test_copies_in_training_and_test_are_an_alarm(tmp_path):
    root, out = write(tmp_path / "photos", [10, 10]), tmp_path / "out"
    for folder in root.iterdir():
        for path in list(folder.iterdir()):
            (folder / f"copy of {path.name}").write_bytes(path.read_bytes())
    result = photos(root, out, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "of equal images in two sets" in result.stderr
    (alarm,) = [line for line in tiny.complaints(result.stderr) if "is too good" in line]
    assert "were in the training set of" in alarm
    # zero-shot was trained on nothing
    assert "zero-shot," not in alarm
    assert "accuracy is too good" in (out / "report" / "index.html").read_text()


@pytest.mark.slow
def test_deep_and_turned_photos_are_packed(tmp_path):
    root, out = write(tmp_path / "photos", [6, 6]), tmp_path / "out"
    for number in range(6):
        picture(0, number, "I;16").save(root / "c000" / f"{number}.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        (root / "c001" / f"{number}.png").unlink()
        picture(1, number).save(root / "c001" / f"{number}.jpg", exif=exif)
    result = photos(root, out, "--epochs", 0)
    assert result.returncode == 0, result.stderr
    turned = re.findall(r"photos turned upright \(EXIF orientation\): (\d+)", result.stdout)
    assert sum(map(int, turned)) == 6


@pytest.mark.slow
def test_names_of_any_script_are_kept(tmp_path):
    folders = [unicodedata.normalize("NFD", "café au lait"), "猫", "собака"]
    root = write(tmp_path / "фото ☀", [5, 5, 5], folders)
    composed = [unicodedata.normalize("NFC", name) for name in folders]
    text = dry(root, tmp_path / "out", folders=composed)
    assert "15 photos of 3 classes; 12 to train on, 3 to test with" in text


@pytest.mark.slow
def test_three_hundred_classes_are_summed_up(tmp_path):
    text = dry(write(tmp_path / "photos", [2] * 300), tmp_path / "out")
    assert "600 photos of 300 classes; 300 to train on, 300 to test with" in text
    assert "300 classes have fewer than 5 photos to train on" in text
    assert len([line for line in text.splitlines() if "red bricks" in line]) == 1


def test_mistakes_are_refused_before_anything_starts(tmp_path, refused):
    root, out = write(tmp_path / "photos", [4, 4]), tmp_path / "out"
    assert "--example tries the command" in refused(command, "--out", out)
    assert "leave" in refused(command, root, "--out", out, "--example")
    one = write(tmp_path / "one", [4])
    assert "one class" in refused(command, *words(one, out))
    assert "no model 'ViT-B'" in refused(command, root, "--out", out, "--model.clip", "ViT-B")
    assert "c000" in refused(command, root, "--out", root / "c000" / "out")
    assert not out.exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_or_killed_is_resumed(tmp_path):
    root, out = write(tmp_path / "photos", [40, 40]), tmp_path / "out"
    command_line = [sys.executable, "-m", "rft.photos", *words(root, out, "--epochs", 40)]
    reached = out / "runs" / "object-mask-single-fill" / "progress.json"

    def start() -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command_line, env=environment(), start_new_session=True, **pipes)

    def wait_for(process: subprocess.Popen[str], done) -> None:
        while process.poll() is None and not done():
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        assert process.poll() is None, process.stderr.read()

    # Ctrl-C goes to all of a terminal's processes
    process = start()
    wait_for(process, reached.exists)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, tiny.complaints(errors)) == (75, [])
    step = json.loads(reached.read_text())["step"]
    # a kill reaches the command alone; its stage must not train on
    process = start()
    wait_for(process, lambda: json.loads(reached.read_text())["step"] > step)
    process.kill()
    process.communicate()
    step = json.loads(reached.read_text())["step"]
    assert 0 < step < json.loads(reached.read_text())["of"]
    before = made(out)
    result = photos(root, out, "--epochs", 40)
    assert result.returncode == 0, result.stderr
    assert "resum" in result.stdout
    kept = [path for path in before if "zero-shot" in path or "shards" in path]
    assert {path: made(out)[path] for path in kept} == {path: before[path] for path in kept}
