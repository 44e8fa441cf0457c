"""The numbers: from counts to means, spreads, order and margins."""

import csv
import io
import re
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rft.report import tables
from rft.report.measures import Measures
from rft.report.tables import COLUMNS, ID_COLUMN, OOD_COLUMN, Spread, Wise
from rft.runs.records import SetCount
from rft.sets import TEST_SETS
from rft.statistics.robustness import Line
from tests.report.make_runs import run_of

ALL = (70.0, 60.0, 50.0, 40.0, 30.0, 20.0)


def counted(correct: int, total: int) -> SetCount:
    return SetCount(correct=correct, total=total, manifest_sha256="0" * 64)


def differences(runs):
    """The differences of runs without predictions."""
    return tables.difference_rows(runs, tables.result_rows(runs), Measures())


def test_percentages_come_from_counts():
    assert tables.top1(counted(1, 3)) == pytest.approx(100 / 3)
    (row,) = tables.result_rows([run_of("vanilla", percent=ALL)])
    assert [cell.mean for cell in row.cells.values()] == pytest.approx([*ALL, 40.0])
    assert all(cell.sd is None for cell in row.cells.values())


def test_each_column_is_the_set_of_its_heading():
    percent = {
        "imagenet-val": 71.0, "imagenet-v2": 62.0, "imagenet-r": 53.0, "imagenet-sketch": 44.0,
        "objectnet": 35.0, "imagenet-a": 26.0, "imagenet-train": 99.0,
    }  # fmt: skip
    run = run_of("vanilla")
    run.counts.update({name: counted(round(10 * p), 1000) for name, p in percent.items()})
    (row,) = tables.result_rows([run])
    found = {tables.heading(name): row.cells[name].mean for name in tables.columns([row])}
    expected = {
        "ImageNet": 71, "V2": 62, "R": 53, "Sketch": 44, "ObjectNet": 35, "A": 26,
        "OOD avg": (62 + 53 + 44 + 35 + 26) / 5, "ImageNet (training)": 99,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert list(found) == list(expected), "the order of the paper's tables, then others"


def test_sets_weigh_the_same_whatever_their_size():
    run = run_of("vanilla", percent=ALL)
    run.counts["imagenet-a"] = counted(20_000, 100_000)
    assert tables.ood_average(run) == pytest.approx(40)


def test_mean_and_sample_deviation_over_seeds():
    runs = [run_of("vanilla", seed, (70.0 + seed, *ALL[1:])) for seed in range(3)]
    (row,) = tables.result_rows(runs)
    assert row.seeds == (0, 1, 2)
    assert row.cells[ID_COLUMN] == Spread(pytest.approx(71), pytest.approx(1))
    assert row.cells[ID_COLUMN].text() == "71.0 \u00b1 1.0"


def test_average_is_made_for_each_seed_first():
    percents = [(70, 60, 50, 40, 30, 20), (70, 61, 53, 40, 30, 26), (70, 60, 40, 40, 30, 20)]
    (row,) = tables.result_rows([run_of("x", seed, p) for seed, p in enumerate(percents)])
    per_seed = [statistics.mean(p[1:]) for p in percents]
    assert row.cells[OOD_COLUMN].mean == pytest.approx(statistics.mean(per_seed))
    assert row.cells[OOD_COLUMN].sd == pytest.approx(statistics.stdev(per_seed))


def test_a_missing_set_has_no_number_and_no_average():
    (row,) = tables.result_rows([run_of("vanilla", percent=ALL[:4])])
    assert list(row.cells) == list(TEST_SETS[:4])
    (whole,) = tables.result_rows([run_of("no-mask", percent=[share + 1 for share in ALL])])
    line = tables.markdown(tables.text_tables([row, whole], [])).splitlines()[2]
    assert line == "| vanilla | 1 | 70.0 | 60.0 | 50.0 | 40.0 | - | - | - |"


def test_a_set_that_no_run_has_is_no_column():
    (row,) = tables.result_rows([run_of("vanilla", percent=ALL[:4])])
    assert tables.markdown(tables.text_tables([row], [])).splitlines()[0] == (
        "| recipe | n | ImageNet | V2 | R | Sketch |"
    )


def test_own_sets_are_columns_after_the_papers_and_no_part_of_the_average():
    run = run_of("vanilla", percent=ALL)
    run.counts["zoo"] = run.counts["V2"] = counted(990, 1000)
    (row,) = tables.result_rows([run])
    assert tables.columns([row]) == [*tables.COLUMNS, "V2", "zoo"]
    assert row.cells[OOD_COLUMN].mean == pytest.approx(40)
    header = tables.text_tables([row], [])[0].header
    # an own set does not replace another's column
    assert header[-3:] == ["OOD avg", "V2 (own set)", "zoo"]


def test_own_sets_alone_are_compared_by_the_first():
    runs = [run_of(name) for name in ("vanilla", "no-mask")]
    for run, correct in zip(runs, (600, 650), strict=True):
        run.counts["zoo"] = counted(correct, 1000)
    rows = tables.result_rows(runs)
    (row,) = tables.difference_rows(runs, rows, Measures())
    assert (row.name, row.against[0]) == ("no-mask", pytest.approx((5,)))
    assert "Difference in zoo" in tables.text_tables(rows, [row])[1].caption


def test_more_sets_than_a_page_shows_are_refused():
    run = run_of("vanilla", percent=ALL)
    run.counts.update({f"s{n}": counted(1, 2) for n in range(tables.SETS)})
    with pytest.raises(ValueError, match="on 206 sets; the limit of a report is 200"):
        tables.columns(tables.result_rows([run]))


def test_scores_are_no_further_sets():
    run = run_of("vanilla", percent=ALL)
    for n in range(tables.SETS - 10):
        count = replace(counted(1, 2), score="worst-domain", value=0.25)
        run.counts[f"s{n}"] = count
    found = tables.columns(tables.result_rows([run]))
    assert len(found) == len(tables.COLUMNS) + 2 * (tables.SETS - 10)


def test_effective_robustness_is_what_lies_above_the_line():
    line = Line(1.0, 0.0, 1.0)  # OOD as ID
    rows = tables.result_rows([run_of("vanilla", percent=ALL)], line)
    assert rows[0].cells[tables.EFFECTIVE].mean == pytest.approx(40 - 70)
    assert tables.text_tables(rows, [])[0].lines[0][2][-1][0] == "-30.0"
    # the line ends before 100%
    rows = tables.result_rows([run_of("vanilla", percent=(100, *ALL[1:]))], line)
    assert tables.EFFECTIVE not in rows[0].cells


def test_rows_stand_in_the_papers_order():
    expected = [
        "zero-shot", "linear-probe", "vanilla", "lp-ft", "wise-ft-0.2", "wise-ft-0.5", "wise-ft-1",
        "wise-tower-0.5", "greedy-soup", "model-stock", "uniform-soup", "no-mask", *tables.GRID,
        "wise-no-mask-0.9",
        "wise-object-mask-single-fill-0.5", "wise-object-mask-single-fill-1", "wise-kd-vanilla",
        "wise-kd-object-mask-single-fill", "another", "zebra",
        "dawin (transductive)", "ose", "vrf", "vrf-no-mask",
    ]  # fmt: skip
    rows = tables.result_rows([run_of(name, percent=ALL) for name in sorted(expected)])
    assert [row.recipe for row in rows] == expected
    assert tables.GRID[:4] == (
        "random-mask-no-fill",
        "context-mask-no-fill",
        "object-mask-no-fill",
        "random-mask-single-fill",
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wise-ft-0.5", Wise("wise-ft", "vanilla", 0.5)),
        ("wise-ft-0", Wise("wise-ft", "vanilla", 0)),
        ("wise-tower-0.5", Wise("wise-tower", "vanilla", 0.5, tower=True)),
        ("wise-tower-no-mask-1", Wise("wise-tower-no-mask", "no-mask", 1, tower=True)),
        (f"wise-no-mask-{1e-5:g}", Wise("wise-no-mask", "no-mask", 1e-5)),
        ("wise-wise-kd-vanilla-0.1", Wise("wise-wise-kd-vanilla", "wise-kd-vanilla", 0.1)),
    ],
)
def test_names_of_wise_models(name, expected):
    assert tables.wise_model(name) == expected


