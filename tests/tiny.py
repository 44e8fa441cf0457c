"""Commands on the tiny world (benchmarks/tiny_world.py), in this process or on several ranks."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.tiny_world import children, environment, kill
from rft import cli
from rft.storage import files
from tests.forked import Request

STAMP = re.compile(
    r"^20[0-9]{2}-[01][0-9]-[0-3][0-9] [0-2][0-9](?::[0-5][0-9]){2} \[[0-9]+\] (?:INFO: )?", re.M
)


def unstamped(printed: str) -> str:
    """Output without times and ranks: an INFO line becomes its text, others keep their level."""
    return STAMP.sub("", printed)


def complaints(errors: str) -> list[str]:
    """The lines of a stderr that are not INFO: warnings, without their time, and an error."""
    lines = [line for line in errors.splitlines() if "] INFO: " not in line]
    return [unstamped(line) for line in lines]


def call(command, *arguments: object) -> None:
    """Run a command's `main` in this process, as a rank if a test has set RANK."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rft", *map(str, arguments)])
        cli.run(command.main, ranks="RANK" in os.environ)


def training(
    recipe: str, data: Path | str, clip: str, run: Path | str, *options: object
) -> list[str]:
    """The command line after `rft.train`: a short epoch on the tiny world, or by `options`."""
    small = ("--scale", "miniature", "--loader.batch-size", 6, "--loader.held-out", 8)
    small += ("--loader.workers", 0, "--optim.epochs", 1)
    named = ("--data", data, "--run-dir", run, "--model.clip", clip)
    return [recipe, *map(str, (*named, *small, *options))]


def train(
    recipe: str, data: Path | str, clip: str, run: Path, *options: object, ranks: int = 1
) -> Path:
    """Train on the tiny world, one rank in this process; return the run folder."""
    # imported here, because short processes of tests import this module for other things
    from rft.train import command

    words = training(recipe, data, clip, run, *options)
    if ranks == 1:
        call(command, *words)
    else:
        torchrun(ranks, "rft.train", *words)
    return run


def torchrun_command(ranks: int, *module_and_options: str) -> list[str]:
    """One process starts without torchrun: the same code, and the test is faster."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "-m", *module_and_options]


def torchrun(
    ranks: int, *module_and_options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a module on so many ranks to its end, like torchrun but faster (tests/forked.py)."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        output.touch()
        errors.touch()
        request = Request(
            ranks=ranks,
            words=module_and_options,
            environment=environment(**variables),
            folder=str(Path.cwd()),
            output=str(output),
            errors=str(errors),
        )
        server = rank_server()
        server.stdin.write(request.to_line())
        server.stdin.flush()
        code = int(server.stdout.readline())
        result = subprocess.CompletedProcess(
            module_and_options, code, output.read_text(), errors.read_text()
        )
    # gloo can abort in teardown after all work is done: callers check the files
    if code:
        print(result.stdout[-3000:], result.stderr[-6000:])
    return result


@functools.cache
def rank_server() -> subprocess.Popen[str]:
    """Return the process from which ranks are forked; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.forked"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def forget_weights(run: Path) -> None:
    """Turn a finished run folder into one of an older rft, without the hashes of its weights.

    What a test then puts in their place is noticed by other means, or used.
    """
    for path in (run / "training.json", run / "provenance.json"):
        if path.is_file():
            record = json.loads(path.read_text())
            record.pop("weights_sha256", None)
            path.write_text(json.dumps(record))


def weights(run: Path) -> list[str]:
    """The hashes of a finished run's selected and last weights."""
    # a module that imports open_clip defines their names
    names = ("best.safetensors", "last.safetensors")
    return [files.sha256_file(run / "checkpoints" / name) for name in names]


def kill_when(command: list[str], reached: callable) -> None:
    """Start a command in its own session; SIGKILL all of it as soon as `reached()` holds."""
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not reached():
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        # torchrun starts every rank in its own session
        for pid in children(process.pid):
            kill(pid)
        kill(process.pid)
        process.wait()
