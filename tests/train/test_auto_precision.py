"""`--precision auto`: chosen once by the device, then a fixed part of the run.

A device with native bf16 is simulated where only the choice matters: the runs are real, on the CPU.
"""

import json
import re
import shutil
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft import dist, recipes
from rft.clip.classifier import load_state
from rft.config import resolve_precision
from rft.demo import command as demo_command
from rft.experiments import Experiment
from rft.train import command as train_command
from rft.train.job import Job
from rft.train.run import finished
from tests.tiny import unstamped

CPU = torch.device("cpu")


@pytest.fixture
def bf16_gpu(monkeypatch) -> pytest.MonkeyPatch:
    """As if this machine's device had native bf16; `undo` removes it."""
    monkeypatch.setattr(dist, "has_bf16", lambda device: True)
    return monkeypatch


def recorded(run: Path) -> set[str]:
    """The precisions in a run's configuration and in all of its checkpoints."""
    found = {json.loads((run / "config.json").read_text())["precision"]}
    for path in run.glob("checkpoints/step-*.pt"):
        saved = torch.load(path, weights_only=True)
        found.add(saved["must_agree"]["config"]["precision"])
    return found


def stopped(run: Path) -> Path:
    """Turn a finished run into one that was stopped after its newest checkpoint."""
    (run / "training.json").unlink()
    return run


