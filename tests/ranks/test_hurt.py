"""Real faults in real processes: the same command ends with the undisturbed run's weights.

One try of each fault on two ranks under torchrun; benchmarks/faults.py tries all faults many times.
Undisturbed parts (the run to compare with, the end of the disturbed one) use forked ranks that read
their own batches, because torchrun and loader processes need seconds for imports.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from benchmarks import tiny_world
from benchmarks.faults import EVERY, FAULTS, Bench, Run, merged, summary, table
from benchmarks.waiting import until
from rft.rng import numpy_generator
from tests.tiny import torchrun

pytestmark = pytest.mark.slow

RANKS = 2


class Sooner(Run):
    """A run that is finished without torchrun and loader processes."""

    def finish(self) -> None:
        result = torchrun(self.ranks, *self.words, "--loader.workers", "0")
        self.log().write_text(result.stdout + result.stderr)
        assert self.finished, self.said()


@pytest.fixture(scope="module")
def bench(tmp_path_factory, worker_id) -> Bench:
    """One undisturbed run for all processes of the tests."""
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        root = root.parent
    with filelock.FileLock(root / "faults.lock"):
        return Bench(root / "faults", RANKS, Sooner)


# a signal lets the current step finish; ranks without torchrun finish theirs too
STOPS = {"SIGKILL torchrun", "SIGTERM everything"}
KILLS = {"SIGKILL a loader process", "rank hangs"}


@pytest.mark.parametrize("fault", sorted(STOPS | KILLS))
def test_hurt_and_started_again(bench, fault):
    outcome = bench.attempt(fault, numpy_generator("test", fault))
    assert not outcome.weights_differ
    assert outcome.lost_steps <= (0 if fault in STOPS else EVERY)


def test_the_bench_counts_what_is_lost(bench):
    outcome = bench.attempt("newest checkpoint truncated", numpy_generator("test"))
    assert outcome.lost_steps >= EVERY
    assert outcome.said.startswith("WARNING")
    assert summary([outcome, outcome]) == {
        "tries": 2, "lost_steps": 2 * outcome.lost_steps, "weights_differ": 0,
    }  # fmt: skip
    assert f"| newest checkpoint truncated | 2 | {outcome.lost_steps:.1f} |" in table([outcome] * 2)
    assert outcome.fault in FAULTS
    other = replace(outcome, fault="SIGKILL a rank")
    later = replace(outcome, lost_steps=7)
    assert merged([outcome, other], [later]) == [other, later]


def disturbed(ranks: int, data: Path, clip: str, run: Path, *more: str, **how: str):
    """Run `rft.train` on so many ranks, with disturbances (tests/ranks/disturbed.py)."""
    words = [
        *("object-mask-single-fill", "--data", str(data), "--run-dir", str(run)),
        *("--scale", "miniature", "--model.clip", clip, "--loader.workers", "0"),
        *("--loader.held-out", "0", "--loader.batch-size", "6", "--optim.epochs", "1"),
        *("--log.checkpoint-steps", "4", "--log.every-steps", "1", *more),
    ]
    return torchrun(ranks, "tests.ranks.disturbed", *words, **how)


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# the time-out is the run's own clock: seconds for which no rank that works may keep the others, on
# a busy machine; a slow store takes longer
IMPATIENT = ("--cluster.timeout", "4")
LONGER = "7"


def test_a_slow_store_is_no_rank_that_hangs(tmp_path, tiny_data, tiny_clip):
    run = tmp_path / "run"
    once = ("--log.checkpoint-steps", "100")
    result = disturbed(2, tiny_data, tiny_clip, run, *once, *IMPATIENT, SECONDS=LONGER)
    assert result.returncode == 0
    assert (run / "training.json").exists()


def test_what_ends_a_run_is_told_after_the_checkpoint_that_is_under_way(
    tmp_path, tiny_data, tiny_clip
):
    run = tmp_path / "run"
    how = {"HELD": "1", "NAN_AT_STEP": "5"}
    result = disturbed(2, tiny_data, tiny_clip, run, **how)
    assert result.returncode == 1
    (line,) = re.findall("^error.*", result.stderr, re.MULTILINE)
    assert "is not finite at step 6 (" in line
    assert [path.name for path in run.glob("checkpoints/*.pt")] == ["step-00000004.pt"]


@pytest.mark.parametrize("donors", ["global", "local"])
def test_another_number_of_ranks_goes_on_with_the_same_batches(
    tmp_path, tiny_data, tiny_clip, donors
):
    calm, run = tmp_path / "calm", tmp_path / "run"
    more = ("--method.donors", donors)
    disturbed(1, tiny_data, tiny_clip, calm, *more)
    stopped = disturbed(2, tiny_data, tiny_clip, run, *more, STOP_AT_STEP="4")
    assert "stopped after step 5 of " in stopped.stdout
    resumed = disturbed(3, tiny_data, tiny_clip, run, *more)
    assert "resuming after step 5" in resumed.stdout
    told = "fills choose from 2 images now, from 3 before" in resumed.stdout
    equal = losses(run) == pytest.approx(losses(calm), rel=1e-4)
    # if fills choose from the whole batch, ranks only affect the order of sums
    assert (told, equal) == ((False, True) if donors == "global" else (True, False))
    assert losses(run)[0] == pytest.approx(losses(calm)[0], rel=1e-4)


def test_a_killed_rank_leaves_no_loader_process(bench):
    run = replace(bench.run("orphans"), ranks=1)
    run.start()
    try:
        run.wait_for(lambda: run.step() >= 1)
        rank = run.rank_processes()[0]
        left = [Path(f"/proc/{pid}") for pid in tiny_world.children(rank)]
        assert run.loaders()
        tiny_world.kill(rank)
        run.wait()
        until(lambda: not any(path.exists() for path in left), "the loader processes' end")
    finally:
        run.leave_nothing_running()


def test_ranks_that_choose_differently_are_named(tmp_path, tiny_data, tiny_clip):
    run = tmp_path / "run"
    result = disturbed(3, tiny_data, tiny_clip, run, BF16_RANKS="0 2")
    assert result.returncode
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors == [
        "error: ranks [1] have a different precision than rank 0: 'fp32' against 'bf16'; name one "
        "for all of them, e.g. --precision fp32"
    ]
    assert not run.exists()
    disturbed(3, tiny_data, tiny_clip, run, "--precision", "fp32", BF16_RANKS="0 2")
    assert json.loads((run / "config.json").read_text())["precision"] == "fp32"
    # an unfinished run, on ranks of which some would choose its precision
    (run / "training.json").unlink()
    result = disturbed(3, tiny_data, tiny_clip, run, BF16_RANKS="0 2")
    assert "ranks [1] have a different precision than rank 0" in result.stderr
    result = disturbed(3, tiny_data, tiny_clip, run, BF16_RANKS="0 1 2")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "precision: 'fp32' -> 'bf16'" in errors[0]
    assert "(--precision fp32; auto depends on the device)" in errors[0]
