"""Exports are pushed to a stand-in for the model hub and compared byte by byte."""

import socket
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from benchmarks.servers.loopback import ADDRESS, free_port
from rft.clip import hub as product
from rft.convert import command, push
from tests import formats, tiny
from tests.servers.hub import Hub, ask_instead, hub  # noqa: F401

pytestmark = pytest.mark.usefixtures("known_models")
REPO = "someone/photos"


@pytest.fixture
def words(convert, openai, tmp_path, tiny_data) -> tuple:
    """The command line of a push."""
    run = tmp_path / "run"
    convert("import", openai, "--out", run, "--clip", formats.NAME, "--data", tiny_data)
    to = ("--to", "open-clip", "--out", tmp_path / "export", "--text", openai)
    return ("export", run, *to, "--push", f"hf://{REPO}")


@pytest.fixture
def login(monkeypatch, hub: Hub) -> Hub:  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_folder_arrives_byte_by_byte_and_once(convert, refused, login, words, tmp_path):
    printed = convert(*words, "--private")
    assert printed.splitlines()[-1] == f"pushed: {login.url}/{REPO}"
    pushed = dict(login.repositories[REPO])
    assert pushed.pop(".gitattributes")
    assert pushed == contents(tmp_path / "export")
    assert {"README.md", "load.py", "card.json", "open_clip_model.safetensors"} <= pushed.keys()
    assert login.private == {REPO: True}
    assert set(login.objects.values()) == {
        data for name, data in pushed.items() if name.endswith(".safetensors")
    }
    # a second push sends no weights, keeps an edited page, and uploads no other file
    (tmp_path / "export" / "private.txt").write_text("secret")
    login.repositories[REPO]["README.md"] = b"edited on the hub"
    login.repositories[REPO]["picture.png"] = b"the owner's"
    login.requests.clear()
    convert(*words)
    assert not [request for request in login.requests if request.startswith("PUT")]
    found = login.repositories[REPO]
    assert found["README.md"] == b"edited on the hub"
    assert found["picture.png"] == b"the owner's"
    assert found["card.json"] == (tmp_path / "export" / "card.json").read_bytes()
    assert "private.txt" not in found
    # a different model under that name
    login.repositories[REPO]["open_clip_model.safetensors"] = b"of a different model"
    before = dict(login.repositories[REPO])
    line = refused(*words)
    assert f"{REPO} holds a different model: its open_clip_model.safetensors is" in line
    assert login.repositories[REPO] == before


@pytest.mark.slow
def test_a_page_that_was_edited_here_stays(convert, login, words, tmp_path):
    convert(*words)
    page = tmp_path / "export" / "README.md"
    written = page.read_bytes()
    convert(*words)
    assert page.read_bytes() == written
    mine = "---\nlicense: mit\n---\n\nmine\n"
    page.write_text(mine)
    convert(*words)
    assert page.read_text() == mine
    del login.repositories[REPO]["README.md"]
    convert(*words)
    assert login.repositories[REPO]["README.md"].decode() == mine


@pytest.mark.slow
def test_a_repository_of_other_files(refused, login, words):
    login.repositories[REPO] = {"pytorch_model.bin": b"x"}
    assert f"{REPO} holds other files (pytorch_model.bin)" in refused(*words)
    assert login.repositories[REPO] == {"pytorch_model.bin": b"x"}


@pytest.mark.slow
def test_no_login(refused, hub: Hub, words, tmp_path):  # noqa: F811
    line = refused(*words)
    assert f"cannot push to {REPO}: no login; `hf auth login`, or HF_TOKEN" in line
    assert hub.requests == []
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_a_token_that_the_hub_does_not_take(monkeypatch, refused, login, words, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret-of-someone")
    line = refused(*words)
    assert f"{login.url} answers 401: the token is not valid" in line
    assert "secret" not in line
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_a_name_of_someone_else(refused, login, words):
    line = refused(*words[:-1], "hf://other/photos")
    assert "cannot push to other/photos: " in line
    assert "answers 403: the token may not write there" in line
    assert login.repositories == {}


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails(refused, login, words, status):
    login.status = status
    assert f"cannot push to {REPO}: {login.url} answers {status}" in refused(*words)


def unreached(capsys, words) -> str:
    """Run a push that cannot reach the hub; return the error's line, without its advice."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        tiny.call(command, *words)
    assert stopped.value.code == 2
    line, *advice = tiny.complaints(capsys.readouterr().err)
    assert advice[0].startswith(f"  the hub is {constants.ENDPOINT}: check the network, a proxy")
    assert advice[1:] == [f"  {push.WITHOUT}"]
    return line


@pytest.mark.slow
def test_no_network(monkeypatch, capsys, login, words, tmp_path):
    ask_instead(monkeypatch, f"http://{ADDRESS}:{free_port()}", tmp_path)
    monkeypatch.setenv("HF_TOKEN", login.token)
    line = unreached(capsys, words)
    assert f"cannot push to {REPO}: [Errno 111] Connection refused" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in unreached(capsys, words)


@pytest.mark.slow
def test_a_hub_that_never_answers(monkeypatch, capsys, login, words, tmp_path):
    asked = threading.Event()
    monkeypatch.setattr(product, "SECONDS", 0.2)
    with socket.create_server((ADDRESS, 0)) as silent:
        ask_instead(monkeypatch, f"http://{ADDRESS}:{silent.getsockname()[1]}", tmp_path)
        monkeypatch.setenv("HF_TOKEN", login.token)

        def accept() -> None:
            with silent.accept()[0] as connection:
                while connection.recv(100_000):  # until the client stops retrying
                    asked.set()

        thread = threading.Thread(target=accept)
        thread.start()
        line = unreached(capsys, words)
        thread.join()
    assert asked.is_set()
    assert line == f"error: cannot push to {REPO}: timed out"


@pytest.mark.parametrize(
    "url",
    ["someone/photos", "hf://photos", "hf://a/b/c", "hf://datasets/a", "hf:///x", "hf://a/", ""],
)
def test_addresses_that_are_no_repository(url):
    with pytest.raises(ValueError, match="must be hf://USER/NAME"):
        push.repository(url)


@pytest.mark.parametrize("url", ["hf://a/b c", "hf://a/..", "hf://a/b\n", "hf://\u202ea/b"])
def test_names_that_the_hub_does_not_have(url):
    with pytest.raises(ValueError, match="--push is "):
        push.repository(url)


@pytest.mark.slow
def test_options_that_do_not_belong_together(refused, run, tmp_path):
    words = ("export", run, "--to", "safetensors", "--out", tmp_path / "m.safetensors")
    assert "--push uploads the folder of --to open-clip" in refused(*words, "--push", "hf://a/b")
    assert "needs --push hf://USER/NAME" in refused(*words, "--private")
    assert "docs/storage.md#credentials" in refused(*words, "--push", "hf://user:secret@a/b")
