"""The paper's numbers, and ours above them."""

import csv
import io
import statistics
from dataclasses import replace

import pytest
from rich.console import Console

from rft import paper
from rft.classes import Classes
from rft.paper import VIT_B_16, VIT_B_32, published
from rft.report import comparison as beside
from rft.report import tables
from rft.report.comparison import rank_correlation
from rft.report.read import other_classes
from rft.report.tables import COLUMNS, OOD_COLUMN
from rft.shards.label_space import LabelSpace
from tests.report.make_runs import configured, run_of

ALL = (70.0, 60.0, 50.0, 40.0, 30.0, 20.0)


@pytest.mark.parametrize("row", [*VIT_B_32, *VIT_B_16], ids=lambda row: row.recipe)
def test_printed_average_is_the_mean_of_the_five(row):
    assert len(row.percent) == len(COLUMNS)
    five, printed = row.percent[1:6], row.percent[COLUMNS.index(OOD_COLUMN)]
    assert (printed is None) == (None in five)
    if printed is not None:
        # the paper averages unrounded accuracies
        assert statistics.fmean(five) == pytest.approx(printed, abs=0.0601)
        run = run_of(row.recipe, percent=row.percent[:6])
        assert tables.ood_average(run) == pytest.approx(printed, abs=0.0601)


@pytest.mark.parametrize(
    ("rows", "sums"),
    [
        (VIT_B_32, [1072.2, 927.3, 942.5, 638.0, 644.6, 429.6, 716.4]),
        (VIT_B_16, [477.3, 423.5, 447.7, 301.8, 275.1, 292.1, 299.8]),
    ],
)
def test_the_columns_add_up_to_the_papers(rows, sums):
    # a row's average checks five of its numbers; ImageNet's column has no other check
    columns = zip(*(row.percent for row in rows), strict=True)
    assert [round(sum(value or 0 for value in column), 1) for column in columns] == sums


def test_every_row_of_both_tables_is_there():
    def names(rows, table):
        return {row.recipe for row in rows if table in row.tables}

    fills = {"object-mask-single-fill", "object-mask-multi-fill"}
    assert names(VIT_B_32, 1) == {"zero-shot", "vanilla", "no-mask", *tables.GRID}
    shared = {"zero-shot", "vanilla", "wise-ft-0.5", *fills}
    assert names(VIT_B_32, 3) == shared | {"uniform-soup"}
    assert names(VIT_B_16, 3) == shared | {"lp-ft"}
    assert names(VIT_B_16, 1) == set()


def test_only_lp_ft_has_gaps():
    gaps = {row.recipe for row in (*VIT_B_32, *VIT_B_16) if None in row.percent}
    assert gaps == {"lp-ft"}


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ("ViT-B-16", "ViT-B/16"),
        ("ViT-B-16-quickgelu", "ViT-B/16"),
        ("ViT-B-32-quickgelu", "ViT-B/32"),
        ("rft-miniature", "ViT-B/32"),
        ("", "ViT-B/32"),
    ],
)
def test_which_of_the_papers_models_is_meant(clip, expected):
    assert paper.model_name(clip) == expected


def of(*runs, **config):
    """The table of runs that share a configuration."""
    changed = [configured(run, **config) for run in runs]
    return beside.beside(changed, tables.result_rows(changed))


def texts(table):
    """The cells of each line."""
    return [[text for text, _ in cells] for _, _, cells in table.text.lines]


def test_ours_stands_above_the_papers_and_what_was_not_run_alone():
    table = of(
        run_of("vanilla", 0, (9, *ALL[1:])),
        run_of("vanilla", 1, (9, *ALL[1:])),
        run_of("mine", 0, ALL),
    )
    lines = table.text.lines
    assert [source for _, source, _ in lines].count("here") == 1
    assert [recipe for recipe, _, _ in lines][:4] == ["zero-shot", "vanilla", "", "wise-ft-0.5"]
    assert [source for _, source, _ in lines[1:3]] == ["here", "paper"]
    ours, theirs = texts(table)[1:3]
    # the decimal points are aligned: a figure space is as wide as a digit
    spread = " \u00b1 0.0"
    assert ours == ["\u20079.0" + spread, *(f"{value:.1f}{spread}" for value in (*ALL[1:], 40))]
    assert theirs == ["75.9", "64.7", "57.0", "39.8", "39.5", "20.0", "44.2"]
    assert all(bold == (source == "here") for _, source, cells in lines for _, bold in cells)
    assert len(table.pairs) == len(VIT_B_32)


