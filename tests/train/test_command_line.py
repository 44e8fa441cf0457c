"""A user's mistake is one clear line, exit code 2, and nothing half-written."""

import json
import shutil
import subprocess
import sys

import filelock
import fsspec
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.tiny_world import environment
from rft import __version__, recipes
from rft.evaluate import command as evaluate_command
from rft.loading import show as show_command
from rft.loading.dataset import PackedDataset
from rft.merge import command as merge_command
from rft.train import command as train_command
from tests import tiny
from tests.tiny import call, torchrun_command

pytestmark = pytest.mark.slow  # together


@pytest.fixture
def options(tiny_data, tiny_clip, tmp_path) -> list[str]:
    return tiny.training("vanilla", tiny_data, tiny_clip, tmp_path / "run")


def test_no_argument_means_the_main_recipe_on_the_miniature():
    config = train_command.parse([])
    assert (config.recipe, config.scale, config.data) == (recipes.DEFAULT, "miniature", "")
    assert train_command.parse(["vanilla", "--seed", "3"]).seed == 3
    assert train_command.parse(["vanilla", "--data=d", "--run-dir=r"]).scale == "paper"
    assert train_command.parse(["--scale", "miniature", "--data", "d", "--run", "r"]).run == "r"


def test_a_dry_run_writes_nothing_and_refuses_what_a_run_refuses(
    refused, options, tmp_path, capsys
):
    before = sorted(tmp_path.rglob("*"))
    call(train_command, *options, "--dry-run", "--seed", "7")
    said = capsys.readouterr().out.splitlines()
    assert "  * seed                     7  (the recipe's is 0)" in said
    assert said[-1].endswith("--optim.epochs 1 --seed 7")
    assert sorted(tmp_path.rglob("*")) == before
    line = refused(train_command, *options, "--dry-run", "--data", tmp_path / "none")
    assert "no packed dataset at" in line


def test_profile_and_pictures_do_not_change_the_result(options, tmp_path, capsys):
    recipe = ["object-mask-single-fill", *options[1:]]
    plain, seen = tmp_path / "plain", tmp_path / "seen"
    call(train_command, *recipe, "--run-dir", str(plain), "--log.image-steps", "0")
    watched = ["--run-dir", str(seen), "--log.image-steps", "4", "--profile"]
    call(train_command, *recipe, *watched)
    assert "profile of 10 steps" in capsys.readouterr().out
    last = [run / "checkpoints" / "last.safetensors" for run in (plain, seen)]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert len(list((seen / "profile").glob("steps-*.json.gz"))) == 1
    events = EventAccumulator(str(seen / "tensorboard")).Reload()
    assert [event.step for event in events.Images("counterfactuals")] == [4, 8]


def test_unknown_recipe(refused):
    line = refused(train_command, "vanila", "--data", "x", "--run-dir", "y")
    assert "unknown recipe 'vanila'; did you mean 'vanilla'?" in line


def test_unknown_scale(refused):
    assert "unknown scale 'tiny'" in refused(train_command, "vanilla", "--scale", "tiny")


def test_no_run_folder(refused):
    line = refused(train_command, "vanilla", "--data", "x")
    assert "--run-dir is missing" in line


