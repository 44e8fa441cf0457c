"""Real processes, really hurt: the same command ends with the undisturbed run's weights.

One try of each of these on three ranks; benchmarks/faults.py tries all faults many times.
"""

import pytest

from benchmarks.faults import EVERY, FAULTS, Bench, summary, table
from rft.rng import numpy_generator

RANKS = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), RANKS)


# by a signal the step under way is finished; ranks without torchrun finish theirs too
STOPS = {"SIGKILL torchrun", "SIGTERM everything", "SIGUSR1 everything"}
KILLS = {"SIGKILL a loader process", "rank hangs"}


@pytest.mark.parametrize("fault", sorted(STOPS | KILLS))
def test_hurt_and_started_again(bench, fault):
    outcome = bench.attempt(fault, numpy_generator("test", fault))
    assert not outcome.weights_differ
    assert outcome.lost_steps <= (0 if fault in STOPS else EVERY)


def test_the_bench_counts_what_is_lost(bench):
    outcome = bench.attempt("newest checkpoint truncated", numpy_generator("test"))
    assert outcome.lost_steps >= EVERY
    assert outcome.said.startswith("WARNING") or not outcome.said
    assert summary([outcome, outcome]) == {
        "tries": 2, "lost_steps": 2 * outcome.lost_steps, "weights_differ": 0,
    }  # fmt: skip
    assert f"| newest checkpoint truncated | 2 | {outcome.lost_steps:.1f} |" in table([outcome] * 2)
    assert outcome.fault in FAULTS
