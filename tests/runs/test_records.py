"""A damaged or hostile run folder is a one-line error in every command that reads it."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rft.runs import folder as runs
from rft.runs import records, trained_on
from rft.runs.records import Clusters, Metrics, Provenance, Reached, Results, Training
from rft.storage import documents
from rft.text import plain

SHA = "0123456789abcdef" * 4
CONFIG: dict[str, Any] = {
    "recipe": "vanilla",
    "seed": 3,
    "data": "s3://bucket/shards",
    "train_set": "imagenet-train",
    "scale": "paper",
    "precision": "bf16",
    "model": {"clip": "ViT-B-16", "pretrained": "openai", "start": ""},
    "optim": {"epochs": 10, "lr": 3e-5},
}
TEMPERATURE = {
    "value": 1.5,
    "images": 8,
    "train_set": "train",
    "manifest_sha256": SHA,
    "held_out": 8,
    "split_seed": 0,
}
GOOD: dict[str, Any] = {
    "results.json": {
        "schema": 1,
        "checkpoint": "run/checkpoints/best.safetensors",
        "checkpoint_sha256": SHA,
        "step": 5,
        "config_sha256": SHA,
        "sets": {"imagenet-val": {"correct": 1, "total": 2, "manifest_sha256": SHA}},
        "unfinished": "",
        "provenance": {},
    },
    "training.json": {
        "steps": 5,
        "best_step": 4,
        "world_size": 8,
        "manifest_sha256": SHA,
        "inputs": {"start_sha256": SHA},
        "weights_sha256": {"best.safetensors": SHA},
    },
    "progress.json": {"step": 5, "of": 9, "checkpoint": "step-00000005.pt", "sha256": SHA},
    "provenance.json": {
        "rft": "0.1.0",
        "git": "abc",
        "packages": {"torch": "2.0"},
        "python": "3.11",
        "machine": "Linux",
        "command": ["rft.train", "vanilla"],
        "weights_sha256": {"best.safetensors": SHA},
    },
    "config.json": CONFIG,
    "merge.json": {
        "recipe": "greedy-soup",
        "seed": 0,
        "merged_from": [{"path": "runs/a", "sha256": SHA}],
        "soup": {
            "correct": 3,
            "total": 4,
            "steps": [
                {"path": "a", "sha256": SHA, "correct": 3, "soup_correct": 3, "kept": True},
            ],
        },
    },
    "import.json": {
        "recipe": "imported",
        "seed": 0,
        "alpha": 0.5,
        "imported_from": {
            "format": "openai",
            "path": "ViT-B-32.pt",
            "sha256": {"ViT-B-32.pt": SHA},
            "text": True,
            "tag": "openai",
            "manifest_sha256": SHA,
        },
    },
    "ensemble.json": {
        "recipe": "vrf",
        "seed": 0,
        "transductive": False,
        "ensemble_of": [{"path": "runs/a", "sha256": SHA}, {"path": "runs/b", "sha256": SHA}],
        "fitted": {
            "zero_shot": TEMPERATURE,
            "fine_tuned": TEMPERATURE,
            "bank": {"images": 3, "of": 4, "k": 1},
        },
    },
    "clusters.json": {
        "schema": 1,
        "sets": {"imagenet-val": [{"share": 0.5, "images": 2}]},
    },
    "metrics.jsonl": {
        "step": 5, "loss": 0.5, "ce": 0.5, "mse": 0.1, "kd": 0.0,
        "held_out_correct": 3, "held_out_total": 4,
    },
}  # fmt: skip
STRICT = {"results.json", "training.json", "progress.json", "clusters.json"}
# fields that may be null, and texts that may be anything
NULL = {
    "results.json": {"config_sha256"},
    "training.json": {"manifest_sha256", "weights_sha256"},
    "progress.json": {"sha256"},
    "provenance.json": {"git", "weights_sha256"},
    "config.json": {"optim", "optim.epochs"},
    "merge.json": {"merged_from", "soup"},
    "import.json": {"alpha", "imported_from", "imported_from.manifest_sha256"},
    "ensemble.json": {
        *("ensemble_of", "fitted", "fitted.zero_shot", "fitted.fine_tuned", "fitted.bank"),
    },
    "clusters.json": set(),
    "metrics.jsonl": set(),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "results.json": lambda path: records.find(path, Results),
    "training.json": lambda path: records.find(path, Training),
    "progress.json": lambda path: records.find(path, Reached),
    "provenance.json": lambda path: records.find(path, Provenance),
    "config.json": lambda path: records.read_config(path.parent),
    "merge.json": lambda path: records.read_config(path.parent),
    "import.json": lambda path: records.read_config(path.parent),
    "ensemble.json": lambda path: records.read_config(path.parent),
    "clusters.json": lambda path: records.find(path, Clusters),
    "metrics.jsonl": lambda path: list(records.read_metrics(path)),
}
NO_JSON = {
    "empty": b"",
    "half": b'{"step": 1, ',
    "binary": b"\x00\xff\xfe\x80" * 50,
    "utf-16": '{"step": 1}'.encode("utf-16"),
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep list": b"[" * 100_000,
    "huge number": b'{"step": 1' + b"0" * 10_000 + b"}",
    "twice": b'{"recipe": "a", "recipe": "b", "step": 1, "step": 2}',
    "surrogate": b'{"recipe": "\\ud800", "step": 1}',
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "text": b'"x"',
}
VALUES = (None, True, -7, 1.5, 2**70, "x\x1b]0;title\x07", [], [3], {}, {"a": 3})


CONFIGS = ("merge.json", "import.json", "ensemble.json")


def place(tmp_path: Path, name: str, data: bytes) -> Path:
    """Write a document under the name that its reader expects."""
    path = tmp_path / ("config.json" if name in CONFIGS else name)
    path.write_bytes(data + (b"\n" if name.endswith("l") else b""))
    return path


def leaves(document: dict[str, Any], before: str = "") -> Iterator[tuple[str, list[Any], Any]]:
    """Yield name, path and value of everything in a document that has a type."""
    for key, value in document.items():
        yield f"{before}{key}", [key], value
        inner = value[0] if isinstance(value, list) and isinstance(value[0], dict) else value
        if isinstance(inner, dict):
            at = [key] if inner is value else [key, 0]
            for name, path, found in leaves(inner, f"{before}{key}."):
                yield name, [*at, *path], found


def changed(document: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    inner: Any = document
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return document


def is_free(name: str, where: str) -> bool:
    """Whether nothing reads a field: config.json and provenances have untyped fields."""
    return (name, where) in (("config.json", "model.start"), ("config.json", "optim.lr"))


def fits(name: str, where: str, value: Any, good: Any) -> bool:
    """Whether a value is valid in place of `good`."""
    if is_free(name, where) or (value is None and where in NULL[name]):
        return True
    if isinstance(value, dict) and where in ("model", "optim", "provenance"):
        return True
    if value == {} and isinstance(good, dict):
        needed = ("sets.imagenet-val", "soup", "imported_from", "fitted.zero_shot")
        return where not in (*needed, "fitted.fine_tuned", "fitted.bank")
    if value == [] and isinstance(good, list):
        return True
    if isinstance(value, str):
        names = where == "recipe" or where.startswith("fitted.")
        return isinstance(good, str) and good != SHA and not names
    if isinstance(value, bool):
        return isinstance(good, bool)
    if where.endswith("value"):  # of a temperature
        return isinstance(value, int | float) and value > 0
    if isinstance(good, float):
        return isinstance(value, int | float) and (name == "metrics.jsonl" or 0 <= value <= 1)
    return where.endswith("seed") and value == -7


@pytest.mark.parametrize("name", GOOD)
def test_a_good_document_is_read(tmp_path, name):
    assert READERS[name](place(tmp_path, name, json.dumps(GOOD[name]).encode()))


@pytest.mark.parametrize("damage", NO_JSON)
@pytest.mark.parametrize("name", GOOD)
def test_what_is_no_such_document_is_one_line(tmp_path, name, damage):
    path = place(tmp_path, name, NO_JSON[damage])
    with pytest.raises(ValueError, match=f"^({path}|{tmp_path} is not a run folder)") as raised:
        READERS[name](path)
    line = str(raised.value)
    assert plain(line) == line


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_every_field_has_its_type(tmp_path, name):
    for where, path, good in leaves(GOOD[name]):
        for value in VALUES:
            document = changed(GOOD[name], path, value)
            file = place(tmp_path, name, json.dumps(document).encode())
            if fits(name, where, value, good):
                READERS[name](file)
                continue
            # for a field whose presence affects a second one, either may be named
            part = where.rpartition(".")[2].partition("_")[0]
            with pytest.raises(ValueError, match=f"^{file}.*{part}") as raised:
                pytest.fail(f"{where} is {value}: {READERS[name](file)}")
            assert plain(str(raised.value)) == str(raised.value)


@pytest.mark.parametrize("name", GOOD)
def test_surplus_and_missing_fields(tmp_path, name):
    surplus = place(tmp_path, name, json.dumps({**GOOD[name], "zzz": 1}).encode())
    if name in STRICT:
        with pytest.raises(ValueError, match="zzz is an unknown field"):
            READERS[name](surplus)
    else:
        READERS[name](surplus)
    needed = {
        "results.json": ("step", "checkpoint_sha256", "sets"),
        "training.json": ("steps", "best_step", "world_size"),
        "progress.json": ("step", "of"),
        "config.json": ("recipe", "seed"),
        "metrics.jsonl": ("step", "held_out_correct", "held_out_total"),
    }
    for field in needed.get(name, ()):
        less = {key: value for key, value in GOOD[name].items() if key != field}
        with pytest.raises(ValueError, match=field):
            READERS[name](place(tmp_path, name, json.dumps(less).encode()))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("progress.json", {"step": 10}, "step is 10 of 9"),
        ("results.json", {"sets": {"../a": {}}}, r"'\.\./a'; it must be the name of a packed set"),
        ("results.json", {"sets": {"/a": {}}}, "the name of a packed set"),
        ("results.json", {"sets": {"a/../../b": {}}}, "the name of a packed set"),
        ("results.json", {"sets": {"a\x1bb": {}}}, "no control characters"),
        ("results.json", {"checkpoint_sha256": "../../x"}, "64 hex digits"),
        ("config.json", {"recipe": " "}, "printable name"),
        ("config.json", {"recipe": ""}, "at least 1 character"),
        ("import.json", {"alpha": 1.5}, "alpha is 1.5"),
        ("metrics.jsonl", {"held_out_correct": 5}, "held_out_correct is 5 of 4"),
        ("metrics.jsonl", {"held_out_total": 0}, "held_out_total is 0"),
        ("metrics.jsonl", {"lr": "x"}, "lr is 'x'; it must be a number"),
    ],
)
def test_values_that_cannot_be(tmp_path, name, changes, message):
    data = json.dumps({**GOOD[name], **changes}).encode()
    with pytest.raises(ValueError, match=message):
        READERS[name](place(tmp_path, name, data))


def test_sets_may_lie_in_a_folder_of_the_data_root():
    count = {"correct": 1, "total": 2, "manifest_sha256": SHA}
    assert records.SetCount(**count).total == 2
    with pytest.raises(ValueError, match=r"^count: 3 are correct of 2"):
        records.SetCount(**{**count, "correct": 3})
    with pytest.raises(ValueError, match=r"^count: seen_other_label is 2, seen is 1"):
        records.SetCount(**count, seen=1, seen_other_label=2)


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl"])
def test_what_is_no_file_is_said(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    with pytest.raises((ValueError, OSError), match=rf"{name}:? (it )?is a folder"):
        READERS[name](path)
    path.rmdir()
    os.mkfifo(path)  # it has no writer: a reader would wait for ever
    with pytest.raises(ValueError, match=f"{name} is a FIFO, not a regular file"):
        READERS[name](path)


def test_a_document_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORD_BYTES", 100)
    for name in ("training.json", "config.json"):
        path = place(tmp_path, name, json.dumps(GOOD[name]).encode() + b" " * 200)
        with pytest.raises(ValueError, match=rf"{name}: it has more than 100 bytes"):
            READERS[name](path)


def metrics(tmp_path: Path, data: bytes) -> list[Metrics]:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    return [logged.metrics for logged in records.read_metrics(path)]


def test_metrics_of_a_run_that_diverged_are_read(tmp_path):
    data = b'{"step": 1, "ce": NaN, "loss": Infinity, "lr": -Infinity}\n{"step": 2}\n'
    first, second = metrics(tmp_path, data)
    assert first.ce != first.ce
    assert second.ce is None
    with pytest.raises(ValueError, match=r"line 1: step is NaN|line 1: step is nan"):
        metrics(tmp_path, b'{"step": NaN}\n')


def test_half_a_last_line_is_no_damage_and_another_is(tmp_path):
    assert [line.step for line in metrics(tmp_path, b'{"step": 1}\n{"step": 2')] == [1]
    assert metrics(tmp_path, b'{"step": 1') == []
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not valid JSON"):
        metrics(tmp_path, b'{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 has more than 65536 bytes"):
        metrics(tmp_path, b'{"step": 1}\n' + b" " * 70_000)


def test_a_weights_file_in_other_codes_folder_belongs_to_no_run(tmp_path):
    weights = tmp_path / "experiment" / "checkpoints" / "model.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x")
    assert runs.run_of(weights) == tmp_path / "experiment"
    config = tmp_path / "experiment" / "config.json"
    config.write_text('{"optim": {"name": "sgd"}, "hidden_size": 3}')
    assert runs.run_of(weights) is None
    assert runs.unfinished(weights) == ""
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        runs.unfinished(weights)


@pytest.mark.parametrize(
    "seen",
    [
        3, {}, [3], [["train"]], [["train", SHA, "a"]], [["train", SHA, 1, 2, 3, 4]],
        [["train", SHA, 1, 2, -1]], [["train", "x"]], [[3, SHA]],
        [["a\x1bb", SHA]], [{"name": "train", "manifest_sha256": 3}],
    ],
)  # fmt: skip
def test_what_weights_have_seen_is_a_list_of_names_and_hashes(seen):
    path = Path("w.safetensors")
    for text in (json.dumps(seen), "[" * 100_000, "NaN"):
        with pytest.raises(ValueError, match=r"^w.safetensors is damaged: trained_on") as raised:
            trained_on.of_metadata(path, {trained_on.KEY: text})
        assert plain(str(raised.value)) == str(raised.value)


def with_temperatures(*values: float | None) -> Results:
    """One set's results per value, with its temperature."""
    fitted = {"images": 8, "train_set": "train", "manifest_sha256": SHA, "held_out": 8}
    sets = {}
    for number, value in enumerate(values):
        found = None if value is None else {**fitted, "value": value, "split_seed": 0}
        sets[f"set{number}"] = {
            **GOOD["results.json"]["sets"]["imagenet-val"],
            "temperature": found,
        }
    document = {**GOOD["results.json"], "sets": sets}
    return documents.decode(json.dumps(document).encode(), Results, "results.json")


def test_a_model_has_one_temperature():
    assert with_temperatures().temperature is None
    assert with_temperatures(None, None).temperature is None
    assert with_temperatures(None, 1.5).temperature.value == 1.5
    # fitted on two devices
    assert with_temperatures(1.5, None, 1.5000001).temperature.value == 1.5
    with pytest.raises(ValueError, match=r"temperatures \(1\.5 and 1\.6\); evaluate all"):
        _ = with_temperatures(1.5, 1.6).temperature