@pytest.mark.parametrize(
    "name",
    ["wise-ft-", "wise-ft-nan", "wise-ft-0.5-late", "wise-ft-2", "wise-kd-vanilla", "vanilla"],
)
def test_other_names_are_no_wise_models(name):
    assert tables.wise_model(name) is None


def test_one_model_of_each_wise_family_is_shown():
    sweep = [f"wise-ft-{tenth / 10:g}" for tenth in range(11)]
    others = ["vanilla", "wise-kd-vanilla", "uniform-soup"]
    ours = [f"wise-object-mask-single-fill-{alpha}" for alpha in ("0.1", "0.4", "0.9")]
    shown = tables.shown_recipes([*sweep, *others, *ours])
    assert shown == {*others, "wise-ft-0.5", "wise-object-mask-single-fill-0.4"}
    row = tables.result_rows([run_of("vanilla", percent=ALL)])
    assert tables.caption(row, 12).endswith("table.csv has the other 12.")
    assert "WiSE" not in tables.caption(row)


def test_best_of_a_column_counts_ties_as_printed():
    rows = tables.result_rows(
        [
            run_of("vanilla", percent=(70.01, *ALL[1:]), total=100_000),
            run_of("no-mask", percent=(69.99, *ALL[1:]), total=100_000),
            run_of("zero-shot", percent=(69.9, 61, *ALL[2:5])),
        ]
    )
    assert [row.recipe for row in rows] == ["zero-shot", "vanilla", "no-mask"]
    winners = tables.best(rows)
    assert winners[ID_COLUMN] == {1, 2}  # 70.01 and 69.99 both read 70.0
    assert winners["imagenet-v2"] == {0}
    assert winners[OOD_COLUMN] == {1, 2}  # zero-shot has no imagenet-a
    assert "| **61.0** |" in tables.markdown(tables.text_tables(rows, []))


