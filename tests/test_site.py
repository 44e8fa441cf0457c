"""The site of `make docs` is complete, has no dead link and loads nothing from a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import screenshots
from docs.site import links, pages

ROOT = Path(__file__).parents[1]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, built once."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "docs.site.build", "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.split() == [str(out / "html" / "index.html")]
    return out / "html"


@pytest.mark.program
def test_every_page_is_there_and_no_link_is_dead(site):
    for page in [*ROOT.glob("docs/*.md"), ROOT / "CHANGELOG.md"]:
        assert (site / page.relative_to(ROOT).with_suffix(".html")).is_file(), page
    assert list(links.dead(site)) == []


@pytest.mark.program
def test_the_reference_has_every_public_name_and_the_commands_their_help(site):
    from docs.site import reference

    model = links.read(site / "api" / "model.html")
    names = reference.exports(ROOT)
    assert {"load", "Model", "Prediction"} <= {*names}
    assert {f"rft.{name}" for name in names} <= model.anchors
    # of a class that is exported, its methods too
    assert "rft.Model.classify" in model.anchors
    for page, anchor in {
        "config": "rft.config.MethodConfig.threshold",
        "recipes": "rft.recipes.build",
        "method": "rft.method.masking.object_mask",
        "evaluate": "rft.evaluate.count.predict",
        "statistics": "rft.statistics.paired.mcnemar",
    }.items():
        assert anchor in links.read(site / "api" / f"{page}.html").anchors
    commands = (site / "commands.html").read_text()
    assert "usage: rft train" in commands
    assert "--method.threshold" in commands


@pytest.mark.program
def test_the_pages_load_nothing_from_a_network_fit_a_phone_and_can_be_searched(site):
    if reason := screenshots.why_not():
        if os.environ.get("RFT_REQUIRE_CHROMIUM"):
            pytest.fail(f"no browser, which RFT_REQUIRE_CHROMIUM asks for: {reason}")
        pytest.skip(f"no browser: {reason}")
    with screenshots.browser() as started:
        page = started.new_page(viewport=PHONE)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        for path in sorted(site.rglob("*.html")):
            page.goto(path.as_uri())
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= PHONE["width"], f"{path} is {wide} pixels wide"
        page.goto(f"{(site / 'search.html').as_uri()}?q=counterfactual")
        page.wait_for_selector("#search-results ul.search li a")
        assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#here">1</a><a href="b.html#gone">2</a>'
        '<a href="c.html">3</a><a href="https://example.org">4</a><a href="#top">5</a>'
        '<img src="https://example.org/x.png">'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><script src="//example.org/x.js"></script>')
    (tmp_path / "s.css").write_text('@font-face { src: url("https://example.org/f.woff2") }')
    assert sorted(links.dead(tmp_path)) == [
        "a.html: b.html#gone has no such anchor",
        "a.html: c.html does not exist",
        "a.html: loads https://example.org/x.png from another host",
        "b.html: loads //example.org/x.js from another host",
        "s.css: loads a file from another host",
    ]


def repository(root: Path, **files: str) -> Path:
    for name, text in {"README.md": "# x\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def staged(root: Path, out: Path) -> dict[str, str]:
    tree = pages.Tree(root, out)
    tree.fill()
    return {
        str(path.relative_to(tree.source)): path.read_text() for path in tree.source.rglob("*.md")
    }


def test_links_to_files_of_the_repository_become_links_within_the_site(tmp_path):
    root = repository(
        tmp_path / "root",
        **{
            "README.md": "# x\n\n[data](docs/data.md#a)\n",
            "docs/data.md": "# Data\n\n[home](../README.md#x) [code](../rft/a.py#L3), "
            "[`t`](results/t.md)\n[p](results/p.png) ![q](results/p.png)\n"
            "[all](results) `[no](none.md)` [out](https://example.org)\n"
            "\n```\n[no](none.md)\n```\n",
            "docs/results/t.md": "| a |\n",
            "docs/results/p.png": "a picture",
            "rft/a.py": "'''```'''\n",
        },
    )
    found = staged(root, tmp_path / "out")
    assert "[data](docs/data.md#a)" in found["index.md"]
    data = found["docs/data.md"]
    assert "[home](../index.md#x) [code](../files/rft/a.py.md), [`t`](results/t.md)" in data
    assert '<a href="results/p.png">p</a> ![q](results/p.png)' in data
    assert "[all](../files/docs/results.md) `[no](none.md)` [out](https://example.org)" in data
    assert "```\n[no](none.md)\n```" in data
    assert "````python\n'''```'''\n````" in found["files/rft/a.py.md"]
    assert "[t.md](../../docs/results/t.md)" in found["files/docs/results.md"]
    assert found["docs/results/t.md"].startswith("---\norphan: true\n---\n\n# docs/results/t.md\n")
    assert (tmp_path / "out/source/docs/results/p.png").read_text() == "a picture"
    assert (tmp_path / "out/copied/docs/results/p.png").read_text() == "a picture"


def test_pictures_for_light_and_dark_follow_the_switch_of_the_site(tmp_path):
    text = (
        '# x\n\n<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="docs/dark.png">\n'
        '  <img alt="y" src="docs/light.png">\n</picture>\n'
    )
    root = repository(
        tmp_path / "root", **{"README.md": text, "docs/dark.png": "", "docs/light.png": ""}
    )
    home = staged(root, tmp_path / "out")["index.md"]
    assert '<img class="only-light" alt="y" src="docs/light.png">' in home
    assert '<img class="only-dark" alt="y" src="docs/dark.png">' in home
    assert "<picture>" not in home
    assert (tmp_path / "out/copied/docs/dark.png").is_file()


def test_a_page_outside_the_navigation_and_a_link_to_no_file_are_errors(tmp_path):
    root = repository(tmp_path / "one", **{"docs/forgotten.md": "# x\n"})
    with pytest.raises(ValueError, match=r"not in NAVIGATION .*: docs/forgotten\.md"):
        staged(root, tmp_path / "out")
    root = repository(tmp_path / "two", **{"docs/data.md": "[x](gone.md)\n"})
    with pytest.raises(ValueError, match=re.escape("not exist: docs/data.md: gone.md")):
        staged(root, tmp_path / "out")


def test_a_page_that_the_navigation_names_is_in_it_once():
    named = [name for group in pages.NAVIGATION.values() for name in group]
    assert len(named) == len({*named})
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} <= {*named}
