"""Benchmarks are described once; code that cannot import that description agrees with it."""

import re
from pathlib import Path

from rft.demo import world
from rft.paper import VIT_B_16, VIT_B_32
from rft.sets import BENCHMARKS, ID_SET, OOD_SETS, TEST_SETS, TRAIN_SET

ROOT = Path(__file__).parents[1]


def test_every_name_is_described():
    assert list(BENCHMARKS) == [TRAIN_SET, ID_SET, *OOD_SETS]
    assert all(name == one.name for name, one in BENCHMARKS.items())
    assert len({one.title for one in BENCHMARKS.values()}) == len(BENCHMARKS)


def test_job_scripts_pack_all_that_are_out_of_distribution():
    (line,) = re.findall(r"--benchmark ([\w -]+)\)", (ROOT / "launch/shard.sbatch").read_text())
    assert tuple(line.split()) == OOD_SETS


def test_the_miniature_world_stands_in_for_each():
    assert list(world.SETS) == list(BENCHMARKS)


def test_the_papers_rows_have_a_number_for_each_test_set_and_their_average():
    for row in (*VIT_B_32, *VIT_B_16):
        assert len(row.percent) == len(TEST_SETS) + 1