def test_a_dry_run_draws_no_world(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in ((), ("--run-dir", "run"), ("--scale", "miniature")):
        assert "--dry-run needs --data" in refused(train_command, "vanilla", *options, "--dry-run")
    assert not any(tmp_path.iterdir())


def test_no_data_there(refused, tmp_path):
    run = tmp_path / "run"
    line = refused(train_command, "vanilla", "--data", tmp_path / "none", "--run-dir", run)
    assert "no packed dataset at" in line
    assert "imagenet-train" in line
    assert not run.exists()


@pytest.mark.parametrize(("ranks", "message"), [("4", "6 cannot be split into 4 ranks"), ("6", "")])
def test_impossible_batch_and_world(refused, options, tmp_path, ranks, message):
    recipe = ["object-mask-single-fill", *options[1:]]
    line = refused(train_command, *recipe, WORLD_SIZE=ranks, RANK="0")
    assert (message or "needs another image in the micro-batch") in line
    assert not (tmp_path / "run").exists()


def test_batch_larger_than_the_set(refused, options, tmp_path):
    line = refused(train_command, *options, "--loader.batch-size", "500")
    assert "larger than the 68 training samples" in line
    assert not (tmp_path / "run").exists()


def test_value_out_of_range(refused, options):
    assert "method.threshold is 2" in refused(train_command, *options, "--method.threshold", "2")


def test_model_that_does_not_fit_the_shards(refused, options, tmp_path):
    line = refused(train_command, *options, "--model.clip", "rft-miniature")
    assert "was packed at 16 px, but the model needs 48 px" in line
    assert not (tmp_path / "run").exists()


def test_the_last_of_a_repeated_option_decides_the_defaults_too():
    options = ["vanilla", "--data", "d", "--run-dir", "r", "--scale", "paper"]
    config = train_command.parse([*options, "--scale=miniature"])
    assert (config.scale, config.loader.batch_size) == ("miniature", 64)


def test_a_model_that_was_meant_otherwise(refused, options, tmp_path, tiny_clip):
    folder = tiny_clip.removeprefix("local-dir:")
    run = tmp_path / "other"
    (run / "checkpoints").mkdir(parents=True)
    (run / "training.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pt").write_bytes(b"")
    for name, words in {
        folder: f"for the folder use local-dir:{folder}",
        str(run): f"it is a run folder of rft; start from its model with --model.start {run}",
        str(tmp_path / "empty"): "it is a folder: open_clip_config.json is missing",
        str(tmp_path / "file.pt"): "it is a file; name its model with --model.clip and the file "
        "with --model.pretrained",
        "ViT-B/32": "did you mean ViT-B-32",
        "vit-b-32-quickgelu": "did you mean ViT-B-32-quickgelu",
        "rft-miniatur": "did you mean rft-miniature",
        "laion/some-model": "for a model of the hub hf-hub:ORGANISATION/NAME",
    }.items():
        line = refused(train_command, *options, "--model.clip", name)
        assert f"open_clip has no model {name!r}; " in line
        assert words in line
    for name, words in {
        str(run): "it is a run folder of rft; start from its model with --model.start",
        str(tmp_path / "none"): "no such folder",
        str(tmp_path / "file.pt"): "it is a file; name its model with --model.clip",
        str(tmp_path / "empty"): "open_clip_config.json is missing",
    }.items():
        line = refused(train_command, *options, "--model.clip", f"local-dir:{name}")
        assert f"no CLIP at {name}: {words}" in line
    assert not (tmp_path / "run").exists()


def edited(path, **changes) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("provenance", "writer"),
    [
        ('{"rft": "97.0.1", "git": "abcdef123456"}', "a newer rft (97.0.1, commit abcdef123456)"),
        ('{"rft": "0.0.1", "git": null}', "a different rft (0.0.1)"),
        ("{", "a different version of rft (its provenance.json does not record which)"),
        ("[]", "a different version of rft (its provenance.json does not record which)"),
    ],
)
def test_a_run_of_a_newer_version(refused, options, tmp_path, provenance, writer):
    call(train_command, *options, "--optim.epochs", "0")
    run = tmp_path / "run"
    (run / "provenance.json").write_text(provenance)
    before = (run / "config.json").read_bytes()
    for changes, words in (
        ({"strange": 1}, "strange is an unknown field"),
        (
            {"optim": {"schedule": "wsd"}},
            "optim.schedule is 'wsd'; it must be 'cosine' or 'one-cycle'",
        ),
    ):
        edited(run / "config.json", **changes)
        line = refused(train_command, *options, "--optim.epochs", "0")
        assert f"error: {run / 'config.json'}: {words}" in line
        assert f"; it was written by {writer}, this is rft {__version__}: use" in line
        assert words in refused(show_command, run, "--step", "0")
        (run / "config.json").write_bytes(before)
    for changes, words in (
        ({"optim": 3}, "optim is 3; it must be an object"),
        ({"optim": {"epochs": "ten"}}, "optim.epochs is 'ten'; it must be a whole number"),
        ({"optim": {"epochs": -1}}, "optim.epochs is -1; it must be greater than or equal to 0"),
    ):
        edited(run / "config.json", **changes)
        line = refused(train_command, *options, "--optim.epochs", "0")
        assert f"error: {run / 'config.json'}: {words}" in line
        (run / "config.json").write_bytes(before)


