"""Ranks on CPUs with a separate control group, like ranks on GPUs: gloo stands in for NCCL."""

import itertools
import json
import re
from pathlib import Path

import pytest

from tests import tiny
from tests.ranks.test_hurt import IMPATIENT, LONGER, disturbed

pytestmark = pytest.mark.slow

# global donors and held-out images: a run that calls all of rft's collectives
EVERYTHING = ("--method.donors", "global", "--loader.held-out", "8")


def collectives(path: Path, rank: int) -> list[tuple[str, str]]:
    """A rank's collectives, names and groups, in order."""
    lines = path.with_name(f"{path.name}-{rank}").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_control_group_changes_no_weight(tmp_path, tiny_data, tiny_clip, ranks):
    path = tmp_path / "collectives"
    with_control, without = tmp_path / "with", tmp_path / "without"
    disturbed(ranks, tiny_data, tiny_clip, with_control, *EVERYTHING, COLLECTIVES=str(path))
    disturbed(ranks, tiny_data, tiny_clip, without, *EVERYTHING)
    assert (with_control / "training.json").exists()
    assert tiny.weights(with_control) == tiny.weights(without)

    called = [collectives(path, rank) for rank in range(ranks)]
    assert all(other == called[0] for other in called)
    # NCCL refuses tensors on the CPU, and reading a number from the GPU makes the host wait
    assert set(called[0]) == {
        ("all_gather_into_tensor", "tensors"),
        ("all_reduce", "tensors"),
        ("all_gather_object", "control"),
        ("all_reduce", "control"),
        ("barrier", "control"),
        ("broadcast_object_list", "control"),
    }
    # ranks meet before they wait for tensors, where a missing rank could not be named
    pairs = itertools.pairwise(called[0])
    assert {previous for previous, (_, group) in pairs if group == "tensors"} == {
        ("barrier", "control")
    }


@pytest.mark.parametrize(("fault", "ranks"), [("DIE", 3), ("HANG", 3)])
def test_a_rank_that_the_others_miss_where_they_meet_is_named(
    tmp_path, tiny_data, tiny_clip, fault, ranks
):
    path = tmp_path / "collectives"
    how = {f"{fault}_AT_STEP": "2", "COLLECTIVES": str(path)}
    result = disturbed(
        ranks, tiny_data, tiny_clip, tmp_path / "run", *EVERYTHING, *IMPATIENT, **how
    )
    assert result.returncode == 1
    lines = re.findall("^error.*", result.stderr, re.MULTILINE)
    assert len(lines) == ranks - 1
    assert all(f"no answer from rank {ranks - 1} of {ranks}: " in line for line in lines)
    # in `meet`, before the donors are gathered
    for rank in range(ranks - 1):
        assert collectives(path, rank)[-1] == ("barrier", "control")


def test_a_slow_store_is_waited_for_in_the_control_group(tmp_path, tiny_data, tiny_clip):
    run = tmp_path / "run"
    once = ("--log.checkpoint-steps", "100")
    how = {"SECONDS": LONGER, "COLLECTIVES": str(tmp_path / "collectives")}
    result = disturbed(2, tiny_data, tiny_clip, run, *once, *IMPATIENT, **how)
    assert result.returncode == 0
    assert (run / "training.json").exists()


def test_ranks_step_aside_in_the_control_group(tmp_path, tiny_data, tiny_clip):
    path, run = tmp_path / "collectives", tmp_path / "run"
    how = {"HELD": "1", "NAN_AT_STEP": "5", "COLLECTIVES": str(path)}
    result = disturbed(2, tiny_data, tiny_clip, run, **how)
    (line,) = re.findall("^error.*", result.stderr, re.MULTILINE)
    assert "is not finite at step 6 (" in line
    assert (run / "checkpoints" / "step-00000004.pt").exists()
    assert collectives(path, 1)[-1] == ("barrier", "control")
