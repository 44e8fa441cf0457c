"""`rft photos` on ten kinds of folders: findings, output and refusals."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.servers.loopback import ADDRESS, free_port
from benchmarks.tiny_world import environment
from rft.packing.own_folder import read_folder
from rft.photos import command, plan, record
from rft.report.read import load_runs
from rft.runs import choice
from rft.shards.manifest import Manifest
from rft.storage import files
from tests import tiny
from tests.photos.photo_folders import name_classes, picture, write
from tests.photos.test_plan import TASK
from tests.report.make_runs import make_predicted

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
    """Return the output of a dry run, which writes nothing."""
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
    assert f"Chosen without any test image: {Path(choice['chosen']).name}, " in page
    assert f'{Path(choice["chosen"]).name} <span class="muted">(chosen)' in page
    most = max(counts.values())
    assert result.stdout.splitlines()[-6:] == [
        f"chosen: {Path(choice['chosen']).name}",
        f"report: {out}/report/index.html",
        f"model:  {out}/model",
        f"choice: {most} of 20 held-out photos, the most of 5 models; test photos are not used to "
        "choose",
        f"next: python -m rft.predict {out}/model NEW_PHOTOS --html page.html --cam",
        "  (NEW_PHOTOS: image files, or folders that hold some)",
    ]
    # the class counts are printed once, by the command itself
    assert result.stdout.count("red bricks zero") == 1
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
    # finished stages are not measured
    table = result.stdout.partition("stages, all but the last are already done:\n")[2]
    rows = [line.split("  ", 2)[1:] for line in table.partition("\n  all ")[0].splitlines()]
    done = [name for name, state in rows if state.strip() == "done"]
    assert done == [name for name, _ in rows if name != "report"]
    assert {"pack", "train vanilla", "evaluate", "choose", "export"} <= {*done}


@pytest.mark.slow
def test_other_options_and_photos_are_refused_in_words_of_this_command(two, refused, tmp_path):
    root, out, _, _ = two
    before = made(out)
    line = refused(command, *words(root, out, "--epochs", 3, "--seed", 1))
    assert line == (
        f"error: {out} was made with --epochs 1 --seed 0 (given or the default): pass the same "
        "options, or choose another --out"
    )
    more = shutil.copytree(root, tmp_path / "more")
    write(more, [6, 0], first=130)
    line = refused(command, *words(more, out, "--epochs", 1))
    assert f"error: photos changed since {out} was made (208 -> 21" in line
    assert " files to train on, 5" in line
    assert line.endswith(f"delete {', '.join(str(out / name) for name in record.MADE)}")
    assert made(out) == before


def complaint(capsys, *arguments: object) -> list[str]:
    """Run the command in this process to its refusal; return its lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        tiny.call(command, *arguments)
    assert stopped.value.code == 2
    return tiny.complaints(capsys.readouterr().err)


def test_one_photo_in_a_class_is_refused_with_what_to_do(tmp_path, capsys):
    root, out = write(tmp_path / "photos", [6, 1, 6]), tmp_path / "out"
    line, note = complaint(capsys, *words(root, out))
    assert "class folder 'c001' has one image" in line
    assert "--ignore 'c001'" in line
    # an option of packing, which this command lacks
    assert "--test-share" not in line
    assert note.startswith("  without them: python -m rft.photos ")
    assert note.endswith("--ignore c001")
    assert not out.exists()


