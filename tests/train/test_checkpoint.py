"""Checkpoints: whole or not used, written behind the training's back, on any store."""

import errno
import json
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
import torch

from rft import dist, files, remote
from rft.clip.classifier import load_state, save_state
from rft.remote import Patience
from rft.runs import SELECTED
from rft.train import __main__ as train_command
from rft.train import checkpoint, loop
from rft.train.checkpoint import Progress, Store, Writer, content
from tests import tiny
from tests.conftest import build_model
from tests.servers.tmpfs import small_disk
from tests.tiny import weights
from tests.waiting import SECONDS

ALONE = dist.World(rank=0, size=1, local_rank=0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory, tiny_data, tiny_clip) -> list[str]:
    """Hashes of the undisturbed run's weights."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    tiny.call(
        train_command,
        *("object-mask-single-fill", "--data", tiny_data, "--run-dir", folder),
        *("--scale", "miniature", "--model.clip", tiny_clip, "--loader.workers", "0"),
        *("--loader.held-out", "16", "--loader.batch-size", "6", "--optim.epochs", "3"),
    )
    return weights(folder)


class Killed(BaseException):
    """Ends a training in the middle of a step, after a checkpoint that was under way."""


def kill_after(step: int, monkeypatch) -> None:
    """Let the training die when it comes to `step`."""
    whole = loop.accumulate_gradients

    def dying(job, module, batch, at, *rest):
        if at == step:
            raise Killed
        return whole(job, module, batch, at, *rest)

    monkeypatch.setattr(loop, "accumulate_gradients", dying)


def killed(train, monkeypatch, step: int, *options: str) -> None:
    """Leave a run that died at `step`, its process gone."""
    with monkeypatch.context() as patch:
        kill_after(step, patch)
        with pytest.raises(Killed):
            train("run", *options)


def saved(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped", "unrecorded"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(
    train, calm, monkeypatch, tmp_path, capsys, how
):
    killed(train, monkeypatch, 26)
    run = tmp_path / "run"
    assert saved(run)[-2:] == [20, 24]
    newest = run / "checkpoints" / "step-00000024.pt"
    data = bytearray(newest.read_bytes())
    if how == "truncated":
        newest.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    else:
        newest.with_suffix(".json").unlink()
    capsys.readouterr()
    train()
    output = capsys.readouterr()
    (line,) = (line for line in output.err.splitlines() if line.startswith("WARNING"))
    assert "step-00000024.pt is damaged" in line
    assert "going on after step 20" in output.out
    assert weights(run) == calm
    # a person may want to look at it
    assert (run / "checkpoints" / "step-00000024.pt.damaged").exists()


GOOD = {"step": 24, "best_step": 20, "bytes": 4, "sha256": files.sha256_bytes(b"data")}


@pytest.mark.parametrize(
    "record",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 10**5, b"null",
        *({**GOOD, **wrong} for wrong in (
            {"step": 23}, {"step": "24"}, {"bytes": -1}, {"bytes": 4.0}, {"sha256": "../x"},
            {"best_step": None}, {"best_step": 2**70}, {"more": 1},
        )),
        {"step": 24},
    ],
)  # fmt: skip
def test_a_damaged_record_is_a_damaged_checkpoint(tmp_path, record):
    store = checkpoint.Store(str(tmp_path), keep=2)
    (tmp_path / "step-00000024.pt").write_bytes(b"data")
    path = tmp_path / "step-00000024.json"
    path.write_text(json.dumps(GOOD))
    assert store.damage(24) == ""
    path.write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
    assert store.damage(24) == "its record is damaged"
    with pytest.raises(ValueError, match="none of the checkpoints"):
        store.newest_whole()


@pytest.mark.slow
def test_nothing_starts_again_in_silence_if_all_are_damaged(train, monkeypatch, tmp_path, capsys):
    killed(train, monkeypatch, 26)
    for path in tmp_path.glob("run/checkpoints/*.pt"):
        path.write_bytes(b"")
    before = sorted(tmp_path.glob("run/checkpoints/*"))
    for _ in range(2):  # a requeued job must not meet an empty folder
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train()
        assert "is whole (step 24: 0 bytes instead of" in capsys.readouterr().err
        assert sorted(tmp_path.glob("run/checkpoints/*")) == before


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    store, model = Store(f"memory://unread-{tmp_path.name}", keep=2), build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (4, 8):
        store.write(content(model, optimizer, Progress(step=step), {}, 1))
    names = files.names(store.url)
    memory = fsspec.filesystem("memory")
    read = memory.cat_file

    def refuse(path: str, **options: int) -> bytes:
        if path.endswith(".pt"):
            raise KeyError("503")
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "PATIENCE", Patience(tries=2, longest_pause=0.001))
        patch.setattr(memory, "cat_file", refuse)
        with pytest.raises(ValueError, match=r"cannot read .*step-00000008.pt: .*503.*2 tries"):
            store.newest_whole()
    assert files.names(store.url) == names
    assert store.newest_whole().step == 8


@pytest.mark.slow
def test_what_a_killed_writer_left_is_swept_away(train, monkeypatch, tmp_path):
    killed(train, monkeypatch, 6)
    left = tmp_path / "run" / "checkpoints" / f".step-00000008.pt.{32 * '0'}.tmp"
    left.touch()
    train()
    assert not left.exists()


@pytest.mark.slow
def test_a_model_selected_after_the_checkpoint_that_is_used(train, monkeypatch, tmp_path):
    killed(train, monkeypatch, 26)
    path = tmp_path / "run" / SELECTED
    before = files.sha256_file(path)
    saved = load_state(path)
    assert int(saved.metadata["step"]) < 24
    later = {"recipe": saved.metadata["recipe"], "step": "25"}
    other = {name: value + 1 for name, value in saved.state.items()}
    save_state(str(path), other, saved.architecture, later, saved.classes)
    killed(train, monkeypatch, 27)
    assert files.sha256_file(path) == before


@pytest.mark.slow
def test_a_selected_models_checkpoint_is_kept(train, monkeypatch, tmp_path):
    killed(train, monkeypatch, 26, "--log.keep", "1")
    run = tmp_path / "run"
    best = json.loads((run / "checkpoints" / "step-00000024.json").read_text())["best_step"]
    assert best < 24
    assert saved(run) == sorted({best, 24})


def test_a_resumed_run_knows_its_best_so_far(tmp_path):
    store, model = Store(str(tmp_path), keep=2), build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    progress = Progress(step=8, best_step=4, best_correct=7)
    store.write(content(model, optimizer, progress, {"data": 1}, 1))
    assert checkpoint.resume(store, ALONE, model, optimizer, {"data": 1}, 1) == progress
    assert (
        checkpoint.resume(Store(f"{tmp_path}/none", 2), ALONE, model, optimizer, {}, 1)
        == Progress()
    )


def outlive_the_machine(url: str, train, monkeypatch, run: Path) -> list[str]:
    """Lose the machine and the newest checkpoint; return the weights of the run that goes on."""
    killed(train, monkeypatch, 26, "--log.checkpoints", url)
    assert not list(run.glob("checkpoints/*.pt"))
    url = f"{url}/{run.name}"
    newest = f"{url}/step-00000024.pt"
    assert newest.rsplit("/", 1)[1] in files.names(url)
    files.write_bytes(newest, files.read_bytes(newest)[:-1] + b"?")
    shutil.rmtree(run)
    train("run", "--log.checkpoints", url.removesuffix(f"/{run.name}"))
    assert "step-00000024.pt.damaged" in files.names(url)
    assert not [name for name in files.names(url) if name.startswith("step-00000004")]
    return weights(run)


@pytest.mark.slow
def test_checkpoints_on_another_store_outlive_the_machine(train, calm, monkeypatch, tmp_path):
    url = f"memory://checkpoints-{tmp_path.name}"
    assert outlive_the_machine(url, train, monkeypatch, tmp_path / "run") == calm


@pytest.mark.slow
def test_checkpoints_on_s3_outlive_the_machine(train, calm, monkeypatch, tmp_path, bucket):
    url = f"{bucket}/runs/first"
    assert outlive_the_machine(url, train, monkeypatch, tmp_path / "run") == calm


def test_checkpoints_of_another_run_are_refused(train, monkeypatch, tmp_path, capsys):
    url = f"memory://other-{tmp_path.name}"
    killed(train, monkeypatch, 6, "--log.checkpoints", url)
    # as on another machine, where nothing tells what was in the folder
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train("run", "--log.checkpoints", url, "--seed", "5")
    line = capsys.readouterr().err
    assert "step-00000004.pt was made on other data or by another run" in line
    assert "config.seed: 0 -> 5" in line


def test_another_donor_pool_is_told(tmp_path, capsys):
    store, model = Store(str(tmp_path), keep=2), build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    store.write(content(model, optimizer, Progress(step=4), {}, 256))
    checkpoint.resume(store, ALONE, model, optimizer, {}, 256)
    assert capsys.readouterr().out == "going on after step 4\n"
    checkpoint.resume(store, ALONE, model, optimizer, {}, 128)
    assert "fills choose from 128 images now, from 256 before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_what_is_there_stays(
    train, calm, monkeypatch, tmp_path, capsys
):
    store = tmp_path / "disk"
    store.mkdir()
    with small_disk(store, 2**22) as disk:
        killed(train, monkeypatch, 6, "--log.checkpoints", str(disk))
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train("run", "--log.checkpoints", str(disk))
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: cannot write checkpoint {disk}/run/step-00000008.pt: ")
        assert "No space left on device" in line
        assert sorted(path.name for path in disk.glob("run/*.pt")) == ["step-00000004.pt"]
        assert not list(disk.glob("run/.*.tmp")), "nothing half-written is left"
        ballast.unlink()
        run = train("run", "--log.checkpoints", str(disk))
        assert weights(run) == calm


def test_a_full_disk_is_one_line_wherever_it_is_full(tmp_path):
    large = {"progress": {"step": 1, "best_step": -1}, "model": [torch.zeros(50_000)] * 8}
    large["model"] = [tensor.clone() for tensor in large["model"]]
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", 2**20) as disk:
        store = Store(str(disk), keep=2)
        for free in range(4096, 2**20, 100_000):
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free)))
            with pytest.raises(OSError, match=r"cannot write checkpoint .*: .*No space left"):
                store.write(large)
            ballast.unlink()
            assert not files.names(str(disk))


def test_what_goes_to_a_remote_store_is_written_in_the_run_folder_first(tmp_path):
    url = f"memory://scratch-{tmp_path.name}"
    small = {"progress": {"step": 1, "best_step": -1}}
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", 2**20) as disk:
        store = Store(url, keep=2, scratch=disk)
        store.write(small)
        large = {"progress": {"step": 2, "best_step": -1}, "model": torch.zeros(2**20)}
        with pytest.raises(OSError, match=rf"step-00000002.pt: .*No space left.*{disk}"):
            store.write(large)
        assert not files.names(str(disk))
    assert store.newest_whole().step == 1


def test_an_upload_that_fails_names_the_store_and_not_the_run_folder(tmp_path, monkeypatch):
    url = f"memory://upload-{tmp_path.name}/x"
    lost = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(memory, "put_file", lambda *_: (_ for _ in ()).throw(lost))
    told = pytest.raises(OSError, match=f"Connection reset by peer: '{url}'")
    with told, files.publish(url, tmp_path) as path:
        path.touch()


@pytest.mark.slow
def test_checkpoints_elsewhere_are_of_one_configuration(train, tmp_path, capsys):
    elsewhere = ("--log.checkpoints", f"memory://elsewhere-{tmp_path.name}")
    folder = train("run", *elsewhere)
    (folder / "training.json").unlink()
    before = (folder / "config.json").read_bytes()
    with pytest.raises(SystemExit):
        train("run", *elsewhere, "--optim.lr", "0.5")
    assert "holds a run with another configuration: optim.lr" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before
    train("run", *elsewhere)
    assert (folder / "training.json").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before(
    train, calm, monkeypatch, tmp_path, capsys
):
    whole = loop.accumulate_gradients

    def exploding(job, module, batch, step, *rest):
        terms, grad_norm = whole(job, module, batch, step, *rest)
        return (terms * torch.nan if step == 9 else terms), grad_norm

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", exploding)
        with pytest.raises(SystemExit):
            train()
    assert "not finite at step 10 (cross-entropy nan" in capsys.readouterr().err
    run = tmp_path / "run"
    assert saved(run)[-1] == 8
    assert train() == run
    assert weights(run) == calm


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    student = build_model()
    optimizer = torch.optim.AdamW(student.parameters())
    begun, may_end = threading.Event(), threading.Event()
    save = torch.save

    def slow(*arguments):
        begun.set()
        assert may_end.wait(SECONDS)
        save(*arguments)

    monkeypatch.setattr(torch, "save", slow)
    store, order = Store(str(tmp_path), keep=2), []
    with Writer(store) as writer:
        what = content(student, optimizer, Progress(step=4), {}, 1)
        writer.write(what, lambda record, copy: order.append(record.step))
        assert begun.wait(SECONDS)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        with torch.no_grad():  # the next step
            for parameter in student.parameters():
                parameter.add_(1)
        assert not order, "the checkpoint is not written yet"
        may_end.set()
        writer.wait()
        assert order == [4]
    monkeypatch.undo()
    resumed = build_model(seed=9)
    again = torch.optim.AdamW(resumed.parameters())
    assert checkpoint.resume(store, ALONE, resumed, again, {}, 1) == Progress(step=4)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    store = Store(str(tmp_path / "store"), keep=2)
    store.write({"progress": {"step": 1, "best_step": -1}, "model": Evil()})
    model = build_model()
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.resume(store, ALONE, model, torch.optim.AdamW(model.parameters()), {}, 1)
    assert not (tmp_path / "ran").exists()
