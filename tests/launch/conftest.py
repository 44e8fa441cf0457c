"""A real SLURM cluster of two nodes on this machine, and projects that submit to it."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.servers.loopback import PROGRAMS, running
from benchmarks.waiting import until

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "cluster.sh"
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "unshare": "util-linux",
    "ip": "iproute2",
}
SETTINGS = f"""
SBATCH_OPTIONS=(--partition=low)
CPU_OPTIONS=(--partition=low)
TIME=30
GPUS_PER_NODE=0
CPUS_PER_NODE=1
PROCESSES_PER_NODE=1
IMAGENET=$PWD/world
OOD=$PWD/world
DATA=$PWD/shards
RUNS=$PWD/runs
TRAIN_OPTIONS=()
TORCHRUN_OPTIONS=()
setup() {{
    PATH={Path(sys.executable).parent}:$PATH
    export OMP_NUM_THREADS=1
}}
"""


def why_not() -> str:
    """The reason why a cluster cannot run here; empty if it can."""
    for name, package in PACKAGES.items():
        if shutil.which(name, path=PROGRAMS) is None:
            return f"{name} is not installed (Debian package {package})"
    if os.geteuid() != 0:
        return "only root can start slurmd"
    box = ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "true"]
    result = subprocess.run(box, capture_output=True, text=True)
    return f"this machine permits no namespaces: {result.stderr}" if result.returncode else ""


def environment() -> dict[str, str]:
    """This process's environment without PYTHONPATH, so that jobs import their own rft."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    def enter(self, *command: object) -> list[str]:
        """The command line that runs a command inside the cluster."""
        return [str(SCRIPT), "in", str(self.folder), *map(str, command)]

    def call(self, *command: object, cwd: Path | None = None) -> str:
        """Run a command inside the cluster; return its output."""
        result = subprocess.run(
            self.enter(*command), env=environment(), cwd=cwd, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of a job, as SLURM shows it."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job).split(f" {name}=", 1)[1]
        return shown.split(" ", 1)[0]

    def wait_until_idle(self, what: str) -> None:
        """Wait until no job waits or runs."""
        try:
            # each check starts processes, which slow down the jobs
            until(lambda: not self.call("squeue", "--noheader"), what, pause=0.2)
        except AssertionError as error:
            jobs = self.call("scontrol", "show", "jobs")
            log = (self.folder / "log" / "slurmctld.log").read_text()
            raise AssertionError(f"{error}\n{jobs}\n{log[-3000:]}") from error


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Run a cluster on which jobs of the partition "high" preempt those of "low"."""
    with running_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@contextlib.contextmanager
def running_cluster(folder: Path, *, preemption: bool = True) -> Iterator[Cluster]:
    """Run a cluster. Where that is impossible, skip with the reason; in CI, fail."""
    if reason := why_not():
        if os.environ.get("RFT_REQUIRE_SLURM"):
            pytest.fail(f"no SLURM cluster, which RFT_REQUIRE_SLURM requires: {reason}")
        pytest.skip(f"no SLURM cluster: {reason}")
    log = folder / "output.log"
    variables = ["env", f"PREEMPTION={'yes' if preemption else 'no'}"]
    with running([*variables, str(SCRIPT), "run", str(folder)], log) as process:
        up = folder / "up"
        until(lambda: up.exists() or process.poll() is not None, f"the cluster: see {log}")
        assert up.exists(), log.read_text(errors="replace")[-3000:]
        yield Cluster(folder)


@dataclass(frozen=True)
class Project:
    """A copy of a user's clone, with its own settings."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def write_settings(self, more: str = "") -> None:
        (self.folder / "launch" / "cluster.env").write_text(SETTINGS + more)

    def launch(
        self, script: str, *words: object, inside: Cluster | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/, in the cluster if one is given."""
        command = [str(self.folder / "launch" / script), *map(str, words)]
        if inside:
            command = inside.enter(*command)
        return subprocess.run(
            command, env=environment(), cwd=self.folder.parent, capture_output=True, text=True
        )

    def submit(self, cluster: Cluster, *words: object) -> str:
        """Submit a job; return its number."""
        result = self.launch("submit.sh", *words, inside=cluster)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """A project that is not a git repository, and an empty home folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "project"
    folder.mkdir()
    others = shutil.ignore_patterns("__pycache__", "cluster.env")
    for name in ("rft", "tools", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=others)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return Project(folder)