@pytest.mark.slow
def test_all_that_cannot_be_used_is_named_at_once_with_the_command(tmp_path, capsys):
    root, out = write(tmp_path / "photos", [8, 8]), tmp_path / "out"
    (root / "c000" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    (root / "c001" / "about [1]").touch()
    (root / "c001" / "empty.jpg").touch()
    (root / "c001" / "7.png").write_bytes((root / "c001" / "7.png").read_bytes()[:20])
    write(root, [1], ["lone"])
    options = words(root, out, "--dry-run", "--ignore", "*.mov")
    line, *notes = complaint(capsys, *options)
    assert line == (
        "error: 2 files are not photos (.jpeg, .jpg, .png, .webp); 2 photos cannot be read; "
        "1 class folder has too few photos"
    )
    assert [note.removeprefix("  ").replace(f"{root}/", "") for note in notes[:-1]] == [
        "not a photo: c000/IMG_1.HEIC",
        "not a photo: c001/about [1]",
        "c001/7.png cannot be read: Truncated File Read",
        "c001/empty.jpg is empty",
        "one image: lone",
    ]
    label, pasted = notes[-1].split(": ", 1)
    typed = shlex.split(pasted)
    assert (label, typed[:3]) == ("  without them", ["python", "-m", "rft.photos"])
    assert typed[3:] == [*options, "--ignore", "*.heic", "about [[]1]", "lone", "--max-bad", "2"]
    # the ignored class needs no words
    text = dry(root, out, *typed[3 + len(options) :], folders=["c000", "c001"])
    assert "empty.jpg is empty; it is left out (--max-bad)" in text
    # counts without the photos that are left out
    assert re.search(
        r"17 photos of 2 classes; at most \d+ to train on, at most \d+ to test with, 2 left out",
        text,
    )
    assert "skipped by name: 1 *.heic (--ignore), 1 about [[]1] (--ignore), 1 lone" in text


@pytest.mark.slow
def test_unbalanced_classes_are_named(tmp_path):
    text = dry(write(tmp_path / "photos", [200, 2]), tmp_path / "out")
    assert "unbalanced: red bricks zero has 160 photos to train on, red bricks one 1;" in text
    assert "too few photos to hold some out of training" in text
    assert "wise-object-mask-single-fill-0.5 is exported by default" in text
    assert "200 to train on would be enough, with two or more of each class; you have 161" in text


@pytest.mark.slow
def test_nested_folders_belong_to_their_class(tmp_path):
    root = write(tmp_path / "photos", [10, 10], below="2024/summer")
    write(root, [5, 5], first=10)
    text = dry(root, tmp_path / "out")
    assert "30 photos of 2 classes; 24 to train on, 6 to test with" in text
    assert re.search(r"^  train object-mask-single-fill +(about|a few)", text, re.M)
    assert "nothing was started (--dry-run)" in text


@pytest.mark.slow
def test_a_dry_run_of_the_example_writes_nothing(tmp_path):
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    words = ("--example", "--out", str(out), "--dry-run")
    result = tiny.torchrun(1, "rft.photos", *words, TMPDIR=str(temporary))
    assert result.returncode == 0, result.stderr
    assert "304 photos of 16 classes" in result.stdout
    assert not out.exists()
    assert not any(temporary.iterdir())


@pytest.mark.slow
def test_a_dry_run_without_the_weights_has_no_times(tmp_path):
    root, out = write(tmp_path / "photos", [4, 4]), tmp_path / "out"
    words = (str(root), "--out", str(out), "--dry-run")
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": f"http://{ADDRESS}:{free_port()}"}
    result = tiny.torchrun(1, "rft.photos", *words, **hub)
    assert result.returncode == 0, result.stderr
    assert "cannot get open_clip_" in result.stderr
    assert "HF_HOME" in result.stderr
    assert "stages, without times, which need the weights:\n  pack\n  train" in result.stdout
    assert "nothing was started (--dry-run)" in result.stdout
    assert not out.exists()
    # a tag that does not exist is a mistake
    result = tiny.torchrun(1, "rft.photos", *words, "--model.pretrained", "none", **hub)
    assert result.returncode != 0
    assert "'none' is neither a weights tag" in result.stderr


@pytest.mark.slow
def test_split_folders_are_kept(tmp_path):
    root = tmp_path / "photos"
    write(root / "Train", [12, 12])
    write(root / "Test", [3, 3], first=12)
    text = dry(root, tmp_path / "out", folders=["c000", "c001"])
    assert "30 photos of 2 classes; 24 to train on, 6 to test with" in text


@pytest.mark.slow
def test_photos_that_fail_in_decoding_are_named_by_packing(tmp_path):
    root, out = write(tmp_path / "photos", [8, 8]), tmp_path / "out"
    # intact headers
    for number in range(6, 8):
        path = root / "c001" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:200])
    result = photos(root, out, "--epochs", 0)
    assert result.returncode != 0
    line, again = [
        line
        for line in tiny.complaints(result.stderr)
        if line.startswith(("error: ", "  to resume"))
    ]
    assert re.search(r"c001/[67]\.png", line)
    typed = words(root, out, "--epochs", 0)
    words_again = ["python", "-m", "rft.photos", *typed, "--max-bad", "2"]
    assert again == f"  to resume without them: {shlex.join(words_again)}"
    # the value is enough, also after one that is not
    result = tiny.torchrun(1, "rft.photos", *typed, "--max-bad", "1", *words_again[-2:])
    assert result.returncode == 0, result.stderr
    assert "16 photos of 2 classes; at most 12 to train on, at most 4 to test" in result.stdout
    assert "WARNING: --epochs 0 trains nothing" in result.stderr
    packed = [Manifest.load(str(out / "shards" / name)).samples for name in ("train", "test")]
    assert sum(packed) == 14
    named = re.findall(r"left out: (.+) \((.+)\)$", result.stdout, re.M)
    assert sorted(name for names, _ in named for name in names.split(", ")) == [
        "c001/6.png",
        "c001/7.png",
    ]
    assert all(Path(path).exists() for _, path in named)
    assert (out / "model" / "card.json").exists()
    # packed sets have exact counts
    result = photos(root, out, "--epochs", 0, "--max-bad", 2, "--dry-run")
    train, test = packed
    counts = f"16 photos of 2 classes; {train} to train on, {test} to test with, 2 left out"
    assert counts in result.stdout
    both = [re.search(rf"red bricks {name} (\d)\+(\d)", result.stdout) for name in ("zero", "one")]
    assert [sum(int(one[n]) for one in both) for n in (1, 2)] == packed