def test_unknown_model_and_weights(refused, options):
    line = refused(train_command, *options, "--model.clip", "ViT-Z-99")
    assert "open_clip has no model 'ViT-Z-99'" in line
    names = ("--model.clip", "ViT-B-32", "--model.pretrained")
    assert "neither a weights tag of ViT-B-32" in refused(train_command, *options, *names, "nope")
    line = refused(train_command, *options, *names, "openai")
    assert "were trained as ViT-B-32-quickgelu; use that model" in line


def test_a_run_folder_belongs_to_one_configuration(refused, options, tmp_path):
    call(train_command, *options)
    before = (tmp_path / "run" / "config.json").read_bytes()
    line = refused(train_command, *options, "--seed", "5", "--optim.lr", "1e-3")
    assert "optim.lr: 0.0003 -> 0.001; order_seed: 0 -> 5; seed: 0 -> 5" in line
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_run_that_never_saved_can_be_started_otherwise(refused, options, tmp_path):
    (tmp_path / "run").mkdir()
    config = recipes.build("no-mask", data="elsewhere", run="r")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    call(train_command, *options)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"] == "vanilla"
    merge = ("wise", tmp_path / "run", tmp_path / "run", "--out", tmp_path / "run")
    assert "holds a training run; choose another --out" in refused(merge_command, *merge)


