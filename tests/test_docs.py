"""The pages agree with the files: tables, links, names of code, and the form of the README."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from rft import recipes
from rft.sets import BENCHMARKS, TRAIN_SET

ROOT = Path(__file__).parents[1]


def updater():
    spec = importlib.util.spec_from_file_location("update", ROOT / "docs" / "update_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES_WITH_TABLES = updater().PAGES


@pytest.mark.parametrize("page", PAGES_WITH_TABLES)
def test_tables_are_their_files(page):
    text = (ROOT / page).read_text()
    assert "<!-- table:" in text
    assert updater().with_tables(text) == text


def test_a_pattern_takes_all_its_files_and_says_if_there_is_none(tmp_path, monkeypatch):
    update = updater()
    monkeypatch.setattr(update, "ROOT", tmp_path)
    page = "<!-- table: gpu_*.md -->\nold\n<!-- end of table -->\n"
    assert "\nNot measured.\n" in update.with_tables(page)
    for chip in ("H100", "A100"):
        (tmp_path / f"gpu_{chip}.md").write_text(f"{chip} table\n")
    assert "\nA100 table\n\nH100 table\n\n<!--" in update.with_tables(page)


DOCS = sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))


def anchors(page: Path) -> set[str]:
    """Collect the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", *DOCS])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text)
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target, anchor in [*links, *((picture, "") for picture in pictures)]:
        if not target.startswith("http"):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_pages_that_messages_name_exist():
    """An error whose cause has a page names it: docs/PAGE.md#anchor."""
    code = [path for folder in ("rft", "tools", "launch") for path in (ROOT / folder).rglob("*.*")]
    named = {
        found
        for path in code
        if path.suffix in {".py", ".sh", ".sbatch", ".example"}
        for found in re.findall(r"docs/([\w-]+)\.md(?:#([\w-]+))?", path.read_text())
    }
    assert len(named) > 20
    for page, anchor in named:
        path = ROOT / "docs" / f"{page}.md"
        assert path.exists(), page
        assert not anchor or anchor in anchors(path), f"{page}.md#{anchor}"


# in the order in which a new reader needs them
SECTIONS = (
    "Install",
    "Your own photos",
    "From Python",
    "The demo",
    "ImageNet",
    "Paper and citation",
    "Pages",
)


def test_the_readme_is_short_and_in_order():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 1200
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert tuple(re.findall(r"^## (.+)", prose, re.MULTILINE)) == SECTIONS
    # before the first section: purpose, result, method
    opening, *_ = text.split("\n## ")
    pictures = re.findall(r'<img src="docs/pictures/(\w+)-light\.\w+" alt="[^"]{20,}"', opening)
    assert pictures == ["result", "method"]
    assert len(re.findall(r"prefers-color-scheme: dark", opening)) == 2
    # commands to try and to test it, a citation to copy, no generated table
    assert {"make test", "make quick", "make demo"} <= set(re.findall(r"make \w+", text))
    assert "@inproceedings{" in text
    assert "<!-- table:" not in text


def test_the_readme_links_to_every_page():
    linked = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert {*DOCS, "CHANGELOG.md", "CITATION.cff", "LICENSE"} <= set(linked)


def test_accuracies_of_the_readme_are_the_results():
    opening, *_ = (ROOT / "README.md").read_text().split("\n## ")
    with (ROOT / "docs/results/miniature/table.csv").open() as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    shown = {
        f"{float(rows[name][column]):.1f}%"
        for name in ("zero-shot", "vanilla", "no-mask", recipes.DEFAULT)
        for column in ("ImageNet", "OOD avg")
    }
    assert set(re.findall(r"\d+\.\d%", opening)) == shown


