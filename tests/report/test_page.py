"""The complete report: its files, its page, its command line."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rft.report.page import command as command_of
from rft.report.page import compose, provenance_lines, render, write_report
from rft.report.read import load_runs
from rft.runs import choice
from rft.storage import files
from tests.report.make_runs import (
    edit,
    make_gallery,
    make_predicted,
    make_run,
    make_weights,
    predict,
)

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert(1)</script>\"'><img src=http://x.test/y>{{ 7*7 }}"
DOCUMENTS = {"index.html", "table.md", "table.csv", "table.tex", "paper.md", "paper.csv"}
DRAWINGS = {f"{name}.{kind}" for name in ("scatter", "curves") for kind in ("png", "svg")}
FILES = DOCUMENTS | DRAWINGS | {"gallery.png"}
MEASURED = {
    "statistics.csv",
    "differences.csv",
    "per_class.csv",
    "calibration.png",
    "calibration.svg",
}


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def paths(tmp_path):
    names = ("vanilla", "no-mask", "object-mask-single-fill")
    paths = [
        make_run(tmp_path / "runs", name, seed, percent=(70, 60 + 3 * n, 50, 40, 30, 20))
        for n, name in enumerate(names)
        for seed in (0, 1)
    ]
    make_gallery(paths[3] / "gallery.npz", batch=2)
    return paths


def test_a_report_is_complete_and_self_contained(paths, tmp_path):
    out = tmp_path / "deep" / "report"
    text = write_report(paths, out).text()
    assert {path.name for path in out.iterdir()} == FILES
    assert "object-mask-single-fill" in text
    assert max(map(len, text.splitlines())) <= 80
    page = Page((out / "index.html").read_text())
    assert page.open == []
    drawings = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert sum(tag == "svg" for tag, _ in page.tags) == len(drawings) == 2
    (gallery,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert gallery["src"].startswith("data:image/png;base64,")
    assert int(gallery["width"]) > 400
    for text_of in (gallery["alt"], *(attributes["aria-label"] for attributes in drawings)):
        assert len(text_of) > 30
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names)), "ids of two figures"
    assert_no_reference(page)
    assert "Margins over the baselines" in page.text
    assert "model of no-mask, seed 1" in page.text
    assert "Miniature" not in text


@pytest.mark.slow
def test_frames_of_the_training_are_in_their_order(paths, tmp_path):
    make_gallery(paths[3] / "gallery.npz", batch=2, frames=3)
    write_report(paths, tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    labels = [attributes["data-label"] for _, attributes in page.tags if "data-label" in attributes]
    assert labels == ["step 0", "step 100", "step 200"]
    images = [attributes for tag, attributes in page.tags if tag == "img"][1:]
    assert [image["src"].partition(",")[0] for image in images] == 3 * ["data:image/webp;base64"]
    assert [image["alt"].partition(":")[0] for image in images] == labels
    # the last one is visible without a script and without a click
    frames = text[text.index('<div class="frames">') :]
    assert frames.index("step 100") < frames.index("</details>") < frames.index("step 200")
    assert_no_reference(page)


def assert_no_reference(page: Page) -> None:
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    # the data, and the script named in the page's policy; a third one would be a file's
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "page-data"},
        {},
    ]
    for _, attributes in page.tags:
        # within the page: a marker that is drawn several times
        assert (attributes.get("xlink:href") or "#").startswith("#")
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)


def test_the_same_runs_give_the_same_bytes(paths, tmp_path):
    for name in ("a", "b"):
        write_report(paths, tmp_path / name)
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_names_from_files_are_text(tmp_path):
    path = make_run(tmp_path, "x", note=HOSTILE)
    edit(path / "config.json", recipe=HOSTILE)
    sha256 = files.sha256_file(make_weights(path, HOSTILE))
    edit(path / "results.json", checkpoint_sha256=sha256)
    edit(path / "provenance.json", git=HOSTILE, command=[HOSTILE])
    write_report([path], tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert_no_reference(page)
    # the row's name, the scatter's label, the settings, the code
    assert page.text.count(HOSTILE) >= 4
    assert "<script" not in (tmp_path / "report" / "scatter.svg").read_text()
    assert "<script" not in (tmp_path / "report" / "table.md").read_text()


def test_what_cannot_be_drawn_is_said_and_does_not_stay(paths, tmp_path):
    out = tmp_path / "report"
    write_report(paths, out)
    bare = make_run(tmp_path / "bare", percent=(70, 60), metrics=False)
    write_report([bare], out)
    assert {path.name for path in out.iterdir()} == DOCUMENTS
    page = Page((out / "index.html").read_text())
    assert page.text.count("Not drawn:") == 3
    assert "Margins" not in page.text
    other = make_run(tmp_path / "other", "mine", percent=(70, 60), metrics=False)
    write_report([other], out)
    assert {path.name for path in out.iterdir()} == DOCUMENTS - {"paper.md", "paper.csv"}
    assert "Comparison with the paper" not in (out / "index.html").read_text()


def test_a_report_of_own_sets_has_their_columns_and_no_paper(tmp_path):
    paths = [
        make_predicted(tmp_path, name, skill=skill, sets=("zoo", "garden"))
        for name, skill in (("vanilla", 0.5), ("no-mask", 0.8))
    ]
    out = tmp_path / "report"
    text = write_report(paths, out).text()
    assert "recipe  n garden  zoo" in text
    page = Page((out / "index.html").read_text())
    assert "Comparison with the paper" not in page.text
    assert "Highest garden: no-mask" in page.text
    assert "OOD avg" not in page.text
    assert {path.name for path in out.iterdir()} >= {"differences.csv", "per_class.csv"}
    assert not (out / "paper.md").exists()


def test_the_chosen_model_comes_first_and_photos_have_their_names(tmp_path):
    zero, vanilla, ours = [
        make_predicted(tmp_path, name, skill=skill, sets=("zoo",))
        for name, skill in (("zero-shot", 0.6), ("vanilla", 0.5), ("no-mask", 0.4))
    ]
    paths = [zero, vanilla, ours]
    made = choose(tmp_path / "choice.json", ours)
    report = compose(load_runs(paths), draw=False, chosen=made)
    key = report.measures.sets["no-mask", "zoo"].mistakes.confident[0].key
    page = Page(render(report, names={key: "bär/größe 1.jpg"}))
    first = "Chosen without any test image: no-mask, "
    shown = re.search(first + r"\d+\.\d% \(95% interval [\d. to]+\) on zoo\.", page.text)
    assert shown is not None
    assert page.text.index(first) < page.text.index("points over zero-shot")
    assert page.text.index(first) < page.text.index("Highest zoo: zero-shot")
    # in the table, and its mistakes before those of the others
    assert "no-mask (chosen)" in page.text
    wrong = re.findall(r"(\S+)(?: \(chosen\))? on zoo: [\d,]+ wrong", page.text)
    assert wrong == ["no-mask", "zero-shot", "vanilla"]
    assert "bär/größe 1.jpg" in page.text
    # own sets: no part of the paper's experiment, and compared with the untrained model first
    assert "Out-of-distribution over in-distribution accuracy" not in page.text
    assert "Counterfactual images" not in page.text
    assert "no-mask: classes against zero-shot" in page.text


def choose(path: Path, run: Path) -> Path:
    """Write the record of a choice of the run among two models."""
    results = json.loads((run / "results.json").read_text())
    ours = choice.Candidate(path=str(run), sha256=results["checkpoint_sha256"], correct=9)
    made = choice.Choice(
        train_set="train",
        manifest_sha256="0" * 64,
        images=10,
        candidates=(replace(ours, path="another", correct=8), ours),
        chosen=str(run),
    )
    files.write_json(str(path), asdict(made))
    return path


def test_only_the_record_of_a_choice_makes_a_model_chosen(tmp_path):
    """Without it, held-out images do not prove that they chose the named model."""
    zero_shot, vanilla = [
        make_predicted(tmp_path, name, skill=0.5, sets=("zoo",), loader={"held_out": 20})
        for name in ("zero-shot", "vanilla")
    ]
    page = Page(render(compose(load_runs([zero_shot, vanilla]), draw=False, chosen=vanilla)))
    exported = r"Exported: vanilla, \d+\.\d% \(95% .*\) on zoo \(named with --chosen\)\."
    assert re.search(exported, page.text)
    assert "hosen without" not in page.text
    assert "vanilla (exported)" in page.text


def test_the_chosen_run_may_have_been_moved(tmp_path):
    runs = [
        make_predicted(tmp_path / "a", name, sets=("zoo",)) for name in ("zero-shot", "vanilla")
    ]
    made = choose(tmp_path / "choice.json", runs[1])
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_runs([tmp_path / "b" / run.name for run in runs])
    page = Page(render(compose(moved, draw=False, chosen=made)))
    assert "Chosen without any test image: vanilla" in page.text


def test_a_choice_must_fit_the_runs(tmp_path):
    *runs, other = [
        make_predicted(tmp_path, name, skill=0.5, sets=("zoo",))
        for name in ("zero-shot", "vanilla", "no-mask")
    ]
    made = choose(tmp_path / "choice.json", other)
    loaded = load_runs(runs)
    line = f"--chosen {made} names {other}, whose weights no run of the report has; report on that"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        compose(loaded, draw=False, chosen=made)
    with pytest.raises(ValueError, match=r"^--chosen .*data is not among the runs"):
        compose(loaded, draw=False, chosen=tmp_path / "data")
    made = choose(tmp_path / "choice.json", runs[1])
    made.write_text(made.read_text().replace(loaded[1].results.checkpoint_sha256, "1" * 64))
    with pytest.raises(ValueError, match=r"whose weights no run .*, or rerun rft choose"):
        compose(loaded, draw=False, chosen=made)
    # a model that is not the best
    made = choose(tmp_path / "choice.json", runs[1])
    made.write_text(made.read_text().replace('"correct": 8', '"correct": 10'))
    with pytest.raises(ValueError, match=r"choice\.json: .*which is not the best of the"):
        compose(loaded, draw=False, chosen=made)
    made.write_text("{}")
    with pytest.raises(ValueError, match=r"choice\.json"):
        compose(loaded, draw=False, chosen=made)


@pytest.mark.parametrize("fitted", [True, False])
def test_scaled_numbers_are_explained_if_they_are_shown(tmp_path, fitted):
    path = make_run(tmp_path, percent=())
    predict(path, {"zoo": np.arange(60) % 3 > 0}, scaled=fitted)
    page = Page(render(compose(load_runs([path]), draw=False)))
    assert ("ECE, scaled" in page.text) == fitted
    assert ("Scaled: with logits" in page.text) == fitted


def test_predictions_give_every_part_of_the_page(tmp_path):
    paths = [
        make_predicted(tmp_path, name, seed, skill=skill)
        for name, skill in (("vanilla", 0.5), ("no-mask", 0.7))
        for seed in (0, 1)
    ]
    out = tmp_path / "report"
    write_report(paths, out)
    assert {path.name for path in out.iterdir()} == DOCUMENTS | DRAWINGS | MEASURED
    page = Page((out / "index.html").read_text())
    assert page.open == []
    assert_no_reference(page)
    for title in (
        "Intervals and calibration",
        "Every row against every other",
        "Images and classes gained and lost",
        "no-mask: classes against vanilla",
    ):
        assert title in page.text
    assert re.search(r"\+\d\d\.\d points over vanilla \(95% interval \+.*: significant", page.text)
    # the elements that a script links: a table's row, a point and its label, a curve
    ids = {attributes["data-row"] for _, attributes in page.tags if "data-row" in attributes}
    assert len(ids) == 2
    # the text of a label is in a g, too
    for kind in ("g", "tr", "details"):
        tied = {a["data-row"] for tag, a in page.tags if tag == kind and "data-row" in a}
        assert tied == ids, kind
    # rows without predictions are named, and the consequences
    (paths[0] / "predictions" / "imagenet-r.npz").unlink()
    write_report(paths, out)
    page = Page((out / "index.html").read_text())
    assert "vanilla (seed 0): no predictions in the run folder" in " ".join(page.text.split())


def test_the_line_that_started_a_run_can_be_pasted(tmp_path):
    words = ["__main__.py", "vanilla", "--run-dir", "my runs/$HOME", "--data", "it's"]
    trained = make_run(tmp_path, "vanilla", optim={"epochs": 1})
    merged = make_run(tmp_path, "uniform-soup", merged_from=[])
    for path in (trained, merged):
        edit(path / "provenance.json", command=words)
    one, two = (command_of(run) for run in load_runs([trained, merged]))
    assert shlex.split(one) == ["python", "-m", "rft.train", *words[1:]]
    assert shlex.split(two)[:3] == ["python", "-m", "rft.merge"]


def test_a_testbed_gives_a_column(tmp_path):
    testbed = tmp_path / "testbed.csv"
    testbed.write_text("model,id,ood\na,60,30\nb,70,40\nc,80,53.333333\n")
    done = command(make_run(tmp_path), "--out", tmp_path / "report", "--testbed", testbed)
    assert done.returncode == 0, done.stderr
    assert "eff. rob." in done.stdout
    # (70, 40) is on the line, which is logit(ood) = logit(id) + logit(0.4) - logit(0.7)
    assert "| +0.0 |" in (tmp_path / "report" / "table.md").read_text()
    testbed.write_text("model,id\n")
    done = command(make_run(tmp_path / "b"), "--out", tmp_path / "other", "--testbed", testbed)
    assert done.returncode == 2
    assert "it has no column ood" in done.stderr
    assert not (tmp_path / "other").exists()


def test_the_miniature_world_is_not_taken_for_imagenet(tmp_path):
    path = make_run(tmp_path, scale="miniature")
    text = write_report([path], tmp_path / "report").text()
    assert "Miniature world" in text
    page = " ".join((tmp_path / "report" / "index.html").read_text().split())
    assert "never their levels" in page
    assert "stand-ins named after the benchmarks" in page


def test_recipes_trained_in_different_precisions_are_told_apart(tmp_path):
    trained = {"optim": {"epochs": 10}}
    runs = {
        "zero-shot": "bf16",
        "vanilla": "fp32",
        "no-mask": "bf16",
        "random-mask-no-fill": "auto",
    }
    paths = [
        make_run(
            tmp_path,
            name,
            precision=precision,
            optim={"epochs": 0 if name == "zero-shot" else 10},
        )
        for name, precision in runs.items()
    ]
    paths.append(make_run(tmp_path, "wise-ft-0.5", merged_from=[]))
    out = tmp_path / "report"
    text = write_report(paths, out).text()
    page = Page((out / "index.html").read_text())
    for shown in (text, page.text, (out / "table.md").read_text(), (out / "paper.md").read_text()):
        assert (
            "Trained in different precisions: auto (random-mask-no-fill); bf16 (no-mask); "
            "fp32 (vanilla)."
        ) in " ".join(shown.split())
    write_report([make_run(tmp_path / "one", "vanilla", precision="bf16", **trained)], out)
    assert "precision" not in (out / "table.md").read_text()


def test_a_sweep_over_alpha_is_a_picture_and_not_a_table(tmp_path):
    names = ["zero-shot", "vanilla", *(f"wise-ft-{tenth / 10:g}" for tenth in range(1, 10))]
    paths = [make_run(tmp_path, name) for name in names]
    out = tmp_path / "report"
    text = write_report(paths, out).text()
    assert (out / "wise.png").is_file()
    page = Page((out / "index.html").read_text())
    for shown in (text, (out / "table.md").read_text()):
        assert "wise-ft-0.5" in shown
        assert "wise-ft-0.4" not in shown
        assert "table.csv has the\nother 8" in shown or "table.csv has the other 8" in shown
    assert "the next picture has all" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert (out / "table.csv").read_text().count("wise-ft-") == 9
    write_report(paths[:2], out)
    assert not (out / "wise.png").exists()


def test_the_paper_stands_beside_on_the_page_and_in_a_file(paths, tmp_path):
    out = tmp_path / "report"
    text = write_report(paths, out).text()
    # in a terminal its rows would push the user's out of sight
    assert "44.2" not in text
    assert "index.html and paper.md" in text
    page = Page((out / "index.html").read_text())
    for shown in (page.text, (out / "paper.md").read_text()):
        said = " ".join(shown.split())
        assert "the paper's Tables 1 and 3 (CLIP ViT-B/32)" in said
        assert "44.2" in said
        assert "in the paper: 1.00 (n = 3 rows)" in said


def test_provenance_is_one_line_for_each_answer(paths):
    (line,) = provenance_lines(load_runs(paths))
    assert line == "rft 0.1.0, git 0123456789ab, python 3.11.0, torch 2.0"
    (paths[0] / "provenance.json").unlink()
    lines = provenance_lines(load_runs(paths))
    assert lines[0] == "code and packages not recorded (1 of 6 runs)"
    assert lines[1].endswith("(5 of 6 runs)")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "rft.report", *map(str, arguments)]
    environment = {"PATH": "", "PYTHONIOENCODING": "ascii"}
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def test_command_line_ends_with_the_page(paths, tmp_path):
    done = command(*paths, "--out", tmp_path / "report")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert any(line.startswith("vanilla  ") for line in lines)
    assert lines[-1] == str(tmp_path / "report" / "index.html")
    # with several trained models it names none: test images would choose
    assert "next:" not in done.stdout


def test_a_report_of_one_trained_model_ends_with_its_use(tmp_path):
    zero, mine = (make_run(tmp_path, name, percent=(70, 60)) for name in ("zero-shot", "vanilla"))
    done = command(zero, mine, "--out", tmp_path / "report")
    assert f"next: python -m rft.predict {mine} IMAGE... --html predictions.html" in done.stdout
    assert f"or: python -m rft.convert export {mine} --to open-clip --out model" in done.stdout


def test_command_line_says_a_mistake_in_one_line(paths, tmp_path):
    (paths[0] / "results.json").unlink()
    done = command(*paths, "--out", tmp_path / "report")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "evaluate it first" in line
    assert not (tmp_path / "report").exists()


def test_no_torch_is_imported():
    code = "import sys, rft.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_held_out_images_are_said_to_select(paths, tmp_path):
    words = "held-out images come from the training set and select"
    main = re.compile("<main>.*</main>", re.DOTALL)
    write_report(paths, tmp_path / "with")
    assert words in Page((tmp_path / "with" / "index.html").read_text()).text
    for path in paths:
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if "held_out_correct" not in line]
        (path / "metrics.jsonl").write_text("".join(kept))
    write_report(paths, tmp_path / "without")
    page = main.findall((tmp_path / "without" / "index.html").read_text())[0]
    assert "held-out" not in page
    assert "select" not in page
