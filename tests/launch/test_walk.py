"""Run the commands of docs/cluster.md unchanged, in order, in one shell."""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.waiting import until
from rft.storage import files
from tests.launch.conftest import ROOT, SETTINGS, Cluster, Project, environment

pytestmark = pytest.mark.slow

# the page's settings assume GPUs; the test runs two ranks on each of two nodes
MORE = """
PROCESSES_PER_NODE=2
TRAIN_OPTIONS=(--loader.batch-size 16 --loader.workers 0 --log.image-steps 0 --optim.epochs 4)
"""


def blocks() -> list[str]:
    """The command blocks of the page."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    return re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


class Shell:
    """A shell inside the cluster that runs one block after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, block: str) -> str:
        """Run a block to its end; return what it printed."""
        self._process.stdin.write(f"{block}\necho end of block\n")
        self._process.stdin.flush()
        lines = []
        for line in self._process.stdout:
            if line == "end of block\n":
                return "".join(lines)
            lines.append(line)
        raise AssertionError(f"failed: {block}\n{''.join(lines)}")


@contextlib.contextmanager
def shell(cluster: Cluster, folder: Path) -> Iterator[Shell]:
    command = cluster.enter("bash", "--norc", "-e", "-o", "pipefail")
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    variables = {"USER": "root", **environment(), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=variables, cwd=folder, text=True, **streams) as process:
        try:
            yield Shell(process)
        finally:
            process.kill()


@pytest.mark.program
@pytest.mark.timeout(600)
def test_every_command_of_the_page(cluster: Cluster, project: Project):
    first, *walk = blocks()
    assert first == "cp launch/cluster.env.example launch/cluster.env\n"
    run = project.runs / "object-mask-single-fill-seed0"
    outputs = {}
    with shell(cluster, project.folder) as user:
        user.run(f"umask 077\n{first}")
        settings = project.folder / "launch" / "cluster.env"
        settings.write_text(settings.read_text() + SETTINGS + MORE)
        for block in walk:
            if block.startswith("TRAIN="):
                cluster.wait_until_idle("the shards")
            if block.startswith("scancel"):
                until((run / "progress.json").exists, "the first checkpoint")
            if block.startswith("grep"):
                cluster.wait_until_idle("run and evaluation")
            outputs[block.split()[0]] = user.run(block)

    log = next(run.glob("job-*.log")).read_text()
    assert (run / "training.json").exists(), log
    assert "on 4 x cpu" in log
    # the signal stopped it half way; the evaluation waited for the end
    (stopped,) = re.findall(r"stopped after step (\d+) of (\d+)", log)
    assert 0 < int(stopped[0]) < int(stopped[1])
    told = re.findall("stop requested;|stopped after|requeued", outputs["grep"])
    assert told[:3] == ["stop requested;", "stopped after", "requeued"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    assert "sbatch --chdir=" in outputs['TRAIN="object-mask-single-fill']
    assert "steps" in outputs['TRAIN="object-mask-single-fill']
    counted = files.read_json(str(run / "results.json"))["sets"]
    assert {name: entry["total"] for name, entry in counted.items()} == dict.fromkeys(
        ("imagenet-val", "imagenet-v2", "imagenet-r", "imagenet-sketch", "objectnet", "imagenet-a"),
        150,
    )
    assert (project.folder / "report" / "index.html").exists()
    assert outputs["launch/submit.sh"].count("sbatch --chdir=") > 60  # most of them the paper's
    # with this umask the runs are private
    assert not [path for path in project.runs.rglob("*") if path.stat().st_mode & 0o077]
