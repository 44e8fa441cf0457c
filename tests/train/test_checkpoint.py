"""Checkpoints: complete or unused, written in the background, on any store."""

import dataclasses
import errno
import io
import json
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from benchmarks.servers.tmpfs import small_disk
from benchmarks.waiting import SECONDS
from rft import dist
from rft.clip.classifier import load_state, save_state
from rft.runs.filenames import SELECTED
from rft.runs.records import RECORD_BYTES
from rft.storage import files, remote
from rft.storage.remote import Patience
from rft.train import checkpoint, loop
from rft.train.checkpoint import Progress, Store, Writer, content
from rft.train.kernels import Choice
from tests import tiny
from tests.conftest import build_model
from tests.tiny import unstamped, weights

ALONE = dist.World(rank=0, size=1, local_rank=0)
KERNELS = Choice(layers="compiled")


def own(seed: int = 0) -> checkpoint.Own:
    """A run that has taken a step."""
    student = build_model(seed)
    optimizer = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    must_agree = {"config": {"precision": "fp32"}, "data": {"sha256": "0" * 64}}
    return checkpoint.Own(student, optimizer, must_agree, total_steps=100, most_correct=50)


@pytest.fixture(scope="module")
def calm(tmp_path_factory, tiny_data, tiny_clip) -> list[str]:
    """Hashes of the undisturbed run's weights."""
    run, options = tmp_path_factory.mktemp("calm") / "run", ("--loader.held-out", 16)
    options += ("--optim.epochs", 3)
    return weights(tiny.train("object-mask-single-fill", tiny_data, tiny_clip, run, *options))


class Killed(BaseException):
    """Ends a training in the middle of a step, after a pending checkpoint was written."""


def kill_after(step: int, monkeypatch) -> None:
    """Make the training die when it reaches `step`."""
    whole = loop.accumulate_gradients

    def dying(job, module, batch, at, *rest):
        if at == step:
            raise Killed
        return whole(job, module, batch, at, *rest)

    monkeypatch.setattr(loop, "accumulate_gradients", dying)


def killed(three_epochs, monkeypatch, step: int, *options: str) -> None:
    """Leave a run that died at `step`, its process gone."""
    with monkeypatch.context() as patch:
        kill_after(step, patch)
        with pytest.raises(Killed):
            three_epochs("run", *options)


def saved(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped", "unrecorded"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(
    three_epochs, calm, monkeypatch, tmp_path, capsys, how
):
    killed(three_epochs, monkeypatch, 26)
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
    three_epochs()
    output = capsys.readouterr()
    (line,) = (line for line in output.err.splitlines() if "] WARNING: " in line)
    assert "step-00000024.pt is damaged" in line
    assert "resuming after step 20" in output.out
    assert weights(run) == calm
    # a user may want to inspect it
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
def test_nothing_starts_again_in_silence_if_all_are_damaged(
    three_epochs, monkeypatch, tmp_path, capsys
):
    killed(three_epochs, monkeypatch, 26)
    for path in tmp_path.glob("run/checkpoints/*.pt"):
        path.write_bytes(b"")
    before = sorted(tmp_path.glob("run/checkpoints/*"))
    for _ in range(2):  # a requeued job must not find an empty folder
        capsys.readouterr()
        with pytest.raises(SystemExit):
            three_epochs()
        assert "is whole (step 24: 0 bytes instead of" in capsys.readouterr().err
        assert sorted(tmp_path.glob("run/checkpoints/*")) == before


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    store, model = Store(f"memory://unread-{tmp_path.name}", keep=2), build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (4, 8):
        store.write(content(model, optimizer, Progress(step=step), {}, 1, KERNELS))
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
def test_what_a_killed_writer_left_is_swept_away(three_epochs, monkeypatch, tmp_path):
    killed(three_epochs, monkeypatch, 6)
    left = tmp_path / "run" / "checkpoints" / f".step-00000008.pt.{32 * '0'}.tmp"
    left.touch()
    three_epochs()
    assert not left.exists()