def complaint(three_epochs, capsys, *words: str) -> str:
    """The line with which the run is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        three_epochs(*words)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("choice", "gpu", "bf16", "expected"),
    [
        ("auto", True, True, ("bf16", "auto: native on this GPU")),
        ("auto", True, False, ("fp32", "auto: this GPU has no native bf16")),
        ("auto", False, False, ("fp32", "auto: on a CPU")),
        *((named, True, True, (named, "")) for named in ("fp32", "tf32", "bf16")),
        *((named, False, False, (named, "")) for named in ("fp32", "tf32", "bf16")),
    ],
)
def test_the_choice(choice, gpu, bf16, expected):
    assert resolve_precision(choice, gpu=gpu, bf16=bf16) == expected


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_for_those_who_name_it(three_epochs, monkeypatch, precision):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    three_epochs("run", "--precision", precision, "--dry-run")
    assert chosen == (["high"] if precision == "tf32" else [])


@pytest.mark.parametrize(("major", "native"), [(7, False), (8, True), (9, True)])
def test_emulated_bf16_is_not_counted(monkeypatch, major, native):
    # torch's own function queries a card that is absent; for V100 and T4 (7.x) it would answer
    # yes if emulation counted
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    assert dist.has_bf16(torch.device("cuda", 0)) == native
    # --device cpu on a machine with such a card
    assert not dist.has_bf16(CPU)


@pytest.mark.slow
def test_a_cpu_trains_in_fp32_as_before_and_says_why(three_epochs, capsys):
    run = three_epochs()
    assert f"{run}: object-mask-single-fill on 1 x cpu, fp32 (auto: on a CPU)\n" in (
        capsys.readouterr().out
    )
    assert recorded(run) == {"fp32"}
    named = three_epochs("named", "--precision", "fp32")
    assert "on 1 x cpu, fp32\n" in capsys.readouterr().out
    (state, *_), (same, *_) = (load_state(r / "checkpoints/last.safetensors") for r in (run, named))
    assert all(torch.equal(value, same[name]) for name, value in state.items())


@pytest.mark.slow
def test_native_bf16_is_used_and_recorded(three_epochs, bf16_gpu, capsys):
    run = three_epochs()
    assert "on 1 x cpu, bf16 (auto: native on this GPU)\n" in capsys.readouterr().out
    assert recorded(run) == {"bf16"}
    (state, *_) = load_state(run / "checkpoints/last.safetensors")
    named, fp32 = (
        three_epochs("named", "--precision", "bf16"),
        three_epochs("fp32", "--precision", "fp32"),
    )
    (same, *_), (other, *_) = (
        load_state(r / "checkpoints/last.safetensors") for r in (named, fp32)
    )
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(value, same[name]) for name, value in state.items())
    assert not all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.slow
def test_the_preset_names_its_own(three_epochs, bf16_gpu, monkeypatch, capsys):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    run = three_epochs("run", "--preset", "official-parity")
    assert "on 1 x cpu, tf32\n" in capsys.readouterr().out
    assert recorded(run) == {"tf32"}
    assert set_to == ["high"]


@pytest.mark.slow
def test_a_dry_run_shows_the_choice(three_epochs, bf16_gpu, capsys):
    run = three_epochs("run", "--dry-run")
    said = capsys.readouterr().out.splitlines()
    assert "    precision                bf16  (auto: native on this GPU)" in said
    assert not run.exists()
    three_epochs("run", "--dry-run", "--precision", "bf16")
    said = capsys.readouterr().out.splitlines()
    assert "  * precision                bf16  (the recipe's is auto)" in said
    bf16_gpu.undo()
    three_epochs("run", "--dry-run")
    assert "precision                fp32  (auto: on a CPU)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_begun_on_a_gpu_is_not_resumed_in_another_precision(three_epochs, bf16_gpu, capsys):
    run = stopped(three_epochs())
    before = (run / "config.json").read_bytes()
    bf16_gpu.undo()
    for words in (("run",), ("run", "--dry-run")):
        line = complaint(three_epochs, capsys, *words)
        assert "precision: 'bf16' -> 'fp32'" in line
        assert "to resume it (--precision bf16; auto depends on the device)" in line
    assert (run / "config.json").read_bytes() == before
    assert not (run / "training.json").exists()
    three_epochs("run", "--precision", "bf16")
    assert (run / "training.json").exists()
    assert recorded(run) == {"bf16"}


@pytest.mark.slow
def test_a_run_of_the_version_before_resumes_on_a_cpu(three_epochs, bf16_gpu, capsys):
    # which recorded the fp32 that was its default
    run = stopped(three_epochs("run", "--precision", "fp32"))
    line = complaint(three_epochs, capsys)
    assert "precision: 'fp32' -> 'bf16'" in line
    assert "(--precision fp32; auto depends on the device)" in line
    bf16_gpu.undo()
    three_epochs()
    assert "resuming after step 30" in capsys.readouterr().out
    assert recorded(run) == {"fp32"}


@pytest.mark.slow
def test_a_finished_run_is_finished_on_any_device(three_epochs, bf16_gpu, capsys):
    run = three_epochs()
    before = (run / "config.json").read_bytes()
    bf16_gpu.undo()
    capsys.readouterr()
    three_epochs()
    assert unstamped(capsys.readouterr().out) == f"run already finished: {run} (in bf16)\n"
    three_epochs("run", "--dry-run")
    assert unstamped(capsys.readouterr().out) == f"run already finished: {run} (in bf16)\n"
    assert (run / "config.json").read_bytes() == before
    # but only if everything else agrees, and not if another precision is given
    assert "optim.lr: 0.0003 -> 0.5" in complaint(three_epochs, capsys, "run", "--optim.lr", "0.5")
    line = complaint(three_epochs, capsys, "run", "--precision", "fp32")
    assert "precision: 'bf16' -> 'fp32'" in line
    assert "--precision bf16" in line


@pytest.mark.slow
def test_a_finished_run_needs_no_device(three_epochs, monkeypatch, capsys):
    three_epochs("run", "--precision", "tf32")
    capsys.readouterr()
    # cuda is not there
    three_epochs("run", "--device", "cuda", "--preset", "paper")
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_another_difference_does_not_name_the_precision(three_epochs, capsys):
    stopped(three_epochs())
    line = complaint(three_epochs, capsys, "run", "--optim.lr", "0.5")
    assert re.search(r"Repeat its options to resume it \(--optim\.lr \S+\), or choose", line)
    assert "--precision" not in line


@pytest.mark.slow
def test_checkpoints_that_outlived_their_run_folder(three_epochs, bf16_gpu, tmp_path, capsys):
    elsewhere = ("--log.checkpoints", f"memory://precision-{tmp_path.name}")
    shutil.rmtree(three_epochs("run", *elsewhere))
    bf16_gpu.undo()
    line = complaint(three_epochs, capsys, "run", *elsewhere)
    assert "config.precision: 'bf16' -> 'fp32'" in line
    assert "repeat its options (--precision bf16; auto depends on the device)" in line
    three_epochs("run", *elsewhere, "--precision", "bf16")
    assert "resuming after step 30" in capsys.readouterr().out


@pytest.mark.slow
def test_a_configuration_edited_by_hand(three_epochs, capsys):
    run = three_epochs()
    document = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(document | {"precision": "auto"}))
    three_epochs()
    assert "already finished" in capsys.readouterr().out
    stopped(run)
    line = complaint(three_epochs, capsys)
    assert "precision: 'auto' -> 'fp32'" in line
    assert "--precision" not in line


def test_no_job_without_a_precision():
    config = replace(recipes.build("vanilla"), precision="auto")
    with pytest.raises(RuntimeError, match="a job's precision is 'auto'"):
        Job(
            config=config,
            world=None,
            device=CPU,
            objective=None,
            batches=None,
            held_out=None,
            fingerprint={},
        )


@pytest.mark.slow
def test_the_demo_skips_what_another_device_finished(three_epochs, bf16_gpu, tiny_data, tiny_clip):
    run = three_epochs()
    bf16_gpu.undo()
    words = [
        *("torchrun", "-m", "rft.train", "object-mask-single-fill", "--data", str(tiny_data)),
        *("--run-dir", str(run), "--scale", "miniature", "--model.clip", tiny_clip),
        *("--loader.held-out", "16", "--loader.batch-size", "6", "--optim.epochs", "3"),
    ]
    stage = Experiment("ours", tuple(words))
    assert demo_command.is_done(stage, str(tiny_data))
    stopped(run)
    assert not demo_command.is_done(stage, str(tiny_data))
    assert finished(train_command.parse(words[3:])) is None
