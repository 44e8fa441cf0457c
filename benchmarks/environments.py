"""Package folders beside .venv: `python -m benchmarks.environments` creates them all.

The peers pin packages that conflict with ours and with each other's (open_clip wants webdataset
0.2, streaming wants numpy 2.1), and Pillow-SIMD replaces Pillow. Each gets its own folder, which a
child process searches before .venv's packages. So torch is installed only once, and .venv does not
change. Packages that cannot be installed are omitted and reported with pip's reason.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rft import cli

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "environments"
# exact versions for reproducible results; --no-deps, so nothing else is installed
PACKAGES: dict[str, tuple[str, ...]] = {
    "pillow-simd": ("pillow-simd==12.1.1.post0",),
    "open_clip": ("webdataset==0.2.86", "pandas==2.3.3", "pytz==2026.2"),
    "mosaicml-streaming": (
        "mosaicml-streaming==0.13.0",
        "boto3==1.44.5",
        "botocore==1.44.5",
        "s3transfer==0.19.3",
        "numpy==2.1.3",
        "transformers==4.57.6",
        "huggingface_hub==0.36.2",
        "tokenizers==0.22.2",
        "requests==2.34.2",
        "certifi==2026.10.18",
        "charset-normalizer==3.5.2",
        "brotli==1.2.1",
        "catalogue==2.0.10",
        "cramjam==2.14.0",
        "python-snappy==0.7.3",
        "xxhash==4.1.0",
        "zstd==1.5.7.2",
    ),
    "litdata": (
        "litdata==0.2.76",
        "lightning-utilities==0.15.3",
        "obstore==0.12.1",
        "boto3==1.44.5",
        "botocore==1.44.5",
        "s3transfer==0.19.3",
        "requests==2.34.2",
        "certifi==2026.10.18",
        "charset-normalizer==3.5.2",
        "tifffile==2026.3.3",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Install the packages that the benchmarks compare with, each in its own folder."""

    names: tuple[str, ...] = tuple(PACKAGES)
    """Environments to install."""


def install(name: str) -> None:
    """Install one environment, unless it exists; a failure is kept for `absence` to report."""
    folder = BUILD / name
    if absence(name) is None:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(folder), *PACKAGES[name]]
    variables = dict(os.environ)
    if name == "pillow-simd":
        # pip caches wheels by name alone: one built with other flags must not be used
        command += ["--no-binary", "pillow-simd", "--no-cache-dir"]
        variables["CC"] = "cc -mavx2"
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    said = result.stderr.splitlines() or ["pip says nothing"]
    errors = [line for line in said if "error" in line.lower()]
    failure = (errors or said)[-1] if result.returncode else None
    state = {"packages": PACKAGES[name], "failure": failure}
    (folder / "state.json").write_text(json.dumps(state))


def absence(name: str) -> str | None:
    """Return the reason why an environment cannot be used, or None."""
    try:
        state = json.loads((BUILD / name / "state.json").read_text())
    except FileNotFoundError:
        return f"not installed; python -m benchmarks.environments --names {name}"
    if state["packages"] != list(PACKAGES[name]):
        return f"installed in other versions; python -m benchmarks.environments --names {name}"
    return None if state["failure"] is None else f"does not install: {state['failure']}"


def variables(name: str | None) -> dict[str, str]:
    """Build the environment of a child process that uses it; None is plain .venv."""
    folders = [str(BUILD / name)] if name else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, str(ROOT)])}


def main() -> None:
    """Install the environments named on the command line and report their state."""
    arguments = cli.parse(Arguments, prog="benchmarks.environments")
    for name in arguments.names:
        if name not in PACKAGES:
            raise cli.unknown("environment", name, list(PACKAGES))
        install(name)
        print(f"{name}: {absence(name) or 'installed'}", flush=True)


if __name__ == "__main__":
    cli.run(main)