@pytest.mark.slow
def test_a_photo_that_is_left_out_may_leave_too_few_to_hold_some_out(tmp_path):
    """200 to train on are enough, 199 are not; packing finds the number."""
    root, out = write(tmp_path / "photos", [125, 125]), tmp_path / "out"
    (train, _) = read_folder(root, None, 0.2, 0).sources
    path = root / train.items[0].path
    path.write_bytes(path.read_bytes()[:200])
    result = photos(root, out, "--epochs", 0, "--max-bad", 1)
    assert result.returncode == 0, result.stderr
    assert "200 to train on would be enough; you have 199" in result.stdout
    assert not (out / "choice.json").exists()
    end = "exported by default (no held-out photos to choose by): wise-object-mask-single-fill-0.5"
    assert end in result.stdout.splitlines()
    page = (out / "report" / "index.html").read_text()
    assert re.search(r"Exported: wise-object-mask-single-fill-0\.5, .* \(named with --chosen", page)
    assert "Chosen without" not in page
    assert "(exported)" in page


@pytest.mark.slow
def test_a_better_model_is_named_with_the_commands_that_export_it(tmp_path, capsys):
    task = replace(TASK, out=tmp_path)
    skills = {"zero-shot": 0.2, "wise-ft-0.5": 0.9, "vanilla": 0.8, plan.OURS: 0.4}
    for name, skill in skills.items():
        path = make_predicted(task.out / "runs", name, skill=skill, images=200, sets=("test",))
        path.rename(task.run(name))
    command._say_end(task, task.run(plan.OURS), 0, 1.0)
    *_, alarm, merge, export = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        "alarm: wise-ft-0.5 is significantly better than the exported model on the test photos "
        r"\(\+\d\d\.\d points\); to export it:",
        alarm,
    )
    runs = tmp_path / "runs"
    assert merge == (
        f"  merge: python -m rft.merge wise {runs}/zero-shot {runs}/vanilla --alpha 0.5 "
        f"--out {runs}/wise-ft-0.5"
    )
    assert export == (
        f"  export: python -m rft.convert export {runs}/wise-ft-0.5 --to open-clip "
        f"--out {tmp_path}/model-wise-ft-0.5"
    )
    best = task.run("wise-ft-0.5")
    one = choice.Candidate(path=str(best), sha256="0" * 64, correct=9)
    made = choice.Choice(
        train_set="t", manifest_sha256="0" * 64, images=10, candidates=(one,), chosen=str(best)
    )
    files.write_json(str(task.choice), asdict(made))
    command._say_end(task, best, 10, 1.0)
    printed = capsys.readouterr().out
    assert "choice: 9 of 10 held-out photos, the most of 1 models" in printed
    assert "alarm" not in printed


