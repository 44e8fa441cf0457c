"""rft's dependencies: documented bounds, locks that satisfy them, every file by its hash."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rft import env

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
# the purpose of each lock of requirements/, beside rft's own dependencies
LOCKS = {
    "run": (),
    "extras": ("s3", "gcs", "azure", "wandb", "onnx"),
    "dev": ("dev",),
    "lowest": ("dev", "gcs", "azure"),
}
HASH = re.compile(r" --hash=sha256:[0-9a-f]{64}(?= |$)")


def direct(lock: str) -> dict[str, Requirement]:
    """Requirements of pyproject.toml that a lock must hold, by name."""
    lines = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["build"]]
    lines += [line for extra in LOCKS[lock] for line in EXTRAS[extra]]
    found = {canonicalize_name(need.name): need for need in map(Requirement, lines)}
    itself = found.pop("rft-clip", None)  # an extra may ask for another one: rft[s3]
    for extra in itself.extras if itself else ():
        found |= {canonicalize_name(need.name): need for need in map(Requirement, EXTRAS[extra])}
    return found


def entries(lock: str) -> list[str]:
    """Requirements of a lock as pip reads them: continued lines joined, comments removed."""
    text = (ROOT / f"requirements/{lock}.txt").read_text().replace("\\\n", "")
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pinned(lock: str) -> dict[str, Requirement]:
    """The requirements of a lock, by name, without their hashes."""
    needs = [Requirement(HASH.sub("", entry).strip()) for entry in entries(lock)]
    found = {canonicalize_name(need.name): need for need in needs}
    # several releases of a package are each for different Pythons or systems
    assert all(n.marker for n in needs if found[canonicalize_name(n.name)] is not n)
    return found


def release(need: Requirement) -> str:
    """The single release permitted by a requirement NAME==RELEASE."""
    (specifier,) = need.specifier
    assert specifier.operator == "=="
    assert "*" not in specifier.version
    return specifier.version


def lower_bound(need: Requirement) -> str:
    (specifier,) = need.specifier
    assert specifier.operator == ">=", need
    return specifier.version


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_of_a_lock_is_one_release_with_hashes_and_names_no_place(lock):
    for entry in entries(lock):
        assert HASH.search(entry), f"{entry[:60]}: no hash, or an option of pip"
        assert re.fullmatch(r"[a-z0-9.-]+==[^ ]+( ; [^\\]+)?", HASH.sub("", entry)), entry[:60]
    assert "://" not in (ROOT / f"requirements/{lock}.txt").read_text()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_keeps_every_bound_of_pyproject(lock):
    locked = pinned(lock)
    for name, need in direct(lock).items():
        assert name in locked, f"make lock: {name} is missing in requirements/{lock}.txt"
        assert need.specifier.contains(release(locked[name])), f"make lock: {locked[name]}"
        assert locked[name].marker is None, f"{locked[name]} is not for every machine"


def test_users_and_developers_get_the_same_releases():
    users = {name: release(need) for name, need in pinned("extras").items()}
    for lock in ("run", "dev"):
        for name, need in pinned(lock).items():
            assert release(need) == users.get(name, release(need)), name


def test_the_lowest_lock_is_exactly_the_lower_bounds():
    locked = pinned("lowest")
    bounds = {name: lower_bound(need) for name, need in direct("lowest").items()}
    for name, bound in bounds.items():
        assert release(locked[name]) == bound, f"make lock UPGRADE='--upgrade-package {name}'"


def test_every_dependency_has_a_lower_bound_that_decisions_explain():
    section = (ROOT / "docs/decisions.md").read_text().split("## Dependencies")[1].split("\n## ")[0]
    explained = dict(
        re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| [^|\n]{10,} \|$", section, re.MULTILINE)
    )
    needs = map(Requirement, PYPROJECT["project"]["dependencies"])
    assert explained == {need.name: lower_bound(need) for need in needs}


def test_the_warning_about_pillow_simd_knows_the_lower_bound_of_pillow():
    assert lower_bound(direct("run")["pillow"]) == env.FIXED


def test_a_build_without_isolation_finds_in_the_lock_what_the_build_needs():
    assert PYPROJECT["dependency-groups"]["build"] == PYPROJECT["build-system"]["requires"]


def test_the_licence_of_every_locked_package_is_listed():
    listed = {
        canonicalize_name(name): (version, licence)
        for name, version, licence in re.findall(
            r"^\| (\S+) +\| (\S+) +\| (.+?) +\|$",
            (ROOT / "requirements/licenses.md").read_text(),
            re.MULTILINE,
        )
    }
    for lock in ("run", "extras", "dev"):
        for name, need in pinned(lock).items():
            if need.marker is None or need.marker.evaluate(LINUX):
                assert name in listed, f"make licenses: {name} is missing"
                version, licence = listed[name]
                assert version == release(need), f"make licenses: {name}"
                assert licence != "UNKNOWN" or name == "cuda-toolkit", name  # docs/security.md


LINUX = {
    **default_environment(),
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}
