"""The recorded provenance of results."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

import rft
from rft import env
from rft.storage import files


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "rft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert files.provenance()["rft"] == rft.__version__
    assert dict(env.rows())["rft"].startswith(rft.__version__)


def test_the_commit_is_this_trees_own(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    (tmp_path / "rft").mkdir()
    monkeypatch.setattr(rft, "__file__", str(tmp_path / "rft" / "__init__.py"))
    assert files.git_revision() is None
    git("init", "-q")
    (tmp_path / "rft" / "__init__.py").touch()
    git("add", ".")
    git("commit", "-qm", "one")
    assert len(files.git_revision()) == 12
    # packages of an environment inside an unrelated repository
    inside = tmp_path / "environment" / "rft" / "__init__.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(rft, "__file__", str(inside))
    assert files.git_revision() is None
    # launch/ stores a copy's commit beside it; one left behind in a checkout is ignored
    (inside.parents[1] / "REVISION").write_text("0123456789ab\n")
    assert files.git_revision() == "0123456789ab"
    (tmp_path / "REVISION").write_text("older\n")
    monkeypatch.setattr(rft, "__file__", str(tmp_path / "rft" / "__init__.py"))
    assert files.git_revision() not in ("older", None)


def test_a_result_names_the_commit_of_this_checkout():
    if not (Path(__file__).parents[2] / ".git").exists():
        pytest.skip("not a checkout")
    assert files.provenance()["git"] == files.git_revision() is not None


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("s3a://b/x", "s3"),
        ("gs://b/x", "gcs"),
        ("abfs://c/x", "azure"),
        ("hf://datasets/a/b", "hub"),
    ],
)
def test_a_missing_client_is_named_with_its_extra(monkeypatch, url, extra):
    def missing(_: str) -> None:
        raise ImportError("Install the client")

    monkeypatch.setattr(files.fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"client; in rft's clone: pip install '\.") as found:
        files.open_store(url)
    assert str(found.value).endswith(f"pip install '.[{extra}]'")
    with pytest.raises(ValueError, match=r"Install the client$"):
        files.open_store("https://host/x")
