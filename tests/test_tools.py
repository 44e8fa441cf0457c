"""The packing command lines: their output, and one clear line for every mistake."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft import cli
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.shards.samples import Samples
from tests.tiny import unstamped

TOOLS = Path(__file__).parent.parent / "tools"
CLASSES = {"ids": ["n01", "n02"], "names": ["one", "two"], "templates": ["a {c}."]}
Result = tuple[int, str, str]


def load(name: str) -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Return a folder with one or two images per class of ImageNet, V2, R and A."""
    rng = np.random.default_rng(0)
    names = [
        "imagenet/train/n01/n01_1.JPEG",
        "imagenet/train/n02/n02_1.JPEG",
        "imagenet/val/n01/ILSVRC2012_val_00000001.JPEG",
        "imagenet/val/n02/ILSVRC2012_val_00000002.JPEG",
        "imagenetv2-matched-frequency-format-val/0/a.jpeg",
        "imagenetv2-matched-frequency-format-val/1/b.jpeg",
        "imagenet-r/n01/art_0.jpg",
        "imagenet-r/n02/art_0.jpg",
    ]
    root = tmp_path / "world"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name, "JPEG")
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


@pytest.fixture
def run(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., Result]:
    """Return a function that runs a tool here and returns exit code, stdout and stderr."""

    def run(tool: str, *arguments: str) -> Result:
        argv = [tool, *arguments, "--classes", str(world / "classes.json"), "--workers", "1"]
        monkeypatch.setattr(sys, "argv", argv)
        capfd.readouterr()
        try:
            cli.run(load(tool))
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capfd.readouterr())

    return run