def test_a_single_row_is_not_best():
    rows = tables.result_rows([run_of("vanilla", percent=ALL)])
    assert not any(tables.best(rows).values())


def test_margins_are_paired_by_seed():
    def run(recipe, seed, shift):
        return run_of(recipe, seed, tuple(share + shift for share in ALL))

    runs = [run("vanilla", seed, seed) for seed in (0, 1, 2)]
    runs += [run("no-mask", seed, 5) for seed in (2, 0, 1)]
    runs += [run("object-mask-single-fill", seed, 7 - seed) for seed in (1, 2, 0)]
    runs += [run("zero-shot", 0, 0)]
    no_mask, ours = differences(runs)  # zero-shot has other seeds: nothing to pair
    assert no_mask.name == "no-mask"
    assert no_mask.against[1] is None
    assert no_mask.against[0] == pytest.approx((5, 4, 3))
    assert ours.against[0] == pytest.approx((7, 5, 3))
    assert tables.summarise(ours.against[0]) == Spread(pytest.approx(5), pytest.approx(2))
    assert ours.against[1] == pytest.approx((2, 1, 0))
    assert tables.difference_cells(ours) == [
        ["+5.00 \u00b1 2.00", "+7.00 +5.00 +3.00"], ["+1.00 \u00b1 1.00", "+2.00 +1.00 +0.00"],
    ]  # fmt: skip


def test_one_seed_has_a_margin_without_spread():
    runs = [run_of("vanilla", 0, ALL), run_of("no-mask", 0, (70, 61, 51, 41, 31, 21))]
    (row,) = differences(runs)
    assert tables.difference_cells(row) == [["+1.00", "+1.00"], ["-", "-"]]
    # its own difference is printed once
    table = tables.text_tables(tables.result_rows(runs), [row])[1]
    assert [text for text, _ in table.lines[0][2]] == ["+1.00"]
    assert list(table.header) == ["n", "vs vanilla"]


def test_no_margins_without_a_baseline_or_an_average():
    assert differences([run_of("no-mask", 0, ALL), run_of("zero-shot", 1, ALL)]) == []
    assert differences([run_of("vanilla", 0, ALL[:3]), run_of("x", 0, ALL)]) == []


