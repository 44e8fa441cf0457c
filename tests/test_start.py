"""Environment variables that libraries read at import, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rft import start

ROOT = Path(__file__).parents[1]
SLOW = (pytest.mark.slow, pytest.mark.program)


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**path, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("variable", "value", "command"),
    [
        pytest.param("TORCH_LOGS", "zzz", ("-m", "rft.env"), marks=pytest.mark.slow),
        pytest.param("TORCH_LOGS", "x\x1b[2J", ("-m", "rft.env"), marks=SLOW),
        pytest.param("TORCH_DISTRIBUTED_DEBUG", "x", ("-m", "rft.env"), marks=SLOW),
        pytest.param("TORCHINDUCTOR_CACHE_DIR", "/dev/null", ("-m", "rft.train"), marks=SLOW),
        pytest.param("TIMM_FUSED_ATTN", "x", ("-m", "rft.evaluate"), marks=SLOW),
        pytest.param("TQDM_MININTERVAL", "x", ("-m", "rft.env"), marks=SLOW),
        pytest.param("FSSPEC_HTTP", "{", ("-m", "rft.experiments"), marks=pytest.mark.slow),
        pytest.param("FSSPEC_HTTP", "[]", ("tools/verify_shards.py", "x"), marks=SLOW),
    ],
)
def test_a_library_that_the_environment_stops_is_one_line(variable, value, command):
    result = run(*command, **{variable: value})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert variable in line
    assert "in the environment" in line
    assert len(line) < 600


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        pytest.param({"COLUMNS": "1"}, ("--help",), marks=pytest.mark.slow),
        pytest.param({"COLUMNS": "3", "NO_COLOR": "1", "TERM": "dumb"}, ("--help",), marks=SLOW),
        pytest.param({"PYTHONIOENCODING": "ascii"}, ("--runs", "r", "--data", "d"), marks=SLOW),
        pytest.param({"MPLCONFIGDIR": "/dev/null"}, ("--runs", "r", "--data", "d"), marks=SLOW),
    ],
)
def test_a_command_that_does_not_mind(variables, words):
    result = run("-m", "rft.experiments", *words, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


@pytest.mark.slow
def test_a_notebooks_backend_does_not_stop_a_report():
    """A shell in Jupyter sets it, although rft's environment may lack the package."""
    result = run("-m", "rft.report", "--help", MPLBACKEND="module://matplotlib_inline.none")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_settings_in_a_file_are_named_by_the_library_that_reads_them(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    result = run("tools/verify_shards.py", "x", FSSPEC_CONFIG_DIR=str(tmp_path))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: fsspec.config cannot be imported: Expecting property name")
    assert line.endswith("check its settings, in files and in the environment")


@pytest.mark.slow
def test_headers_that_are_none_are_not_shown():
    result = run("tools/verify_shards.py", "http://127.0.0.1:9/x", FSSPEC_HTTP='{"headers": "key"}')
    said = (
        "manifest.json cannot be used: headers in fsspec's settings (FSSPEC_HTTP) must be an object"
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines()[0] == said


@pytest.mark.slow
def test_a_program_that_imports_rft_keeps_its_hook():
    code = "import sys, rft.cli; assert sys.excepthook is sys.__excepthook__; int('x')"
    assert "Traceback" in run("-c", code).stderr


def test_who_is_a_command(monkeypatch):
    for started, expected in {
        "-m": True,
        str(ROOT / "tools" / "shard_folder.py"): True,
        "-c": False,
        str(ROOT / "mine.py"): False,
        "": False,
    }.items():
        monkeypatch.setattr(sys, "argv", [started])
        assert start.is_command() == expected, started