def test_a_run_folder_that_is_a_file(refused, options, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "is a file; choose another" in refused(train_command, *options)


def test_other_data_under_a_started_run(refused, options, tmp_path, tiny_data):
    call(train_command, *options)
    (tmp_path / "run" / "training.json").unlink()
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in (tiny_data / "imagenet-train").iterdir():
        (changed / "imagenet-train").mkdir(exist_ok=True)
        if path.is_file():
            (changed / "imagenet-train" / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((changed / "imagenet-train" / "manifest.json").read_text())
    manifest["plan_hash"] = "0" * 64
    (changed / "imagenet-train" / "manifest.json").write_text(json.dumps(manifest))
    line = refused(train_command, *options, "--data", changed)
    assert "was made on other data" in line
    assert "manifest_sha256" in line


def test_a_folder_that_is_a_url_is_refused(refused, options, tmp_path):
    line = refused(train_command, *options, "--run-dir", "s3://bucket/run")
    assert "--run-dir is s3://bucket/run; it must be a local folder" in line
    merge = ("wise", tmp_path / "a", tmp_path / "b", "--out", "s3://bucket/merged")
    assert "it must be a local folder" in refused(merge_command, *merge)


def test_a_damaged_shard_is_told_in_one_line_by_a_loader_process(options, tmp_path, tiny_data):
    shutil.copytree(tiny_data, tmp_path / "data")
    packed = PackedDataset(str(tmp_path / "data" / "imagenet-train"))
    # the first sample is read before the run starts, to check its size
    for sample in range(20, len(packed)):
        number = int(np.searchsorted(packed.shard_ends, sample, side="right"))
        path = tmp_path / "data" / "imagenet-train" / packed.manifest.shards[number].name
        damaged = bytearray(path.read_bytes())
        damaged[int(packed.index.offset[sample]) + 200] ^= 1
        path.write_bytes(damaged)
    arguments = [*options, "--data", str(tmp_path / "data"), "--loader.workers", "1"]
    command = [sys.executable, "-m", "rft.train", *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2
    # after it, on a busy machine, Python's resource tracker may print something when it ends
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert line.startswith("error: damaged bytes (crc32 mismatch) at ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "training.json").exists()


def test_data_on_a_store_that_is_not_the_disk(options, tmp_path, tiny_data):
    store = fsspec.filesystem("memory")
    store.put(str(tiny_data) + "/", "/rft-test-data/", recursive=True)
    try:
        call(train_command, *options, "--data", "memory://rft-test-data")
    finally:
        store.rm("/rft-test-data", recursive=True)
    assert (tmp_path / "run" / "training.json").exists()


def test_bfloat16_trains_as_float32_does_but_for_rounding(options, tmp_path):
    found = []
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        more = ["--precision", precision, "--log.every-steps", "1", "--run-dir", str(run)]
        call(train_command, "object-mask-single-fill", *options[1:], *more)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    exact, rounded = map(np.array, found)
    assert len(exact) == 11
    # 2 ** -8 is the spacing of bf16's numbers; the losses are sums of many of them
    np.testing.assert_allclose(rounded, exact, rtol=2**-8)
    assert (rounded != exact).all()


def test_a_loss_that_explodes_stops_the_run_and_names_the_step(options, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rft", *options, "--optim.lr", "1e30"])
    with pytest.raises(ValueError, match=r"the loss or its gradient is not finite at step 2 \("):
        train_command.main()
    assert not (tmp_path / "run" / "training.json").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))


def test_a_head_of_another_label_space(refused, options, tmp_path, tiny_data):
    call(train_command, *options)
    shutil.copytree(tiny_data, tmp_path / "data")
    path = tmp_path / "data" / "imagenet-val" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["classes"].append("fifth")
    manifest["class_ids"].append("n00000009")
    path.write_text(json.dumps(manifest))
    sets = ("--sets", "imagenet-val", "--workers", "0")
    line = refused(evaluate_command, tmp_path / "run", "--data", tmp_path / "data", *sets)
    assert "class 4 is missing in the first, 'n00000009' ('fifth') in the second" in line


def test_counts_of_an_earlier_call_stay(options, tmp_path, tiny_data, capsys):
    call(train_command, *options)
    for sets in (["imagenet-val"], ["imagenet-r"], ["imagenet-val", "imagenet-r"]):
        arguments = (tmp_path / "run", "--data", tiny_data, "--sets", *sets)
        call(evaluate_command, *arguments, "--workers", "0")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert sorted(results["sets"]) == ["imagenet-r", "imagenet-val"]
    assert "nothing to do" in capsys.readouterr().out


def test_two_jobs_on_one_run_folder(refused, options, tmp_path):
    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        # a separate process: a lock can be taken again by its holder
        command = [sys.executable, "-m", "rft.train", *options, "--cluster.lock-wait", "0"]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2
    assert "another job is writing" in result.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_held_lock_dies_with_its_job(tmp_path):
    code = f"import filelock; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); lock.acquire()"
    code += "; print('held', flush=True); import signal; signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "held\n"
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / ".lock", blocking=False).acquire()
        job.kill()
    with filelock.FileLock(tmp_path / ".lock", blocking=False):
        pass


def test_evaluation_and_merge_mistakes(refused, tmp_path, tiny_data):
    none = tmp_path / "none.safetensors"
    line = refused(evaluate_command, none, "--data", tiny_data, "--sets", "imagenet-val")
    assert "no checkpoint at" in line
    line = refused(merge_command, "wise", none, none, "--out", tmp_path / "w", "--alpha", "2")
    assert "--alpha is 2.0; it must be in [0, 1]" in line
    line = refused(merge_command, "wise", none, none, "--out", tmp_path / "w")
    assert "no checkpoint at" in line
    assert not (tmp_path / "w").exists()


def test_torchruns_summary_ends_with_the_mistake():
    command = torchrun_command(2, "rft.train", "vanila", "--data", "x", "--run-dir", "y")
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    cause = result.stderr.rpartition("Root Cause")[2]
    assert "unknown recipe 'vanila'; did you mean 'vanilla'?" in cause
    assert "To enable traceback" not in cause


def test_no_option_is_an_abbreviation_of_torchruns():
    # its parser sees our options too and refuses abbreviations of two of its own
    from torch.distributed.run import get_args_parser

    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    ours = ["--data", "--run-dir", "--seed", "--split-seed", "--scale", "--precision", "--device"]
    ours += ["--sets", "--batch-size", "--out", "--method.threshold", "--loader.workers"]
    ours += ["--dry-run", "--profile"]
    for option in ours:
        assert not any(other.startswith(option) for other in theirs), option
