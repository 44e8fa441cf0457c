"""The pages agree with the files that they quote."""

import importlib.util
import re
from pathlib import Path

import pytest

from rft import recipes

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


PAGES = (
    *PAGES_WITH_TABLES,
    *(f"docs/{name}.md" for name in ("architecture", "paper", "gpu", "predict", "export")),
    "SECURITY.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_limits_that_the_page_on_security_names_exist():
    section = (ROOT / "docs/security.md").read_text().split("## Limits")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        file = re.search(r"in `(\S+)` \|$", row)
        assert file, row
        code = (ROOT / file[1]).read_text()
        for name in re.findall(r"`(\w+)`", row):
            assert re.search(rf"^(class )?{name}\b", code, re.MULTILINE), row


def test_the_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`([a-z0-9-]+)`", text))
    named |= {f"{m}-mask-{f}-fill" for m in ("random", "context", "object") for f in FILLS}
    assert set(recipes.PAPER) <= named


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


def test_files_the_readme_lists_exist():
    text = (ROOT / "README.md").read_text()
    for line in re.findall(r"\| `?(rft/[a-z_/]+\.py)", text):
        assert (ROOT / line).exists(), line


def test_the_page_on_architecture_has_every_room_and_no_other():
    section = (ROOT / "docs/architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`rft/([a-z_]+(?:\.py)?)`", row)]
    rooms = [path.parent.name for path in ROOT.glob("rft/*/__init__.py")]
    modules = [path.name for path in ROOT.glob("rft/*.py")]
    # one command under its public name, see rft/data/__init__.py
    assert sorted(named) == sorted({*rooms, *modules} - {"data", "__init__.py"})


def named_functions(page: str) -> list[tuple[Path, str]]:
    """Every `file: function, function` and `file` on a page; without a function the name is ""."""
    found = []
    for path, names in re.findall(
        r"`((?:rft|tests|launch)/[\w/]+\.(?:py|sh))(?:: ([\w, ]+))?`", (ROOT / page).read_text()
    ):
        found += [(ROOT / path, name.strip()) for name in (names or "").split(",")]
    return found


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/paper.md", "README.md"])
def test_functions_that_pages_name_exist(page):
    named = named_functions(page)
    assert len(named) > 10
    for path, name in named:
        assert path.is_file(), path
        defined = re.compile(rf"^(?:def |class )?{name}\b", re.MULTILINE)
        assert not name or defined.search(path.read_text()), (path, name)
