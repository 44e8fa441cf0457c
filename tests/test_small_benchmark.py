"""The measurement of `--scale small`: its variants, and its table."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import small_sets
from rft.storage import files


@pytest.mark.parametrize(
    ("images", "held_out", "batch"), [(60, 16, 32), (300, 30, 64), (3000, 300, 64)]
)
def test_the_numbers_before_the_rule(images, held_out, batch):
    options = small_sets.before("before, proposed", images, 16)
    assert options[:4] == ["--loader.held-out", str(held_out), "--loader.batch-size", str(batch)]
    fixed = small_sets.before("before, fixed", images, 16)
    assert fixed[:4] == ["--loader.held-out", "0", "--loader.batch-size", "64"]
    assert (
        options[4:] == fixed[4:] == ["--optim.warmup-steps", "50", "--log.checkpoint-steps", "100"]
    )


def test_cuts_take_the_classes_in_turn_and_differ_by_seed(tmp_path):
    for name in "abc":
        folder = tmp_path / "world" / "imagenet" / "train" / name
        folder.mkdir(parents=True)
        for number in range(9):
            (folder / f"{number}.jpg").write_bytes(b"x")
    cuts = []
    for seed in (0, 1):
        small_sets.cut(tmp_path / "world", tmp_path / str(seed), 20, seed)
        cuts.append(
            {str(p.relative_to(tmp_path / str(seed))) for p in tmp_path.glob(f"{seed}/*/*")}
        )
        assert sorted(Counter(path[0] for path in cuts[-1]).values()) == [6, 7, 7]
    assert cuts[0] != cuts[1]
    small_sets.cut(tmp_path / "world", tmp_path / "0", 20, 0)
    assert len(list(tmp_path.glob("0/*/*"))) == 20


def test_the_saved_table_is_made_of_the_saved_results():
    saved = small_sets.RESULTS / f"{small_sets.NAME}.json"
    text = small_sets.table(files.read_json(str(saved)))
    assert text == Path(saved).with_suffix(".md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(small_sets.SIZES) * len(small_sets.NUMBERS)
    # the table's row for the rule follows the rule
    assert [row[2:5] for row in rows if row[1] == "rule"] == [
        ["0", "8", "7 of 70"],
        ["30", "16", "16 of 160"],
        ["300", "64", "42 of 420"],
    ]