def test_absent_numbers_are_dashes():
    table = of(run_of("lp-ft", 0, ALL[:4]), model={"clip": "ViT-B-16"})
    ours, theirs = texts(table)[2:4]
    assert ours == ["70.0", "60.0", "50.0", "40.0", "-", "-", "-"]
    assert theirs == ["81.7", "71.6", "72.9", "48.4", "-", "49.1", "-"]


def test_a_b16_has_table_3_alone():
    merged = run_of("wise-ft-0.5", 0, ALL)
    tuned = configured(run_of("vanilla", 0, ALL), model={"clip": "ViT-B-16-quickgelu"})
    table = beside.beside([tuned, merged], tables.result_rows([tuned, merged]))
    assert [pair.published for pair in table.pairs] == list(published("ViT-B/16"))
    assert "the paper's Table 3 (CLIP ViT-B/16, here ViT-B-16-quickgelu)" in table.text.caption
    assert "lp-ft is copied from the LP-FT paper" in table.text.caption


def test_the_miniature_has_the_rows_of_both_models():
    table = of(run_of("lp-ft", 0, ALL), scale="miniature", model={"clip": "rft-miniature"})
    names = {pair.published.recipe for pair in table.pairs}
    assert names == {row.recipe for row in (*VIT_B_32, *VIT_B_16)}
    assert len(table.pairs) == len(VIT_B_32) + 1
    (lp_ft,) = (pair for pair in table.pairs if pair.ours is not None)
    assert lp_ft.published.percent == (81.7, 71.6, 72.9, 48.4, None, 49.1, None)
    assert "lp-ft is copied from the LP-FT paper, for ViT-B/16" in table.text.caption


def test_clips_of_different_rows_do_not_mix():
    runs = [
        configured(run_of(name, 0, ALL), model={"clip": clip})
        for name, clip in (("vanilla", "ViT-B-16"), ("no-mask", "ViT-B-32"))
    ]
    assert beside.beside(runs, tables.result_rows(runs)) is None


def test_nothing_beside_recipes_that_the_paper_has_not():
    assert of(run_of("mine", 0, ALL), run_of("greedy-soup", 0, ALL)) is None


def test_the_caption_says_what_cannot_be_compared():
    run = run_of("vanilla", 0, ALL)
    assert "levels" not in of(run, scale="paper").text.caption
    assert "miniature world's" in of(run, scale="miniature").text.caption
    assert "another training set" in of(run, scale="small").text.caption


def test_a_subset_of_the_classes_is_no_benchmark():
    four = Classes(names=("a", "b", "c", "d"))
    run = replace(run_of("vanilla", 0, ALL), classes=four)
    caveat = "4 classes, not ImageNet's 1,000: these numbers cannot be compared with published"
    for scale in ("paper", "small"):
        assert caveat in of(run, scale=scale).text.caption
    # of its own
    assert "4 classes" not in of(run, scale="miniature").text.caption
    for names, ids in (
        (LabelSpace.imagenet().names, LabelSpace.imagenet().ids),
        (("a",) * 1000, ()),
    ):
        imagenet = replace(run, classes=Classes(names=names, ids=ids))
        assert "classes, not" not in of(imagenet, scale="paper").text.caption
    own = replace(run, results=replace(run.results, sets={"test": run.counts["imagenet-val"]}))
    assert other_classes([own]) == ""


def ranked(order, absent=()):
    """Pairs of runs whose averages rise in an order of recipes."""
    runs = [
        run_of(name, 0, (50, *[20 + n] * (4 if name in absent else 5)))
        for n, name in enumerate(order)
    ]
    return of(*runs)


