"""A damaged run folder is a one-line error that names the file, in every command that reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rft.convert import command as convert
from rft.evaluate import command as evaluate_command
from rft.merge import command as merge_command
from rft.report import command as report_command
from rft.report.page import write_report
from rft.train import command as train_command
from tests import tiny
from tests.tiny import call, forget_weights

pytestmark = pytest.mark.slow

ALL = ("evaluate", "report", "wise", "export", "train")
READ_BY = {
    "config.json": ALL,
    "training.json": ALL,
    "provenance.json": ALL,
    "results.json": ("evaluate", "report", "export"),
    "progress.json": ("evaluate", "report", "wise", "export", "dry-run"),
    "metrics.jsonl": ("report", "resume"),
}
FIELD = {
    "config.json": "seed",
    "training.json": "weights_sha256",
    "provenance.json": "packages",
    "results.json": "sets",
    "progress.json": "of",
    "metrics.jsonl": "step",
}
DAMAGES: dict[str, Callable[[dict[str, Any], str], bytes]] = {
    "binary": lambda *_: b"\x00\xff\xfe\x1b[2J" * 40,
    "deep": lambda *_: b'{"a":' * 50_000,
    "list": lambda *_: b"[]",
    "type": lambda good, field: json.dumps({**good, field: "\x1b[2J"}).encode(),
    "number": lambda good, field: json.dumps({**good, field: 10**400}).encode(),
    "nan": lambda good, field: json.dumps({**good, field: float("nan")}).encode(),
    "twice": lambda good, field: json.dumps(good).encode()[:-1] + f', "{field}": 1}}'.encode(),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data, tiny_clip) -> Path:
    """A zero-shot and a trained run, evaluated."""
    root = tmp_path_factory.mktemp("runs")
    for recipe, epochs in (("zero-shot", 0), ("vanilla", 1)):
        tiny.train(recipe, tiny_data, tiny_clip, root / recipe, "--optim.epochs", epochs)
    call(evaluate_command, root / "zero-shot", root / "vanilla", *evaluation(tiny_data))
    return root


def evaluation(data: Path) -> tuple[object, ...]:
    return ("--data", data, "--sets", "imagenet-val", "--workers", 0, "--device", "cpu")


@pytest.fixture
def command(runs, tiny_data, tiny_clip, tmp_path) -> Callable[[str, Path], tuple[Any, ...]]:
    """The commands that read a run folder, with their options."""

    def words(name: str, run: Path) -> tuple[Any, ...]:
        out = ("--out", tmp_path / "out" / (name if name != "export" else "a.safetensors"))
        training = tiny.training("vanilla", tiny_data, tiny_clip, run)
        return {
            "evaluate": (evaluate_command, run, *evaluation(tiny_data)),
            "report": (report_command, run, *out),
            "wise": (merge_command, "wise", runs / "zero-shot", run, *out),
            "export": (
                convert,
                "export",
                run,
                "--to",
                "safetensors",
                *out[:1],
                f"{out[1]}.safetensors",
            ),
            "train": (train_command, *training),
            "resume": (train_command, *training),
            "dry-run": (train_command, *training, "--dry-run"),
        }[name]

    return words


@pytest.mark.parametrize("name", READ_BY)
def test_every_command_names_the_damaged_file(runs, tmp_path, command, refused, name):
    run = tmp_path / "run"
    shutil.copytree(runs / "vanilla", run)
    path = run / name
    good = json.loads(
        path.read_text().splitlines()[0] if name == "metrics.jsonl" else path.read_bytes()
    )
    if name in ("progress.json", "metrics.jsonl"):
        (run / "training.json").unlink()
    # a folder with a changed configuration is a different run: each damage is of the same one
    for damage, spoil in DAMAGES.items():
        if (name, damage) == ("metrics.jsonl", "nan"):
            continue  # of losses, which may be NaN
        data = spoil(good, FIELD[name])
        path.write_bytes(data + b"\n")
        for reader in READ_BY[name]:
            line = refused(*command(reader, run))
            assert name in line, (damage, reader)
            assert str(run) in line
            assert line.isprintable()
            assert path.read_bytes() == data + b"\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


def test_runs_of_before_are_read(runs, tmp_path, command, capsys, tiny_data):
    """A folder as written by the first version: fewer fields, and NaN among its losses."""
    run = tmp_path / "run"
    shutil.copytree(runs / "vanilla", run)
    forget_weights(run)
    documents = {path.name: json.loads(path.read_text()) for path in run.glob("*.json")}
    training, results = documents["training.json"], documents["results.json"]
    config, made = documents["config.json"], documents["provenance.json"]
    for name in ("manifest_sha256", "inputs"):
        del training[name]
    del results["unfinished"]
    results["config_sha256"] = None
    for name in ("scale", "preset", "recompute", "compile", "cluster", "split_seed", "order_seed"):
        del config[name]
    config["model"]["weights"] = config["model"].pop("pretrained")
    config["loader"]["streams"] = 1
    del made["cpus"]
    for name, document in documents.items():
        (run / name).write_text(json.dumps(document))
    (run / "progress.json").unlink()
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "loss": NaN, "ce": NaN, "lr": 1e-05, "images_per_sec": 3}\n{"st')
    for name in ("evaluate", "report", "wise", "export"):
        capsys.readouterr()
        call(*command(name, run))
        assert "WARNING" not in capsys.readouterr().err
    results.pop("config_sha256")
    assert json.loads((run / "results.json").read_text()).items() >= results.items()
    assert (tmp_path / "out" / "report" / "curves.png").is_file()


def test_a_merge_of_itself_has_no_text_tower(runs, tmp_path, refused):
    """A hostile folder may name itself as its own source."""
    run = tmp_path / "run"
    shutil.copytree(runs / "vanilla", run)
    forget_weights(run)
    (run / "training.json").unlink()
    ancestors = [{"path": str(path), "sha256": "0" * 64} for path in (run, tmp_path / "other")]
    config = {"recipe": "vanilla", "seed": 0, "merged_from": ancestors}
    shutil.copytree(run, tmp_path / "other")
    for folder in (run, tmp_path / "other"):
        (folder / "config.json").write_text(json.dumps(config))
    words = ("export", run, "--to", "open-clip", "--out", tmp_path / "out", "--text", "")
    call(convert, *words)  # the tiny CLIP's own name gives the location of its text tower


def test_names_of_files_are_shown_as_text(runs, tmp_path, capsys):
    hostile = tmp_path / "a\x1b]0;owned\x07b"
    shutil.copytree(runs / "vanilla", hostile)
    for words in (
        (report_command, tmp_path, "--out", tmp_path / "out"),
        (report_command, runs / "vanilla", "--out", tmp_path / "out\x1b[2J"),
        (merge_command, "uniform-soup", hostile, runs / "zero-shot", "--out", tmp_path / "soup"),
    ):
        with pytest.raises(SystemExit):
            call(*words)
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert "\\x1b" in line
        assert line.endswith(" has a control character")
        assert not {letter for letter in printed.out + line if letter < " "} - {"\n"}


def test_a_report_cannot_lie_behind_a_url(runs, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    line = refused(report_command, runs / "vanilla", "--out", "s3://bucket/report")
    assert "--out is s3:/bucket/report; it must be a local folder" in line
    with pytest.raises(ValueError, match="must be a local folder"):
        write_report([runs / "vanilla"], Path("s3://bucket/report"))
    assert not list(tmp_path.iterdir())
