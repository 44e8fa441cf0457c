"""Faults on a real cluster: every run finishes with the weights of an undisturbed run."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.waiting import until
from rft.storage import files
from tests import tiny
from tests.launch.conftest import SCRIPT, Cluster, Project, running_cluster
from tests.tiny import weights

pytestmark = pytest.mark.slow

RECIPE = "object-mask-single-fill"
STEPS = 200
OPTIONS = (
    *("--scale", "miniature", "--method.threshold", "0.5", "--loader.held-out", "16"),
    *("--loader.batch-size", "6", "--loader.workers", "0", "--optim.epochs", str(STEPS // 10)),
    *("--log.checkpoint-steps", "10", "--log.every-steps", "10", "--log.image-steps", "0"),
)
SECRET = "a-secret-of-the-user"


def settings(data: Path, clip: str) -> str:
    options = " ".join((*OPTIONS, "--model.clip", clip))
    return f"DATA={data}\nTRAIN_OPTIONS=({options})\nPATIENCE=5\nexport API_TOKEN={SECRET}\n"


def progress(run: Path) -> int:
    path = run / "progress.json"
    return files.read_json(str(path))["step"] if path.exists() else 0


def wait_for_progress(run: Path) -> int:
    """Wait for a new checkpoint in the middle of the run."""
    before = progress(run)
    until(lambda: progress(run) > before, f"a checkpoint in {run} after step {before}")
    step = progress(run)
    assert step < STEPS - 20, "the run is too fast to be disturbed"
    return step


def log_of(run: Path) -> str:
    """The concatenated logs of a run's jobs."""
    return "".join(path.read_text() for path in sorted(run.glob("job-*.log")))


def require_each_step_once(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    # any other steps are those after which it stopped
    assert set(range(10, STEPS + 1, 10)) <= set(steps)


@pytest.fixture
def quiet(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with all jobs cancelled afterwards in case the test fails."""
    yield cluster
    cluster.call("scancel", "--user=root")
    cluster.wait_until_idle("the end of cancelled jobs")


@pytest.mark.program
@pytest.mark.timeout(600)
def test_a_lost_node_a_preemption_and_a_cancel(quiet, project, tmp_path, tiny_data, tiny_clip):
    project.write_settings(settings(tiny_data, tiny_clip))
    run = project.runs / f"{RECIPE}-seed0"
    job = project.submit(quiet, "--nodes=2", "train", RECIPE)
    # changes to the working tree do not affect the job
    (project.folder / "rft" / "train" / "__main__.py").write_text("raise SystemExit(1)\n")
    (project.folder / "launch" / "job.sh").write_text("exit 1\n")

    wait_for_progress(run)
    subprocess.run([SCRIPT, "lose", quiet.folder, "node2"], check=True)
    # SLURM would notice by itself within a minute
    quiet.call("scontrol", "update", "nodename=node2", "state=down", "reason=lost")
    until(lambda: quiet.field(job, "JobState") == "PENDING", "the requeue", pause=0.2)
    subprocess.run([SCRIPT, "regain", quiet.folder, "node2"], check=True)

    wait_for_progress(run)
    other = quiet.call("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                       "--output=/dev/null", "--wrap=true")  # fmt: skip
    until(lambda: "requeued: preempted" in log_of(run), "the preemption")
    until(
        lambda: quiet.field(other, "JobState") == "COMPLETED", "the job of more priority", pause=0.2
    )

    reached = wait_for_progress(run)
    quiet.call("scancel", job)
    quiet.wait_until_idle("the end of the cancelled job")
    assert quiet.field(job, "JobState") == "CANCELLED"
    assert quiet.field(job, "Restarts") == "2"
    assert reached <= progress(run) < STEPS
    assert log_of(run).count("requeued: ") == 1

    quiet.call(run / f"resubmit-{job}.sh")
    quiet.wait_until_idle("the end of the run")
    assert (run / "training.json").exists(), log_of(run)
    assert not list(run.glob("stop-*"))
    require_each_step_once(run)
    # the undisturbed run on two ranks, without SLURM
    calm = tiny.train(RECIPE, tiny_data, tiny_clip, tmp_path / "calm", *OPTIONS, ranks=2)
    assert weights(run) == weights(calm)
    for path in project.runs.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def kill_rank(cluster: Cluster, run: Path) -> None:
    """SIGKILL the training process of a run of one rank."""
    cluster.call("pkill", "-KILL", "--full", f"python.* -m rft.train .*{run} ")


def submit_broken(cluster: Cluster, project: Project) -> str:
    """Submit, by plain sbatch, a training that can never write a checkpoint; return its number.

    It inherits none of this environment, as on sites where jobs set up their own.
    """
    words = ("launch/train.sbatch", RECIPE, "--loader.batch-size=61")
    return cluster.call("sbatch", "--parsable", "--export=HOME", *words, cwd=project.folder)


def require_given_up(cluster: Cluster, project: Project, job: str) -> None:
    assert cluster.field(job, "JobState") == "FAILED"
    assert cluster.field(job, "Restarts") == "0"
    said = (project.folder / f"rft-train-{job}.log").read_text()
    assert "a batch of 61 is larger" in said
    assert "made no progress; not requeued" in said
    assert f"{project.runs}/{RECIPE}-seed0/resubmit-{job}.sh repeats this job" in said
    # the only node is not lost, so there is nothing to wait for
    assert "waiting in case" not in said


@pytest.mark.timeout(600)
@pytest.mark.program
def test_a_sweep_goes_on_after_faults_and_what_cannot_work_is_not_repeated(
    quiet, project, tiny_data, tiny_clip
):
    project.write_settings(settings(tiny_data, tiny_clip))
    array = project.submit(quiet, "--array=0-1", "sweep")
    broken = submit_broken(quiet, project)
    first, last = (project.runs / f"random-mask-{fill}-fill-seed0" for fill in ("no", "single"))
    wait_for_progress(first)
    kill_rank(quiet, first)
    wait_for_progress(last)
    # the last task has the array's own number: only its training may be requeued
    quiet.call("scancel", "--signal=USR1", "--batch", f"{array}_1")
    quiet.wait_until_idle("the end of the sweep")

    logs = next(project.runs.glob("jobs/sweep-*"))
    said = [(logs / f"job-{array}-{task}.log").read_text() for task in (0, 1)]
    reasons = [re.findall("requeued: (.*)", text) for text in said]
    assert reasons == [["failed after making progress"], ["stop requested"]], said
    for task, run in enumerate((first, last)):
        assert (run / "training.json").exists(), said
        require_each_step_once(run)
        # each task can be resubmitted alone
        again = (run / f"resubmit-{array}_{task}.sh").read_text()
        assert again.endswith(f' "$@" -- {run.name.removesuffix("-seed0")} --seed 0\n')
        assert (run / "code" / "rft").is_dir()
    require_given_up(quiet, project, broken)


@pytest.mark.timeout(600)
@pytest.mark.program
def test_what_cannot_work_is_not_repeated_where_nothing_is_preempted(
    tmp_path_factory, project, tiny_data, tiny_clip
):
    # SLURM shows different job fields on such a cluster
    project.write_settings(settings(tiny_data, tiny_clip))
    # socket paths are limited, and the name of a test is too long
    with running_cluster(tmp_path_factory.mktemp("slurm"), preemption=False) as cluster:
        broken = submit_broken(cluster, project)
        cluster.wait_until_idle("the end of the job")
        require_given_up(cluster, project, broken)
