"""Wheels for a machine with torch but no network: `python -m benchmarks.wheels`.

Rented GPU machines are often bare: an image with torch for its driver and no package registry. This
command fills a folder with the other packages that `benchmarks.gpu` and tests/gpu need, in the
versions of this environment, for the Python and platform of the other machine. Run there:

    python3 -m pip install --no-index --no-deps --target site build/wheels/*.whl
    PYTHONPATH=site python3 -m benchmarks.gpu

Omitted are torch, torchvision, which only works with the torch it was built for, and everything
that these two require (including numpy and Pillow). The last line is one JSON object: the number of
wheels and their bytes.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rft import cli

ROOT = Path(__file__).parents[1]
# to run the tests on the GPU, beside rft's own requirements
TESTS = ("pytest", "pytest-timeout")
OWN = "rft-clip"  # rft's own distribution
PROVIDED = ("torch", "torchvision")
# figures, held-out splits and ImageNet's devkit, a server for log folders, downloads from the model
# hub: a hundred megabytes that no measured part imports
UNUSED = {"matplotlib", "scikit-learn", "scipy", "tensorboard-data-server", "hf-xet"}
MOST_BYTES = 60_000_000  # so that the folder is copied in seconds
# pip matches one glibc exactly: list all for which wheels are built, newest first
GLIBC = ("2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
ALIASES = {"2_17": "2014", "2_12": "2010", "2_5": "1"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fill a folder with the wheels that the GPU benchmark needs beside torch and torchvision."""

    python: str = "3.12"
    """Python of the target machine, MAJOR.MINOR."""
    machine: str = "x86_64"
    """Its processor, as `uname -m` prints it; the system is Linux."""
    out: Path = Path("build/wheels")
    """Folder for the wheels; wheels of other versions are removed from it."""

    def __post_init__(self) -> None:
        major, _, minor = self.python.partition(".")
        if major != "3" or not minor.isdecimal() or int(minor) < 11:
            raise ValueError(f"--python must be 3.11 or newer, MAJOR.MINOR, not {self.python!r}")


def closure(
    names: Iterable[str], environment: dict[str, str], skipped: Collection[str] = ()
) -> set[str]:
    """List packages and their recursive requirements, from the metadata of installed packages.

    Args:
        names: requirements, such as `fsspec[http]`.
        environment: values of environment markers that differ from this machine's.
        skipped: packages that are left out, with whatever only they require.

    Raises:
        ValueError: if a package is not installed here.
    """
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in skipped or (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(f"{name} is not installed here: make .venv/.installed") from error
        for line in needs:
            need = Requirement(line)
            # a requirement of an extra counts only if the extra is requested
            cases = ({**environment, "extra": extra} for extra in ("", *extras))
            if need.marker is None or any(map(need.marker.evaluate, cases)):
                waiting.append(need)
    return found


def packages(arguments: Arguments) -> list[str]:
    """List the packages to download, with their versions: NAME==VERSION, sorted."""
    environment = {
        "python_version": arguments.python,
        "python_full_version": f"{arguments.python}.0",
        "platform_machine": arguments.machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
    }
    provided = closure(PROVIDED, environment)
    carried = closure([OWN, *TESTS], environment, skipped={*provided, *UNUSED}) - {OWN}
    return [f"{name}=={importlib.metadata.version(name)}" for name in sorted(carried)]


def download(arguments: Arguments, wanted: list[str]) -> list[Path]:
    """Fill the folder; return its wheels.

    Raises:
        ValueError: with pip's last line, if a package has no wheel for that Python and platform.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", arguments.python, "--dest", str(arguments.out)]
    for glibc in GLIBC:
        command += ["--platform", f"manylinux_{glibc}_{arguments.machine}"]
        if glibc in ALIASES:
            command += ["--platform", f"manylinux{ALIASES[glibc]}_{arguments.machine}"]
    result = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or ["no reason"]
        raise ValueError(f"pip download failed: {lines[-1].removeprefix('ERROR: ')}")
    versions = {tuple(text.split("==")) for text in wanted}
    wheels = []
    for path in sorted(arguments.out.glob("*.whl")):
        name, version, *_ = path.name.split("-")
        if (canonicalize_name(name), version) in versions:
            wheels.append(path)
        else:
            path.unlink()  # two versions of one package would stop the installation
    if len(wheels) != len(wanted):
        raise ValueError(f"{arguments.out} has {len(wheels)} wheels of {len(wanted)} packages")
    return wheels


def main() -> None:
    """Download the wheels and print their size."""
    arguments = cli.parse(Arguments, prog="benchmarks.wheels")
    wheels = download(arguments, packages(arguments))
    size = sum(path.stat().st_size for path in wheels)
    if size > MOST_BYTES:
        raise ValueError(f"{arguments.out} weighs {size / 1e6:.1f} MB, over {MOST_BYTES / 1e6:g}")
    print(f"{len(wheels)} wheels for Python {arguments.python}, {size / 1e6:.1f} MB")
    print(json.dumps({"wheels": len(wheels), "bytes": size, "python": arguments.python}))


if __name__ == "__main__":
    cli.run(main)