@pytest.mark.slow
def test_copies_in_training_and_test_are_an_alarm(tmp_path):
    root, out = write(tmp_path / "photos", [10, 10]), tmp_path / "out"
    for folder in root.iterdir():
        for path in list(folder.iterdir()):
            (folder / f"copy of {path.name}").write_bytes(path.read_bytes())
    result = photos(root, out, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("of equal images in two sets") == 1
    (alarm,) = [line for line in tiny.complaints(result.stderr) if "Remove them" in line]
    assert "were in the training set of" in alarm
    # its files, below the source
    assert re.search(r" images of test \(c00[01]/(copy of )?\d\.png, ", alarm)
    # one warning for all models
    assert result.stderr.count("accuracy there is up to") == 1
    # zero-shot was trained on nothing
    assert "zero-shot," not in alarm
    assert "points too high. Remove" in (out / "report" / "index.html").read_text()


@pytest.mark.slow
def test_a_copy_under_another_label_makes_the_accuracy_too_low(tmp_path):
    root, out = tmp_path / "photos", tmp_path / "out"
    write(root / "train", [12, 12])
    write(root / "test", [3, 3], first=12)
    shutil.copy(root / "test" / "c000" / "12.png", root / "train" / "c001" / "wrong.png")
    shutil.copy(root / "test" / "c000" / "13.png", root / "train" / "c000" / "right.png")
    result = photos(root, out, "--epochs", 1, folders=["c000", "c001"])
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in tiny.complaints(result.stderr) if "trained on" in line]
    assert (
        "were trained on 2 of the 6 images of test (1 under a different label; one label is "
        "wrong): their accuracy there is up to 16.7 points too high and up to 16.7 points too low"
    ) in warning
    alarms = [line for line in tiny.complaints(result.stderr) if "training set of" in line]
    same, other = sorted(alarms, key=lambda line: "different label" in line)
    assert "1 of the 6 images of test (c000/13.png) was" in same
    assert "1 of the 6 images of test (c000/12.png) was" in other
    assert "up to 16.7 points too low, because one label of each is wrong" in other


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


@pytest.mark.slow
def test_counts_of_classes_fill_the_lines_of_a_terminal(tmp_path):
    text = dry(write(tmp_path / "photos", [4] * 30), tmp_path / "out")
    lines = text.partition("to test with\n")[2].partition("\n30 classes have fewer")[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 12
    assert sum(line.count(" 3+1") for line in lines) == 30


def test_mistakes_are_refused_before_anything_starts(tmp_path, refused):
    root, out = write(tmp_path / "photos", [4, 4]), tmp_path / "out"
    (tmp_path / "a.txt").touch()
    assert "--example tries the command" in refused(command, "--out", out)
    line = refused(command, "--ignore", "*.heic", root, "--out", out)
    assert f"--ignore took '{root}' as a name to skip: write it before the options" in line
    assert "a.txt is a file; name the folder" in refused(command, tmp_path / "a.txt", "--out", out)
    assert "leave" in refused(command, root, "--out", out, "--example")
    one = write(tmp_path / "one", [4])
    assert "one class" in refused(command, *words(one, out))
    assert "no model 'ViT-B'" in refused(command, root, "--out", out, "--model.clip", "ViT-B")
    assert "c000" in refused(command, root, "--out", root / "c000" / "out")
    for share in (0, 1, 2):
        line = refused(command, *words(root, out, "--test-share", share))
        assert "; it must be above 0 and below 1, such as 0.2" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--model.clip", "rft-miniatur"), "did you mean rft-miniature"),
        (("--model.pretrained", "opnai"), "'opnai' is neither a weights tag"),
    ],
)
def test_a_misspelt_model_is_refused_before_the_photos_are_read(
    tmp_path, refused, monkeypatch, options, fault
):
    monkeypatch.setattr(command, "read_folder", lambda *_: pytest.fail("read"))
    root, out = tmp_path / "photos", tmp_path / "out"
    assert fault in refused(command, root, "--out", out, *options)


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_an_out_that_cannot_be_written_is_refused_at_once(tmp_path, refused, below):
    root, file = write(tmp_path / "photos", [4, 4]), tmp_path / "a.txt"
    file.touch()
    line = refused(command, root, "--out", file / below, "--dry-run")
    assert f"--out {file / below}: {file} is a file; name a folder" in line
    if Path("/proc/self").exists():
        line = refused(command, root, "--out", Path("/proc/x") / below, "--dry-run")
        assert "cannot write into /proc" in line
    # the trial leaves nothing behind
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["photos"]


@pytest.mark.slow
@pytest.mark.program
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

    # Ctrl-C goes to all processes of a terminal
    process = start()
    wait_for(process, reached.exists)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    again = shlex.join(["python", *command_line[1:]])
    assert process.returncode == 75
    assert tiny.complaints(errors) == [f"stopped; to resume: {again}"]
    step = json.loads(reached.read_text())["step"]
    # a kill reaches only the command; its stage must not continue training
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