@pytest.mark.slow
def test_a_model_selected_after_the_checkpoint_that_is_used(three_epochs, monkeypatch, tmp_path):
    killed(three_epochs, monkeypatch, 26)
    path = tmp_path / "run" / SELECTED
    before = files.sha256_file(path)
    saved = load_state(path)
    assert int(saved.metadata["step"]) < 24
    later = {"recipe": saved.metadata["recipe"], "step": "25"}
    other = {name: value + 1 for name, value in saved.state.items()}
    save_state(str(path), other, saved.architecture, later, saved.classes)
    killed(three_epochs, monkeypatch, 27)
    assert files.sha256_file(path) == before


@pytest.mark.slow
def test_a_selected_models_checkpoint_is_kept(three_epochs, monkeypatch, tmp_path):
    killed(three_epochs, monkeypatch, 26, "--log.keep", "1")
    run = tmp_path / "run"
    best = json.loads((run / "checkpoints" / "step-00000024.json").read_text())["best_step"]
    assert best < 24
    assert saved(run) == sorted({best, 24})


def test_a_resumed_run_knows_its_best_so_far(tmp_path):
    store, run = Store(str(tmp_path), keep=2), own()
    progress = Progress(step=8, best_step=4, best_correct=7)
    store.write(content(run.student, run.optimizer, progress, run.must_agree, 1, KERNELS))
    assert checkpoint.resume(store, ALONE, run, 1) == (progress, KERNELS)
    assert checkpoint.resume(Store(f"{tmp_path}/none", 2), ALONE, run, 1) == (Progress(), None)


def outlive_the_machine(url: str, three_epochs, monkeypatch, run: Path) -> list[str]:
    """Lose the machine and the newest checkpoint; return the weights of the resumed run."""
    killed(three_epochs, monkeypatch, 26, "--log.checkpoints", url)
    assert not list(run.glob("checkpoints/*.pt"))
    url = f"{url}/{run.name}"
    newest = f"{url}/step-00000024.pt"
    assert newest.rsplit("/", 1)[1] in files.names(url)
    files.write_bytes(newest, files.read_bytes(newest)[:-1] + b"?")
    shutil.rmtree(run)
    three_epochs("run", "--log.checkpoints", url.removesuffix(f"/{run.name}"))
    assert "step-00000024.pt.damaged" in files.names(url)
    assert not [name for name in files.names(url) if name.startswith("step-00000004")]
    return weights(run)


@pytest.mark.slow
def test_checkpoints_on_another_store_outlive_the_machine(
    three_epochs, calm, monkeypatch, tmp_path
):
    url = f"memory://checkpoints-{tmp_path.name}"
    assert outlive_the_machine(url, three_epochs, monkeypatch, tmp_path / "run") == calm


@pytest.mark.slow
def test_checkpoints_on_s3_outlive_the_machine(three_epochs, calm, monkeypatch, tmp_path, bucket):
    url = f"{bucket}/runs/first"
    assert outlive_the_machine(url, three_epochs, monkeypatch, tmp_path / "run") == calm


def test_checkpoints_of_another_run_are_refused(three_epochs, monkeypatch, tmp_path, capsys):
    url = f"memory://other-{tmp_path.name}"
    killed(three_epochs, monkeypatch, 6, "--log.checkpoints", url)
    # as on a different machine, where the former content of the folder is unknown
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        three_epochs("run", "--log.checkpoints", url, "--seed", "5")
    line = capsys.readouterr().err
    assert "step-00000004.pt was made on other data or by another run" in line
    assert "config.seed: 0 -> 5" in line


