"""The announced pairs of world 2: which they are, their signs, and the committed table."""

from pathlib import Path

import pytest

from docs import questions
from rft.recipes import DEFAULT

RESULTS = Path(questions.__file__).parent / "results/reproduction"
ROWS = ["zero-shot", "vanilla", "wise-ft-0.5", "no-mask", DEFAULT]
HEADER = "recipe,against,set,difference,low,high,p,significant"
SETS = ("OOD avg", "V2", "R", "Sketch", "ObjectNet", "A")


def test_the_announced_pairs():
    found = list(questions.pairs(ROWS))
    assert len(found) == len(set(found)) == 5 + 9 + 4
    assert found[:5] == [
        (DEFAULT, "vanilla"),
        (DEFAULT, "no-mask"),
        (DEFAULT, "wise-ft-0.5"),
        (DEFAULT, "random-mask-single-fill"),
        (DEFAULT, "context-mask-single-fill"),
    ]
    assert ("object-mask-multi-fill", "object-mask-single-fill") in found
    assert found[-4:] == [(name, "zero-shot") for name in ROWS[1:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A report in which each announced pair stands in one direction, by the report's order."""
    known = {name for pair in questions.pairs(ROWS) for name in pair}
    order = [*ROWS, *sorted(known - set(ROWS))]
    lines = [HEADER]
    for place, row in enumerate(order):
        for other in order[:place]:
            p, sure = (0.0005, "yes") if row == DEFAULT else (0.04, "yes")
            for name in SETS:
                value = order.index(row) - order.index(other)
                lines.append(f"{row},{other},{name},{value},{value - 0.5},{value + 1},{p},{sure}")
    (tmp_path / questions.DIFFERENCES).write_text("\n".join(lines) + "\n")
    paper = [f"{name},{place},{50 - place}" for place, name in enumerate(ROWS)]
    paper += [f"{name},,{40}" for name in order if name not in ROWS]
    paper.append("lp-ft,,")
    (tmp_path / "table.md").write_text("| recipe | n |\n| --- | --: |\n| vanilla | 5 |\n")
    (tmp_path / "paper.csv").write_text("recipe,OOD avg,OOD avg paper\n" + "\n".join(paper) + "\n")
    world = "\n".join(f"{name},{2 * place}" for place, name in enumerate(order))
    (tmp_path / "world-1.csv").write_text(f"recipe,OOD avg\n{world}\n")
    monkeypatch.setattr(questions, "WORLD_1", tmp_path / "world-1.csv")
    return tmp_path


def test_a_pair_is_shown_in_the_announced_direction(folder):
    lines = questions.table(folder).splitlines()
    assert len(lines) == 2 + 18 + 2
    # in the report's order: 5th minus 2nd; 18 x 0.0005 = 0.009
    assert lines[2].startswith(f"| {DEFAULT} | vanilla | +3.00 [+2.50, +4.00]* | 0.009 | +3.0 |")
    assert lines[2].endswith("| +6.00 | -3.0 |")
    # the report has the other direction: random-mask-single-fill minus ours
    (flipped,) = [line for line in lines if f"{DEFAULT} | random-mask-single-fill" in line]
    assert "[-" in flipped
    value, interval = flipped.split(" | ")[2].split(" ", 1)
    assert float(value) < 0
    low, high = map(float, interval.strip("[]*").split(", "))
    assert (low, high) == (float(value) - 1, float(value) + 0.5)


def test_a_pair_that_is_not_significant_after_the_correction_has_no_mark(folder):
    lines = questions.table(folder).splitlines()
    (line,) = [one for one in lines if one.startswith("| no-mask | zero-shot |")]
    assert "]* |" not in line
    # four pairs have 0.0005; 14 x 0.04
    assert " | 0.560 | " in line
    assert "4 of 18 pairs" in lines[-1]


def test_a_pair_that_was_not_measured_is_an_error(folder):
    path = folder / questions.DIFFERENCES
    kept = [line for line in path.read_text().splitlines() if "no-mask" not in line]
    path.write_text("\n".join(kept) + "\n")
    with pytest.raises(KeyError, match="no-mask"):
        questions.table(folder)


def test_the_announced_pairs_are_copied(folder, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "paper.csv").write_bytes((folder / "paper.csv").read_bytes())
    questions.write(folder, results)
    kept = questions.read(results / questions.DIFFERENCES)
    assert len(kept) == 18 * len(SETS)
    # the OOD average of other rows of table.md
    (folder / "table.md").write_text("| no-mask | 5 |\n| wise-ft-0.5 | 5 |\n")
    (added,) = [line for line in questions.select(folder) if line not in kept]
    assert [added[name] for name in ("recipe", "against", "set")] == [
        "no-mask",
        "wise-ft-0.5",
        "OOD avg",
    ]
    assert (results / questions.TABLE).read_text() == questions.table(folder)


def test_the_committed_table_is_that_of_the_committed_differences():
    assert (RESULTS / questions.TABLE).read_text() == questions.table(RESULTS)
