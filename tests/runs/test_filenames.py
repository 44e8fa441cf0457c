"""The file names of a run folder are defined once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rft.runs import filenames
from rft.shards import folder as packed_set

ROOT = Path(__file__).parents[2]
# the definitions, and a tool that imports neither of the two versions that it compares
OWN = [Path(filenames.__file__), ROOT / "tools" / "compare_versions.py"]
NAMES = {
    Path(value).name.encode()
    for name, value in vars(filenames).items()
    if name.isupper() and isinstance(value, str | Path) and Path(value).suffix
}


def texts(source: bytes) -> Iterator[str]:
    """Yield the strings of a module, except docstrings."""
    tree = ast.parse(source)
    words = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
            yield node.value


@pytest.mark.slow
def test_no_other_module_names_a_file_of_a_run_folder():
    assert len(NAMES) == 12
    found = [
        (path, text)
        for folder in ("rft", "tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path not in OWN
        if any(name in (source := path.read_bytes()) for name in NAMES)
        for text in texts(source)
        if any(name.decode() in text.replace("open_clip_config.json", "") for name in NAMES)
    ]
    assert found == []


@pytest.mark.slow
def test_no_other_module_opens_a_file_of_a_packed_set_by_its_own_name():
    """Messages may name one."""
    names = {packed_set.MANIFEST, packed_set.INDEX, packed_set.PLAN, packed_set.QUARANTINE}
    found = [
        (path, text)
        for folder in ("rft", "tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path not in (*OWN, Path(packed_set.__file__))
        for text in texts(path.read_bytes())
        if text.rpartition("/")[2] in names
    ]
    assert found == []