def test_another_donor_pool_is_told(tmp_path, capsys):
    store, run = Store(str(tmp_path), keep=2), own()
    store.write(content(run.student, run.optimizer, Progress(step=4), run.must_agree, 256, KERNELS))
    checkpoint.resume(store, ALONE, run, 256)
    assert unstamped(capsys.readouterr().out) == "resuming after step 4\n"
    checkpoint.resume(store, ALONE, run, 128)
    assert "fills choose from 128 images now, from 256 before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_what_is_there_stays(
    three_epochs, calm, monkeypatch, tmp_path, capsys
):
    store = tmp_path / "disk"
    store.mkdir()
    with small_disk(store, 2**22) as disk:
        killed(three_epochs, monkeypatch, 6, "--log.checkpoints", str(disk))
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            three_epochs("run", "--log.checkpoints", str(disk))
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: cannot write checkpoint {disk}/run/step-00000008.pt: ")
        assert "No space left on device" in line
        assert sorted(path.name for path in disk.glob("run/*.pt")) == ["step-00000004.pt"]
        assert not list(disk.glob("run/.*.tmp")), "nothing half-written is left"
        ballast.unlink()
        run = three_epochs("run", "--log.checkpoints", str(disk))
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
def test_checkpoints_elsewhere_are_of_one_configuration(three_epochs, tmp_path, capsys):
    elsewhere = ("--log.checkpoints", f"memory://elsewhere-{tmp_path.name}")
    folder = three_epochs("run", *elsewhere)
    (folder / "training.json").unlink()
    before = (folder / "config.json").read_bytes()
    with pytest.raises(SystemExit):
        three_epochs("run", *elsewhere, "--optim.lr", "0.5")
    assert "holds a run with another configuration: optim.lr" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before
    three_epochs("run", *elsewhere)
    assert (folder / "training.json").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before(
    three_epochs, calm, monkeypatch, tmp_path, capsys
):
    whole = loop.accumulate_gradients

    def exploding(job, module, batch, step, *rest):
        terms, grad_norm = whole(job, module, batch, step, *rest)
        return (terms * torch.nan if step == 9 else terms), grad_norm

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", exploding)
        with pytest.raises(SystemExit):
            three_epochs()
    assert "not finite at step 10 (cross-entropy nan" in capsys.readouterr().err
    run = tmp_path / "run"
    assert saved(run)[-1] == 8
    assert three_epochs() == run
    assert weights(run) == calm


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    run = own()
    student, optimizer = run.student, run.optimizer
    begun, may_end = threading.Event(), threading.Event()
    save = torch.save

    def slow(*arguments):
        begun.set()
        assert may_end.wait(SECONDS)
        save(*arguments)

    monkeypatch.setattr(torch, "save", slow)
    store, order = Store(str(tmp_path), keep=2), []
    with Writer(store) as writer:
        what = content(student, optimizer, Progress(step=4), run.must_agree, 1, KERNELS)
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
    resumed = own(seed=9)
    assert checkpoint.resume(store, ALONE, resumed, 1)[0] == Progress(step=4)
    for name, value in resumed.student.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    store = Store(str(tmp_path / "store"), keep=2)
    store.write({"progress": {"step": 1, "best_step": -1}, "model": Evil()})
    with pytest.raises(
        ValueError, match=r"step-00000001.pt is no checkpoint of this run: refused: it wants to use"
    ):
        checkpoint.resume(store, ALONE, own(), 1)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


Change = Callable[[dict[str, Any]], object]


def put(where: str, name: str, value: object) -> Change:
    """Replace a field of a part of the content; for "moments", of the first parameter's."""

    def change(saved: dict[str, Any]) -> None:
        part = saved["optimizer"]["state"][0] if where == "moments" else saved[where]
        part[name] = value

    return change


