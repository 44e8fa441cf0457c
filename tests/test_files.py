"""What a URL holds in secret is neither shown nor recorded."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rft
from rft import cli, env, files

SIGNED = ("X-Amz-Signature", "x-amz-credential", "X-Amz-Security-Token", "sig", "token", "api_key")
WORDS = st.text("abcxyz019-_.~+=!$*'(),;%", max_size=12)
SECRETS = WORDS.map(lambda word: f"canary{word}canary")
# unescaped, which URLs do not allow but people write; never both
PASSWORDS = SECRETS | st.builds("{}{}{}".format, SECRETS, st.sampled_from(["@", "/", ":"]), SECRETS)
TEXTS = (
    "{}",
    "no such file: {}",
    "--data={}",
    "403, message='Forbidden', url='{}'",
    "url=URL('{}')",
    "[('{}', 'https://plain/a@b')]",
    "a: https://plain:80/x, then: {}. And s3://plain/y?a=1#b",
)


def credentialed(place: tuple[str, str, str], user: str, password: str, query: str) -> str:
    scheme, host, path = place
    start = f"{scheme}://{user}:{password}@{host}/{path}" if user else f"{scheme}://{host}/{path}"
    return f"{start}?part=1&{query}&se=2026" if query else start


PLACES = st.tuples(
    st.sampled_from(["https", "s3", "gs", "ftp", "simplecache::https", "az"]),
    st.sampled_from(["host.example", "127.0.0.1:8080", "bucket"]),
    st.sampled_from(["folder/000.tar", "a@b/c", "x:y/z"]),
)
QUERIES = st.builds("{}={}".format, st.sampled_from(SIGNED), SECRETS)
URLS = st.tuples(PLACES, WORDS.map("user{}".format), PASSWORDS, st.just("") | QUERIES) | st.tuples(
    PLACES, st.just(""), st.just(""), QUERIES
)


@pytest.mark.slow
@given(parts=URLS, text=st.sampled_from(TEXTS))
def test_no_secret_survives_and_the_place_does(parts, text):
    url = credentialed(*parts)
    shown = text.format(url)
    for form in (shown, json.dumps({"data": shown}), repr(shown)):
        redacted = files.redact(form)
        assert "canary" not in redacted
        scheme, host, path = parts[0]
        assert f"{scheme}://" in redacted
        assert f"{host}/{path}" in redacted
        assert files.redact(redacted) == redacted


@given(place=PLACES, text=st.sampled_from(TEXTS))
def test_text_without_credentials_is_unchanged(place, text):
    for query in ("", "versionId=canary", "tokenizer=clip&monkey=1"):
        shown = text.format(credentialed(place, "", "", query))
        assert files.redact(shown) == shown


@pytest.mark.slow
@given(text=st.text("a1:/@?#&=%\\'\" \n*[]", max_size=40) | st.text())
def test_redacting_twice_is_redacting_once(text):
    redacted = files.redact(text)
    assert files.redact(redacted) == redacted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://ghp_0123@host/a", "https://***@host/a"),
        ("abfs://container@account.dfs.core.windows.net/a", None),
        ("sftp://person@host/a", None),
        ("http://[::1]:80/a@b", None),
        ("zip://a.zip::https://u:p@host/b", "zip://a.zip::https://***@host/b"),
        ('{"url": "https:\\/\\/u:p@host\\/a"}', '{"url": "https:\\/\\/***@host\\/a"}'),
        ("https://h/a?x=1\\u0026Signature=b", "https://h/a?x=1\\u0026Signature=***"),
        (
            "<a href='https://h/a?GoogleAccessId=b&amp;x=1'>",
            "<a href='https://h/a?GoogleAccessId=***&amp;x=1'>",
        ),
        ("https://h/a?sv=2&sr=c&sig=Ab%2Bc%3D&sp=r", "https://h/a?sv=2&sr=c&sig=***&sp=r"),
        ("https://h/cb#access_token=b", "https://h/cb#access_token=***"),
        ("https://h/a?sig=", None),
    ],
)
def test_redacted_as_people_meet_them(text, expected):
    assert files.redact(text) == (expected or text)


def test_a_clients_error_is_told_without_the_signature():
    error = OSError("403, url='https://host/a?X-Amz-Signature=canary&b=1'")
    assert files.reason(error) == "403, url='https://host/a?X-Amz-Signature=***&b=1'"


def test_what_was_recorded_without_credentials_must_be_named_again():
    for url in ("https://user:canary@host/data", "https://host/data?sig=canary"):
        with pytest.raises(ValueError, match=r"recorded without its credentials; name it again"):
            files.read_bytes(files.redact(url))


def test_a_document_is_written_without_credentials(tmp_path):
    document = {"data": "https://user:canary@host/a?sig=canary&b=1", "note": 'a "quote"', "n": [1]}
    files.write_json(str(tmp_path / "a.json"), document)
    expected = {**document, "data": "https://***@host/a?sig=***&b=1"}
    assert files.read_json(str(tmp_path / "a.json")) == expected


def test_provenance_has_the_command_without_credentials(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "recipe", "--data=https://u:canary@host/a"])
    assert files.provenance()["command"] == ["train.py", "recipe", "--data=https://***@host/a"]


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
    monkeypatch.setattr(files, "__file__", str(tmp_path / "rft" / "files.py"))
    assert files.git_revision() is None
    git("init", "-q")
    (tmp_path / "rft" / "files.py").touch()
    git("add", ".")
    git("commit", "-qm", "one")
    assert len(files.git_revision()) == 12
    # packages of an environment that lies inside somebody's repository
    inside = tmp_path / "environment" / "rft" / "files.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(inside))
    assert files.git_revision() is None
    # launch/ leaves a copy's commit beside it; one left behind in a checkout is not believed
    (inside.parents[1] / "REVISION").write_text("0123456789ab\n")
    assert files.git_revision() == "0123456789ab"
    (tmp_path / "REVISION").write_text("older\n")
    monkeypatch.setattr(files, "__file__", str(tmp_path / "rft" / "files.py"))
    assert files.git_revision() not in ("older", None)


def test_neither_a_mistake_nor_a_bug_shows_credentials(capsys, monkeypatch):
    def main() -> None:
        raise kind("cannot read https://user:canary@host/a") from OSError("s3://key:canary@b")

    kind = ValueError
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "error: cannot read https://***@host/a\n"

    kind = AssertionError
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # put back after the test
    with pytest.raises(AssertionError) as bug:
        cli.run(main)
    sys.excepthook(bug.type, bug.value, bug.tb)  # as the interpreter does
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "AssertionError: cannot read https://***@host/a" in shown
    assert "s3://***@b" in shown
    assert "canary" not in shown