def test_the_readmes_cost_of_imagenet_follows_from_the_recipe():
    config = recipes.build(recipes.DEFAULT)
    images = BENCHMARKS[TRAIN_SET].images - config.loader.held_out
    steps = images // config.loader.batch_size
    text = (ROOT / "README.md").read_text()
    assert f"| optimizer steps of {config.loader.batch_size} images | {steps * 10:,} |" in text
    assert config.optim.epochs == 10
    # of --encoding pixels: the model's input as raw bytes
    read = steps * config.loader.batch_size * 3 * 224**2 / 1e9
    (shown,) = re.findall(r"\| images read \| ([\d.]+) GB per epoch \|", text)
    assert float(shown) == pytest.approx(read, rel=0.005)


def test_limits_that_the_page_on_security_names_exist():
    section = (ROOT / "docs/security.md").read_text().split("## Limits")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        file = re.search(r"in `(\S+)` \|$", row)
        assert file, row
        code = (ROOT / file[1]).read_text()
        for name in re.findall(r"`(\w+)`", row):
            assert re.search(rf"^(class )?{name}\b", code, re.MULTILINE), row


def test_the_page_on_training_names_every_recipe():
    text = (ROOT / "docs/training.md").read_text()
    named = set(re.findall(r"`([a-z0-9-]+)`", text))
    named |= {f"{m}-mask-{f}-fill" for m in ("random", "context", "object") for f in FILLS}
    assert set(recipes.TRAINED) <= named


def test_the_page_of_methods_names_every_system():
    named = set(re.findall(r"`([a-z0-9-]+)`", (ROOT / "docs" / "methods.md").read_text()))
    # "the other masks" are the paper's own
    masks = recipes.MASKED.keys() - {recipes.DEFAULT}
    assert {*recipes.TRAINED, *recipes.MERGED, *recipes.ENSEMBLES} - masks <= named


def test_the_page_of_methods_has_the_settings_that_are_tried():
    page = (ROOT / "docs" / "methods.md").read_text()
    rows = page.partition("## What each method does")[2].partition("\n## ")[0].splitlines()
    for name in recipes.SUITE:
        (row,) = (row for row in rows if row.startswith(f"| `{name}`"))
        declared = recipes.TRAINED[name].grid
        tried = ", ".join(f"{value:g}" for value in declared[1]) if declared else "-"
        if declared and declared[0] == recipes.RATE:
            tried = tried.replace("0.333333", "learning rate x 1/3")
        assert re.search(rf"(^| ){re.escape(tried)} \|$", row), row


FILLS = ("no", "single", "multi")


def test_the_page_on_architecture_has_every_module_and_no_other():
    section = (ROOT / "docs/architecture.md").read_text().split("## Modules")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`rft/([a-z_]+(?:\.py)?)`", row)]
    packages = [path.parent.name for path in ROOT.glob("rft/*/__init__.py")]
    modules = [path.name for path in ROOT.glob("rft/*.py")]
    # one command under its public name, see rft/data/__init__.py
    assert sorted(named) == sorted({*packages, *modules} - {"data", "__init__.py"})


def test_the_page_on_architecture_has_every_make_target():
    section = (ROOT / "docs/architecture.md").read_text().partition("## Development")[2]
    targets = re.findall(r"^([a-z][\w-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 20
    assert set(targets) == set(re.findall(r"`make ([\w-]+)`", section))


def named_functions(page: str) -> list[tuple[Path, str]]:
    """Every `file: function, function` and `file` on a page; without a function the name is ""."""
    found = []
    for path, names in re.findall(
        r"`((?:rft|tests|launch)/[\w/]+\.(?:py|sh))(?:: ([\w, ]+))?`", (ROOT / page).read_text()
    ):
        found += [(ROOT / path, name.strip()) for name in (names or "").split(",")]
    return found


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/paper.md"])
def test_functions_that_pages_name_exist(page):
    named = named_functions(page)
    assert len(named) > 10
    for path, name in named:
        assert path.is_file(), path
        defined = re.compile(rf"^(?:def |class )?{name}\b", re.MULTILINE)
        assert not name or defined.search(path.read_text()), (path, name)