def test_imagenet(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    arguments = ["--source", str(world / "imagenet"), "--out", str(tmp_path / "out")]
    code, out, err = run("shard_imagenet", *arguments, "--encoding", "pixels", "--size", "16")
    assert (code, err) == (0, "")
    assert "imagenet-train: 2 samples in 1 shard, " in out
    assert f"\nnext: python -m rft.train object-mask-single-fill --data {tmp_path / 'out'} " in out
    for name in ("imagenet-train", "imagenet-val"):
        assert Manifest.load(str(tmp_path / "out" / name)).samples == 2
    code, out, err = run("shard_imagenet", *arguments, "--encoding", "pixels", "--size", "16")
    assert (code, err, out.count("nothing to do")) == (0, "", 2)


def test_nothing_is_packed_if_a_set_is_missing(
    world: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    shutil.rmtree(world / "imagenet" / "val" / "n01")
    code, _, err = run("shard_imagenet", "--source", str(world / "imagenet"), "--out", str(out))
    assert (code, err.count("\n"), out.exists()) == (2, 1, False)
    assert "1 of 2 classes are missing" in err
    assert err.endswith("; for a subset of classes, name it with --classes FILE\n")
    arguments = ["--source", str(world), "--out", str(out)]
    names = ("imagenet-r", "objectnet", "imagenet-a")
    code, _, err = run("shard_ood", "--benchmark", *names, *arguments)
    assert (code, err.count("\n"), out.exists()) == (2, 1, False)
    assert "no folder of objectnet in " in err
    assert "; and no folder of imagenet-a in " in err


def test_several_benchmarks(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    arguments = ["--source", str(world), "--out", str(tmp_path / "out")]
    code, _, err = run("shard_ood", "--benchmark", "imagenet-v2", "imagenet-r", *arguments)
    assert (code, err) == (0, "")
    assert Manifest.load(str(tmp_path / "out" / "imagenet-v2")).groups == ((0,), (1,))
    assert Manifest.load(str(tmp_path / "out" / "imagenet-r")).samples == 2


def test_task_array(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    arguments = ["--source", str(world / "imagenet"), "--out", str(tmp_path), "--splits", "val"]
    arguments += ["--shard-mb", "0.0001"]
    code, out, err = run("shard_imagenet", *arguments, "--task", "1/2")
    assert (code, err) == (0, "")
    assert "1 of 2 shards are left to other tasks" in out
    assert "next:" not in out
    code, out, err = run("shard_imagenet", *arguments, "--task", "0/2")
    assert (code, err) == (0, "")
    assert len(Manifest.load(str(tmp_path / "imagenet-val")).shards) == 2


def test_a_set_of_any_name(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    arguments = ["--name", "mine", "--source", str(world / "imagenet-r"), "--out", str(tmp_path)]
    code, out, err = run("shard_set", *arguments, "--ood", "--score", "mean-per-class")
    assert (code, err) == (0, "")
    assert "found 2 images: 2 class folders of " in out
    assert "classes: 2 of 2 have images; 2 compete; score: mean-per-class; in the OOD" in out
    assert f"--data {tmp_path} --sets mine" in out
    manifest = Manifest.load(str(tmp_path / "mine"))
    assert (manifest.score, manifest.ood, manifest.domains) == ("mean-per-class", True, ())
    code, _, err = run("shard_set", *arguments, "--ood")
    assert (code, "holds a different plan (score: 'mean-per-class' -> " in err) == (2, True)


def test_a_set_of_domains(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    for corruption in ("fog/1", "fog/2", "snow/2"):
        shutil.copytree(world / "imagenet-r", tmp_path / "c" / corruption)
    arguments = ["--name", "imagenet-c", "--source", str(tmp_path / "c"), "--domains", "2"]
    code, out, err = run("shard_set", *arguments, "--out", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "domains: 3, with 2 to 2 images each" in out
    assert "missing severities: snow/1, snow/3, snow/4, snow/5, fog/3, fog/4" in out
    manifest = Manifest.load(str(tmp_path / "out/imagenet-c"))
    assert manifest.domains == ("fog/1", "fog/2", "snow/2")
    assert (manifest.score, manifest.ood, manifest.samples) == ("mean-over-domains", False, 6)


def test_a_set_that_a_table_describes(
    world: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (world / "metadata.csv").write_text(
        "split,filename,y,place\ntest,n01/art_0.jpg,n01,1\ntest,n02/art_0.jpg,n02,3\n"
    )
    arguments = ["--name", "wild", "--source", str(world), "--out", str(tmp_path)]
    arguments += ["--metadata", str(world / "metadata.csv"), "--file", "imagenet-r/{filename}"]
    code, _, err = run("shard_set", *arguments, "--domain", "{place}", "--split", "test")
    assert (code, err) == (0, "")
    manifest = Manifest.load(str(tmp_path / "wild"))
    assert (manifest.score, manifest.domains) == ("worst-domain", ("1", "3"))


def test_test_sets_of_own_photos_are_declared(
    world: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    arguments = ["--source", str(world / "imagenet"), "--out", str(tmp_path), "--ood"]
    code, _, err = run("shard_folder", *arguments, "--score", "mean-per-class")
    assert (code, err) == (0, "")
    train, test = (Manifest.load(str(tmp_path / name)) for name in ("train", "test"))
    assert (train.score, train.ood) == ("top1", False)
    assert (test.score, test.ood) == ("mean-per-class", True)


def test_third_party_shards_are_declared(
    world: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    arguments = ["--benchmark", "imagenet-r", "--source", str(world), "--out", str(tmp_path)]
    assert run("shard_ood", *arguments)[0] == 0
    packed = str(tmp_path / "imagenet-r")
    index = [f"{packed}/000000.tar", "--out", str(tmp_path / "indexed"), "--skip-beside"]
    code, _, err = run("index_shards", *index, "--ood", "--score", "mean-per-class")
    assert (code, err) == (0, "")
    indexed = str(tmp_path / "indexed")
    manifest = Manifest.load(indexed)
    assert (manifest.score, manifest.ood) == ("mean-per-class", True)
    # the payloads are the files
    both = [Samples.load(url, Manifest.load(url)).source.tolist() for url in (packed, indexed)]
    assert both[0] == both[1]
    code, _, err = run("index_shards", *index, "--ood")
    assert (code, "(different: score, plan_hash)" in err or "score" in err) == (2, True)
    # an index of an older version does not change
    older = replace(manifest, samples_sha256=None)
    older.save(indexed)
    (tmp_path / "indexed/samples.npz").unlink()
    assert run("index_shards", *index, "--ood", "--score", "mean-per-class")[0] == 0
    assert Manifest.load(indexed) == older
    assert not (tmp_path / "indexed/samples.npz").exists()


def empty_a_class(world: Path) -> None:
    (world / "imagenet" / "val" / "n02" / "ILSVRC2012_val_00000002.JPEG").unlink()


def add_a_class(world: Path) -> None:
    shutil.copytree(world / "imagenet" / "val" / "n02", world / "imagenet" / "val" / "n03")


def damage_an_image(world: Path) -> None:
    (world / "imagenet" / "val" / "n02" / "ILSVRC2012_val_00000002.JPEG").write_bytes(b"damaged")


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing folder": (lambda world: shutil.rmtree(world / "imagenet"), "no such folder"),
    "missing split": (lambda world: shutil.rmtree(world / "imagenet" / "val"), "imagenet-val in"),
    "missing class": (lambda world: shutil.rmtree(world / "imagenet" / "val" / "n02"), "n02"),
    "empty class": (empty_a_class, "n02 is empty"),
    "unknown class": (add_a_class, "unknown class: 'n03'"),
    "unreadable image": (damage_an_image, "ILSVRC2012_val_00000002.JPEG is not a readable"),
    "no label space": (lambda world: (world / "classes.json").unlink(), "no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(world: Path, tmp_path: Path, run: Callable[..., Result], mistake: str) -> None:
    make, message = MISTAKES[mistake]
    make(world)
    out = tmp_path / "out"
    code, _, err = run(
        "shard_imagenet", "--source", str(world / "imagenet"), "--out", str(out), "--splits", "val"
    )
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    # an unreadable image is found while packing: the plan exists, half a shard does not
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert left == ({"plan.json"} if mistake == "unreadable image" else set())


def test_another_plan(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    arguments = ["--benchmark", "imagenet-r", "--source", str(world), "--out", str(tmp_path)]
    assert run("shard_ood", *arguments)[0] == 0
    code, _, err = run("shard_ood", *arguments, "--seed", "7")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/imagenet-r holds a different plan (seed: 0 -> 7)")
    assert err.count("\n") == 1
    (world / "classes.json").write_text(json.dumps({**CLASSES, "templates": ["one {c}."]}))
    _, _, err = run("shard_ood", *arguments)
    assert (
        "a different plan (the names, ids or templates of the classes (--classes) changed)" in err
    )
    image = world / "imagenet-r" / "n01" / "art_0.jpg"
    image.rename(image.with_name("art_1.jpg"))
    _, _, err = run("shard_ood", *arguments)
    assert (
        "a different plan (the images, or their sizes, classes or domains, changed; the names, "
        in err
    )


@pytest.mark.slow
def test_counts(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    """ImageNet's own label space has a published number of images."""
    labels = LabelSpace.imagenet()
    document = {"ids": labels.ids, "names": labels.names, "templates": labels.templates}
    (world / "classes.json").write_text(json.dumps(document))
    image = world / "imagenet-r" / "n01" / "art_0.jpg"
    for wnid in labels.ids:
        (world / "sketch" / wnid).mkdir(parents=True)
        shutil.copy(image, world / "sketch" / wnid / "sketch_0.JPEG")
    arguments = ["--benchmark", "imagenet-sketch", "--source", str(world), "--out"]
    arguments += [str(tmp_path / "out")]
    code, out, err = run("shard_ood", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert (
        unstamped(out)
        == f"imagenet-sketch: 1,000 images in 1,000 class folders of {world / 'sketch'}\n"
    )
    assert err.startswith("error: imagenet-sketch has 1,000 images here, 50,889 were published")
    assert "--allow-count imagenet-sketch=1000" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run("shard_ood", *arguments, "--allow-count", "imagenet-sketch=999")
    assert (code, "--allow-count says 999" in err) == (2, True)
    assert run("shard_ood", *arguments, "--allow-count", "imagenet-sketch=1000")[0] == 0
    assert Manifest.load(str(tmp_path / "out" / "imagenet-sketch")).samples == 1000


def test_bad_images(world: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    bad = world / "imagenet-r" / "n02" / "art_1.jpg"
    bad.write_bytes(b"damaged")
    arguments = ["--benchmark", "imagenet-r", "--source", str(world), "--out", str(tmp_path)]
    code, _, err = run("shard_ood", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {bad} is not a readable JPEG, PNG or WebP image; --max-bad N")
    code, out, err = run("shard_ood", *arguments, "--max-bad", "1")
    assert (code, err) == (0, "")
    listed = tmp_path / "imagenet-r" / "quarantine.jsonl"
    assert f"1 left out: n02/art_1.jpg ({listed})" in out
    (line,) = listed.read_text().splitlines()
    assert json.loads(line) == {
        "path": "n02/art_1.jpg",
        "reason": "is not a readable JPEG, PNG or WebP image",
        "shard": "000000.tar",
    }
    code, out, _ = run("shard_ood", *arguments, "--max-bad", "1")
    assert (code, f"(1 left out: {listed}), nothing to do" in out) == (0, True)


SET = ("--name", "mine", "--source", "x", "--out", "y")


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("shard_ood", ["--benchmark", "--source", "x", "--out", "y"], "--benchmark names nothing"),
        ("shard_imagenet", ["--splits", "--source", "x", "--out", "y"], "--splits names nothing"),
        ("shard_imagenet", ["--source", "x", "--out", "y", "--task", "3"], "--task must be I/N"),
        (
            "shard_imagenet",
            ["--source", "x", "--out", "y", "--allow-count", "7"],
            "--allow-count must be SET=N",
        ),
        (
            "shard_imagenet",
            ["--source", "x", "--out", "y", "--splits", "val", "--allow-count", "imagenet-r=7"],
            "unknown set in --allow-count 'imagenet-r'",
        ),
        ("shard_set", [*SET, "--name", "imagenet-r"], "imagenet-r is a benchmark with a known"),
        ("shard_set", [*SET, "--name", "../x"], "--name is '../x'"),
        ("shard_set", [*SET, "--domain", "{place}"], "--file, --label, --domain and --split need"),
        (
            "shard_set",
            [*SET, "--metadata", "x.csv", "--domains", "1"],
            "--domains counts folders, but --metadata lists files",
        ),
        (
            "index_shards",
            ["x.tar", "--out", "imagenet-r", "--ood"],
            "imagenet-r is a benchmark: its name determines its score",
        ),
    ],
)
def test_wrong_options(
    run: Callable[..., Result], tool: str, arguments: list[str], message: str
) -> None:
    code, _, err = run(tool, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {message}")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["shard_imagenet", "shard_ood"])
def test_as_a_program(tool: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / f"{tool}.py")]
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--task" in usage.stdout
    arguments = ["--source", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]
    if tool == "shard_ood":
        arguments += ["--benchmark", "imagenet-a"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: no such folder: {tmp_path / 'absent'}\n"
