"""Training and evaluation on a set that scores a single class only give a warning."""

import json
import shutil

import pytest

from rft.evaluate import command as evaluate_command
from tests import tiny

WARNING = "scores a single class, so every prediction counts as correct"


@pytest.mark.slow
def test_one_class_is_warned_of_in_training_and_evaluation(
    three_epochs, tiny_data, tmp_path, capsys
):
    run = three_epochs("run", "--optim.epochs", "1")
    assert WARNING not in capsys.readouterr().err
    for name in ("imagenet-train", "imagenet-val"):
        shutil.copytree(tiny_data / name, tmp_path / name)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        manifest["groups"] = [
            sorted(class_id for group in manifest["groups"] for class_id in group)
        ]
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    three_epochs("other", "--data", str(tmp_path), "--dry-run")
    assert f"{tmp_path}/imagenet-train {WARNING}" in capsys.readouterr().err
    options = ("--sets", "imagenet-val", "--workers", 0)
    tiny.call(evaluate_command, run, "--data", tmp_path, *options)
    said = capsys.readouterr()
    assert f"{tmp_path}/imagenet-val {WARNING}" in said.err
    assert "imagenet-val 100.00" in said.out