def test_ranks_agree_disagree_or_have_ties():
    # OOD avg in the paper: 44.2, 48.7, 51.3, 53.1
    rising = ["vanilla", "zero-shot", "no-mask", "object-mask-single-fill"]
    assert rank_correlation(ranked(rising).pairs) == (pytest.approx(1), 4)
    assert rank_correlation(ranked(rising[::-1]).pairs) == (pytest.approx(-1), 4)
    swapped = ranked([rising[1], rising[0], *rising[2:]])
    # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert rank_correlation(swapped.pairs) == (pytest.approx(1 - 6 * 2 / 60), 4)
    assert (
        "correlation of OOD avg, here and in the paper: 0.80 (n = 4 rows)" in swapped.text.caption
    )
    tied = of(*(run_of(name, 0, ALL) for name in rising))
    assert rank_correlation(tied.pairs) is None
    assert "Spearman" not in tied.text.caption


def test_two_rows_have_no_rank_correlation():
    names = ["vanilla", "zero-shot", "no-mask", "mine", "linear-probe"]
    table = ranked(names, absent={"no-mask"})  # no OOD average of its own
    assert rank_correlation(table.pairs) is None
    assert "Spearman" not in table.text.caption


def test_csv_has_both_and_where_it_stands():
    table = of(run_of("no-mask", 3, ALL[:5]), run_of("no-mask", 4, ALL[:5]))
    rows = {row["recipe"]: row for row in csv.DictReader(io.StringIO(beside.csv_text(table)))}
    assert list(rows) == [row.recipe for row in VIT_B_32]
    ours = rows["no-mask"]
    assert (ours["n"], ours["tables"], ours["note"]) == ("2", "1", "")
    assert (float(ours["ImageNet"]), float(ours["ImageNet sd"])) == (70, 0)
    assert (ours["ImageNet paper"], ours["OOD avg"], ours["OOD avg paper"]) == ("76.9", "", "51.3")
    assert (rows["vanilla"]["n"], rows["vanilla"]["R"]) == ("0", "")
    assert rows["object-mask-single-fill"]["tables"] == "1 3"
    assert "implementation" in rows["wise-ft-0.5"]["note"]


def test_markdown_is_one_table_and_takes_no_markup_from_names():
    table = of(run_of("vanilla", 0, ALL), model={"clip": "<b>|*x*"})
    lines = tables.markdown([table.text]).splitlines()
    assert {line.count("|") for line in lines[: 2 + len(VIT_B_32) + 1]} == {10}
    assert lines[3:5] == [
        "| vanilla | here | 70.0 | 60.0 | 50.0 | 40.0 | 30.0 | 20.0 | 40.0 |",
        "|  | paper | 75.9 | 64.7 | 57.0 | 39.8 | 39.5 | 20.0 | 44.2 |",
    ]
    assert r"here &lt;b&gt;\|\*x\*)" in lines[-1]


def test_text_fits_100_columns():
    runs = [run_of(row.recipe, seed, ALL) for row in VIT_B_32 for seed in range(3)]
    table = of(*runs, model={"clip": "[bold]ViT"}, scale="miniature")
    stream = io.StringIO()
    Console(file=stream, width=100).print(tables.console_table(table.text))
    text = stream.getvalue()
    assert text.isascii()
    assert "[bold]ViT" in text
    lines = [line for line in text.splitlines() if " here " in line or " paper " in line]
    starts = [line for line in lines if line.startswith("context-mask-single-fill here  70.0+-0.0")]
    assert len(starts) == 1
    assert max(map(len, text.splitlines())) <= 100


def test_each_setting_of_a_recipe_stands_above_the_paper_and_has_no_rank():
    runs = [replace(run_of("no-mask", 0, ALL), variant=f"lr {rate}") for rate in (1, 2)]
    runs += [
        run_of(name, 0, (50, *[20 + n] * 5)) for n, name in enumerate(("vanilla", "zero-shot"))
    ]
    table = beside.beside(runs, tables.result_rows(runs))
    names = [name for name, source, _ in table.text.lines if source == "here"]
    assert names == ["zero-shot", "vanilla", "no-mask, lr 1", "no-mask, lr 2"]
    assert rank_correlation(table.pairs) is None
    assert "no-mask, lr 2,1,1,70" in beside.csv_text(table).replace('"', "")


def test_the_paper_stands_beside_its_own_sets_alone():
    run = run_of("vanilla", 0)
    run.counts["my-photos"] = run_of("vanilla", 0, ALL).counts["imagenet-val"]
    assert beside.beside([run], tables.result_rows([run])) is None
