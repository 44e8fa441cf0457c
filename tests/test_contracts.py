"""Properties that the import contracts of pyproject.toml cannot express."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = PYPROJECT["tool"]["importlinter"]["contracts"]


def test_the_method_may_import_no_room_but_two():
    rooms = {path.parent.name for path in ROOT.glob("rft/*/__init__.py")}
    rooms |= {path.stem for path in ROOT.glob("rft/*.py")} - {"__init__"}
    (contract,) = [one for one in CONTRACTS if one.get("source_modules") == ["rft.method"]]
    forbidden = {name.removeprefix("rft.") for name in contract["forbidden_modules"]}
    assert rooms - forbidden == {"method", "config", "rng"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tests", "tools"])
def test_what_starts_a_command_is_imported_by_nothing(folder):
    """lint-imports covers rft and benchmarks."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            modules = [getattr(node, "module", None) or "", *names]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any("__main__" in name for name in modules), path