def of_model(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda saved: put("model", name, change(saved["model"][name]))(saved)


def doubled() -> list[Any]:
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


def huge() -> torch.Tensor:
    return torch.zeros(1).expand(2**40)


HEAD, EMBEDDING = "head.bias", "visual.class_embedding"
# changes for which a hostile record can have the right hash, and their errors
CONTENT: dict[str, tuple[Change, str]] = {
    "a list": (lambda _: [1], "it holds a list"),
    "a tensor": (lambda _: torch.zeros(3), "it holds a StoredTensor"),
    "code": (lambda saved: saved.update(model=Evil()), "refused: it wants to use pathlib"),
    "no must_agree": (lambda saved: saved.pop("must_agree") and None, "must_agree is missing"),
    "must_agree a text": (lambda saved: saved.update(must_agree="x"), "must_agree is 'x'"),
    "a config of nothing": (put("must_agree", "config", None), "must_agree.config is None"),
    "a config of numbers": (put("must_agree", "config", {1: 2}), r"config\[1\] is 1; it must be"),
    "doubled lists": (put("must_agree", "data", {"x": doubled()}), "more than"),
    "printed lists": (lambda saved: saved.update(model=doubled()), "more than"),
    "a long text": (put("must_agree", "data", {"x": "y" * 2_000_000}), "more than"),
    "another field": (lambda saved: saved.update(x=1), "x is an unknown field"),
    "a donor pool of -1": (lambda saved: saved.update(donor_pool=-1), "donor_pool is -1"),
    "step a text": (put("progress", "step", "x"), "progress.step is 'x'"),
    "step a truth": (put("progress", "step", True), "progress.step is True"),
    "step negative": (put("progress", "step", -5), "progress.step is -5"),
    "step of another": (put("progress", "step", 9), "its record names another step"),
    "a later best step": (put("progress", "best_step", 12), "best_step"),
    "a best step of no count": (put("progress", "best_correct", -1), "best_correct"),
    "more correct than images": (put("progress", "best_correct", 51), "51 of 50"),
    "progress of more": (put("progress", "x", 1), "progress.x is an unknown field"),
    "progress a list": (lambda saved: saved.update(progress=[]), r"progress is \[\]"),
    "no model": (lambda saved: saved.update(model={}), "is no tensor"),
    "a part missing": (lambda saved: saved["model"].popitem() and None, "is no tensor"),
    "a part too many": (put("model", "x", torch.zeros(1)), "model.x is not of this model"),
    "a part a number": (put("model", HEAD, 1), f"model.{HEAD} is no tensor"),
    "a part of another shape": (of_model(HEAD, lambda x: x[:1].clone()), f"model.{HEAD} is "),
    "a part of another type": (of_model(HEAD, torch.Tensor.int), f"{HEAD} is torch.int32, not"),
    "a part of halves": (of_model(HEAD, torch.Tensor.half), f"{HEAD} is torch.float16, not"),
    "one number for all": (of_model(HEAD, lambda x: torch.zeros(1).expand(x.shape)), "larger than"),
    "one number for 2**40": (put("model", HEAD, huge()), f"model.{HEAD} is "),
    "NaN": (of_model(HEAD, lambda x: x * torch.nan), f"{HEAD} holds NaN"),
    "infinite": (of_model(EMBEDDING, lambda x: x / 0), f"{EMBEDDING} holds NaN"),
    "optimizer a text": (lambda saved: saved.update(optimizer="x"), "optimizer is 'x'"),
    "optimizer empty": (lambda saved: saved.update(optimizer={}), "optimizer.state is missing"),
    "no moments": (put("optimizer", "state", {}), "optimizer.0.exp_avg is no tensor"),
    "moments of another": (
        lambda saved: saved["optimizer"]["state"].update({999: {}, 998: {"x": 1}}),
        "optimizer.998.x is not",
    ),
    "moments by name": (put("optimizer", "state", {"x": {}}), "optimizer.state"),
    "moments misshapen": (put("moments", "exp_avg", torch.zeros(1)), "optimizer.0.exp_avg is "),
    "moments of 2**40": (put("moments", "exp_avg", huge()), "optimizer.0.exp_avg is "),
    "moments a text": (put("moments", "exp_avg_sq", "x"), "optimizer.0.exp_avg_sq is no tensor"),
    "steps a number": (put("moments", "step", 4), "optimizer.0.step is no tensor"),
    "steps negative": (put("moments", "step", torch.tensor(-5.0)), "optimizer.0.step holds NaN"),
    "steps NaN": (put("moments", "step", torch.tensor(torch.nan)), "optimizer.0.step holds NaN"),
    "no groups": (put("optimizer", "param_groups", []), "param_groups are of other"),
    "a group a text": (put("optimizer", "param_groups", ["x"]), r"param_groups\[0\] is 'x'"),
    "a group of one": (put("optimizer", "param_groups", [{"params": [0]}]), "of other parameters"),
}  # fmt: skip


def deflated(data: bytes) -> bytes:
    """Write 256 MiB of zeros in a few bytes, unlike torch."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2**28) if name.endswith("/data/0") else old.read(name))
    return out.getvalue()


def members(data: bytes) -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    return out.getvalue()


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "damaged or truncated"),
    "a text": (lambda _: b"hello", "damaged or truncated"),
    "half": (lambda data: data[: len(data) // 2], "damaged or truncated"),
    "deflated": (deflated, "is compressed, which torch does not do"),
    "two of one name": (members, "two members of one name"),
}


def written(folder: Path, change: Change = lambda _: None) -> tuple[Store, Path]:
    """Write a checkpoint with changed content; returns its file."""
    store, run = Store(str(folder), keep=2), own()
    progress = Progress(step=8, best_step=4, best_correct=7)
    saved = content(run.student, run.optimizer, progress, run.must_agree, 1, KERNELS)
    saved = checkpoint.to_cpu(saved)
    step = saved["progress"]["step"]
    store.write(saved)
    path = folder / checkpoint.file_name(step)
    changed = change(saved)
    checkpoint.save(saved if changed is None else changed, path)
    vouch(path)
    return store, path


def vouch(path: Path) -> None:
    """Update the record for the file."""
    record = path.with_suffix(".json")
    known = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    record.write_text(json.dumps({**json.loads(record.read_text()), **known}))


def cannot_resume(store: Store, path: Path, says: str) -> None:
    run = own(seed=9)
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    names = files.names(store.url)
    with pytest.raises(ValueError, match=says) as error:
        checkpoint.resume(store, ALONE, run, 1)
    line = str(error.value)
    assert line.startswith(str(path))
    assert "use a new run folder" in line
    assert len(line.splitlines()) == 1
    assert len(line) < 1000
    assert files.names(store.url) == names
    for name, value in run.student.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow  # together
@pytest.mark.parametrize("what", CONTENT)
def test_the_content_of_a_checkpoint_is_no_more_trusted_than_its_record(tmp_path, what):
    change, says = CONTENT[what]
    cannot_resume(*written(tmp_path, change), says)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] * (what == "deflated")) for what in BYTES]
)
def test_the_bytes_of_a_checkpoint_are_no_more_trusted_than_its_record(tmp_path, what):
    store, path = written(tmp_path)
    change, says = BYTES[what]
    path.write_bytes(change(path.read_bytes()))
    vouch(path)
    cannot_resume(store, path, says)


def with_others(seed: int = 0) -> checkpoint.Own:
    """A run with a text tower that learns and a moving teacher."""
    others = {"text": torch.nn.Linear(3, 2), "teacher": build_model(seed + 1).visual}
    return dataclasses.replace(own(seed), others=others)


def written_with_others(folder: Path, change: Change = lambda _: None) -> tuple[Store, Any]:
    store, run = Store(str(folder), keep=2), with_others()
    progress = Progress(step=8, best_step=4, best_correct=7)
    made = content(run.student, run.optimizer, progress, run.must_agree, 1, KERNELS, run.others)
    made = checkpoint.to_cpu(made)
    change(made)
    store.write(made)
    return store, made


def test_what_changes_beside_the_student_comes_back(tmp_path):
    store, made = written_with_others(tmp_path)
    run = with_others(seed=5)
    progress, _ = checkpoint.resume(store, ALONE, run, 1)
    assert progress.step == 8
    for name, module in run.others.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, made[name][key]), (name, key)


OTHERS_CHANGED: dict[str, tuple[Change, str]] = {
    "no text tower": (lambda made: made.pop("text") and None, "text.bias is no tensor"),
    "a teacher of another shape": (
        lambda made: made["teacher"].update({"proj": torch.zeros(2, 2)}), "teacher.proj is "
    ),
    "a teacher of NaN": (
        lambda made: made["teacher"]["proj"].fill_(torch.nan) is None, "teacher.proj holds NaN"
    ),
    "a text tower of another type": (
        lambda made: made["text"].update(bias=torch.zeros(2).half()), "text.bias is torch.float16"
    ),
    "a text tower that is a number": (lambda made: made.update(text=3), "text is 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS_CHANGED)
def test_weights_beside_the_students_are_no_more_trusted(tmp_path, what):
    change, says = OTHERS_CHANGED[what]
    store, _ = written_with_others(tmp_path, change)
    run = with_others(seed=5)
    before = {name: value.clone() for name, value in run.others["teacher"].state_dict().items()}
    with pytest.raises(ValueError, match=says):
        checkpoint.resume(store, ALONE, run, 1)
    for name, value in run.others["teacher"].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_run_without_them_does_not_take_them(tmp_path):
    store, _ = written_with_others(tmp_path)
    with pytest.raises(ValueError, match=r"teacher\.\w+ is not of this model"):
        checkpoint.resume(store, ALONE, own(seed=5), 1)


def test_a_step_after_the_last_is_refused(tmp_path):
    store, _ = written(tmp_path)
    with pytest.raises(ValueError, match=r"progress.step is 8 of 7"):
        checkpoint.resume(store, ALONE, dataclasses.replace(own(), total_steps=7), 1)


def test_options_of_the_optimizer_are_the_runs_own(tmp_path):
    def change(saved: dict[str, Any]) -> None:
        for group in saved["optimizer"]["param_groups"]:
            group.update(lr=1e9, weight_decay=-5.0, maximize=True, initial_lr=1)

    store, _ = written(tmp_path, change)
    run = own(seed=9)
    before = run.optimizer.state_dict()["param_groups"]
    checkpoint.resume(store, ALONE, run, 1)
    assert run.optimizer.state_dict()["param_groups"] == before
    moments = run.optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(moments, own().optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    "name",
    ["step-9.pt", "step-\u0661\u0662.pt", f"step-{'9' * 200}.pt", "step-0000000000000009.pt"],
)
def test_a_file_of_another_name_is_no_checkpoint(tmp_path, capsys, name):
    store, _ = written(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    assert store.steps() == [8]
    assert store.newest_whole().step == 8
    assert not capsys.readouterr().err


def test_a_damaged_one_is_not_moved_into_a_folder_of_its_new_name(tmp_path, capsys):
    store, _ = written(tmp_path)
    damaged = tmp_path / "step-00000009.pt"
    damaged.write_bytes(b"x")
    (tmp_path / "step-00000009.pt.damaged").mkdir()
    with pytest.raises(OSError, match="damaged"):
        store.newest_whole()
    assert damaged.exists()
    assert not capsys.readouterr().err, "nothing was renamed"


def test_a_record_has_a_limit(tmp_path):
    store, path = written(tmp_path)
    with path.with_suffix(".json").open("ab") as stream:
        stream.truncate(RECORD_BYTES + 1)
    with pytest.raises(ValueError, match=r"cannot read .*step-00000008.json"):
        store.newest_whole()