def test_settings_stand_in_the_order_of_their_numbers():
    names = ["lr 1e-05", "lr 3e-05", "lr 0.001", "lr 0.01, wd 2", "lr 0.01, wd 10"]
    runs = [replace(run_of("vanilla", percent=ALL), variant=name) for name in sorted(names)]
    assert [row.variant for row in tables.result_rows(runs)] == names


def test_the_baseline_of_several_settings_is_the_best_one():
    runs = [
        replace(run_of("vanilla", 0, tuple(p + n for p in ALL)), variant=f"lr {n}")
        for n in (0, 2, 1)
    ]
    runs.append(run_of("x", 0, tuple(p + 3 for p in ALL)))
    rows = tables.result_rows(runs)
    assert [row.name for row in rows] == ["vanilla, lr 0", "vanilla, lr 1", "vanilla, lr 2", "x"]
    (baseline,) = tables.baselines(rows)
    assert baseline.name == "vanilla, lr 2"
    assert [row.against[0][0] for row in differences(runs)] == pytest.approx([-2, -1, 1])


def test_csv_reads_back():
    runs = [run_of("a,b", seed, (70 + seed, *ALL[1:5])) for seed in (3, 4)]
    (row,) = csv.DictReader(io.StringIO(tables.csv_text(tables.result_rows(runs))))
    assert (row["recipe"], row["n"], row["seeds"]) == ("a,b", "2", "3 4")
    assert float(row["ImageNet"]) == pytest.approx(73.5)
    assert float(row["ImageNet sd"]) == pytest.approx(0.5**0.5, abs=1e-6)
    assert "A" not in row


@pytest.mark.parametrize(
    "name",
    [
        "=HYPERLINK(1)", "+1+cmd", "-2-3", "@sum", "|calc", " =1+1", "\uff1d1+1", "-1 -2", "-",
        "+-1", "%0", "-1e5x", "=",
    ],
)  # fmt: skip
def test_no_name_is_a_formula(name):
    (row,) = tables.result_rows([run_of(name, seed=-3, percent=ALL)])
    (found,) = csv.DictReader(io.StringIO(tables.csv_text([row])))
    assert (found["recipe"], found["seeds"]) == (f"'{name}", "-3")
    assert float(found["ImageNet"]) == 70


@pytest.mark.parametrize("text", ["-0.250000", "+1.5", "-7", "70.0", "", "vanilla", "a=b", "'=1"])
def test_numbers_and_other_names_stay_as_they_are(text):
    assert tables.csv_cell(text) == text


def test_markdown_takes_no_markup_from_names():
    (row,) = tables.result_rows([run_of("<b>*x*</b> | [a](b)", percent=ALL)])
    line = tables.markdown(tables.text_tables([row], [])).splitlines()[2]
    assert line.startswith(r"| &lt;b&gt;\*x\*&lt;/b&gt; \| \[a\](b) | 1 |")


def test_text_fits_80_columns_and_takes_no_markup_from_names():
    runs = [run_of(name, seed, ALL) for name in ("vanilla", *tables.GRID) for seed in range(3)]
    runs += [run_of("[bold]very-long-name-of-something[/bold]", 0, ALL)]
    runs += [run_of("wise-kd-object-mask-single-fill", seed, ALL) for seed in range(3)]
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    for table in tables.text_tables(tables.result_rows(runs), differences(runs)):
        console.print(tables.console_table(table))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()
    # with little space, only the compared columns have their spread
    numbers = r"70\.0\+-0\.0 60\.0 50\.0 +40\.0 +30\.0 20\.0 40\.0\+-0\.0"
    assert re.search(rf"^context-mask-single-fill +3 +{numbers}", text, re.MULTILINE)
    assert re.search(r"^wise-kd-object-mask- +3 .*\nsingle-fill +\n", text, re.MULTILINE)
    assert "[bold]" in text
    assert all(tables.heading(name) in text for name in COLUMNS)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=8))
def test_spread_is_the_textbook_formula(values):
    spread = tables.summarise(values)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert spread.mean == pytest.approx(mean)
    assert spread.sd == pytest.approx(variance**0.5, abs=1e-9)
