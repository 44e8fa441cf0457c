"""Communication of two ranks in a step: the gradients once, and one number that decides to stop.

Log lines, held-out counts and checkpoints exchange more; the steps here have none.
"""

import json
import math

import pytest
import torch

from tests import tiny
from tests.tiny import torchrun

pytestmark = pytest.mark.slow

QUIET = ("--log.every-steps", "1000", "--log.checkpoint-steps", "1000")
BATCH = ("--loader.batch-size", "12")
NUMBER = ["gloo:all_reduce", [[]]]
DONORS = ["gloo:all_gather", [[6, 3, 16, 16]]]  # this rank's images, for fills on all ranks


@pytest.mark.parametrize(
    ("options", "extra"),
    [(("--optim.accumulate", "2"), []), (("--method.donors", "global"), [DONORS])],
    ids=["local donors", "global donors"],
)
def test_a_step_exchanges_its_gradients_and_one_number(
    tmp_path, tiny_data, tiny_clip, options, extra
):
    run, found = tmp_path / "run", tmp_path / "found"
    recipe = "object-mask-multi-fill"
    words = tiny.training(recipe, tiny_data, tiny_clip, run, *QUIET, *BATCH, *options)
    torchrun(2, "tests.ranks.collectives", str(found), *words)
    (path,) = (run / "checkpoints").glob("step-*.pt")
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    trained = sum(moments["exp_avg"].numel() for moments in state.values())
    # the first step is preceded by the start, the last one is followed by the end of the epoch
    _, *steps, _ = map(json.loads, found.read_text().splitlines())
    assert len(steps) > 1
    for step in steps:
        small, gradients = step[: 1 + len(extra)], step[1 + len(extra) :]
        assert small == [NUMBER, *extra]
        assert {name for name, _ in gradients} == {"gloo:all_reduce"}
        assert sum(math.prod(shape) for _, (shape,) in gradients) == trained
