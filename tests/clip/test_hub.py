"""Weights by name without a network: a reason and three alternatives, within seconds."""

import socket
import sys
import threading

import open_clip
import pytest
from huggingface_hub import constants

from benchmarks.servers.loopback import ADDRESS, free_port
from rft import cli
from rft.clip import hub as product
from rft.clip import load
from rft.config import ModelConfig
from tests import formats
from tests.convert.compare import same
from tests.formats import known_models  # noqa: F401
from tests.servers.hub import Hub, ask_instead, hub  # noqa: F401

REPO = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
LAION = ModelConfig(clip="ViT-B-32", pretrained="laion2b_s34b_b79k")


def complaint(capsys, config: ModelConfig = LAION) -> list[str]:
    """The output of a command that cannot load a model."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: load.load_clip(config))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


def require_ways(lines: list[str], reason: str, repo: str = REPO) -> None:
    error, cache, file, folder = lines
    assert error.startswith("error: cannot get open_clip_pytorch_model.bin of ")
    assert f"{repo} from {constants.ENDPOINT}: {reason}; without the hub, use" in error
    assert "set HF_HOME to the copy" in cache
    assert "--model.pretrained FILE" in file
    assert "--model.clip local-dir:FOLDER" in folder
    assert all(repo in way for way in (cache, file, folder))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rft"])
    monkeypatch.setattr(product, "PAUSE", 0)


def test_a_name_that_nothing_resolves(monkeypatch, tmp_path, capsys):
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    ask_instead(monkeypatch, "http://hub.invalid", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    require_ways(complaint(capsys), "[Errno -2] Name or service not known")


def test_a_refused_connection(monkeypatch, tmp_path, capsys):
    ask_instead(monkeypatch, f"http://{ADDRESS}:{free_port()}", tmp_path)
    require_ways(complaint(capsys), "[Errno 111] Connection refused")


def test_a_server_that_never_answers(monkeypatch, tmp_path, capsys):
    asked = threading.Event()
    monkeypatch.setattr(product, "SECONDS", 0.2)
    with socket.create_server((ADDRESS, 0)) as silent:
        ask_instead(monkeypatch, f"http://{ADDRESS}:{silent.getsockname()[1]}", tmp_path)

        def accept() -> None:
            with silent.accept()[0] as connection:
                connection.recv(100)
                asked.set()
                connection.recv(100_000)  # until the client stops retrying
                connection.recv(1)

        thread = threading.Thread(target=accept)
        thread.start()
        lines = complaint(capsys)
        assert asked.is_set()
        thread.join()
    require_ways(lines, "no answer within 0.2 seconds")


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (404, 1), (500, 3), (503, 3)])
def test_a_server_that_refuses(hub: Hub, capsys, status, tries):  # noqa: F811
    hub.status = status
    require_ways(complaint(capsys), f"it answers {status}")
    # one name is requested, and only transient failures are retried
    assert hub.requests == tries * [f"HEAD /{REPO}/resolve/main/open_clip_pytorch_model.bin"]


def test_openais_weights_and_a_model_by_its_name_have_the_same_ways(hub: Hub, capsys):  # noqa: F811
    hub.status = 500
    lines = complaint(capsys, ModelConfig(clip="ViT-B-32-quickgelu", pretrained="openai"))
    require_ways(lines, "it answers 500", "timm/vit_base_patch32_clip_224.openai")
    hub.status = 0
    lines = complaint(capsys, ModelConfig(clip="hf-hub:no/model", pretrained=""))
    assert "cannot get open_clip_config.json of no/model from" in lines[0]
    assert "it answers 401" in lines[0]
    assert len(lines) == 4


def test_a_page_that_answers_everything_is_no_hub(monkeypatch, hub: Hub, capsys):  # noqa: F811
    hub.status = 200
    require_ways(complaint(capsys), "what answers is no model hub")


def test_offline_mode_is_not_repeated(monkeypatch, hub: Hub, capsys):  # noqa: F811
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (line, *ways) = complaint(capsys)
    assert "HF_HUB_OFFLINE" in line
    assert len(ways) == 3
    assert hub.requests == []


@pytest.mark.slow
def test_a_model_is_fetched_once_and_then_read_without_a_request(hub: Hub, tmp_path):  # noqa: F811
    formats.write_hub_folder(tmp_path / "tiny")
    names = ("open_clip_config.json", "open_clip_model.safetensors")
    hub.repositories["someone/tiny"] = {n: (tmp_path / "tiny" / n).read_bytes() for n in names}
    config = ModelConfig(clip="hf-hub:someone/tiny", pretrained="")
    found = load.load_clip(config)
    assert same(found.model.state_dict(), formats.build_clip().state_dict())
    assert (found.architecture.mean, found.architecture.quick_gelu) == ((0.5, 0.5, 0.5), True)
    assert load.architecture_of(config.clip) == found.architecture
    before = list(hub.requests)
    assert any(request.startswith("GET ") for request in before)
    assert product.fetch("someone/tiny") == product.fetch("someone/tiny", names[1])
    assert hub.requests == before


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_cached_file_of_a_tag_needs_no_hub(hub: Hub, name):  # noqa: F811
    hub.repositories[REPO] = {name: b"content"}
    tag = open_clip.get_pretrained_cfg(LAION.clip, LAION.pretrained)
    path = product.fetch_tag(tag)
    assert (path.name, path.read_bytes()) == (name, b"content")
    hub.status = 500
    assert product.fetch_tag(tag) == path


@pytest.mark.slow
@pytest.mark.usefixtures("known_models")
def test_a_tag_has_its_own_preprocessing(hub: Hub, monkeypatch, tmp_path):  # noqa: F811
    formats.write_hub_folder(tmp_path / "tiny")
    data = (tmp_path / "tiny" / "open_clip_model.safetensors").read_bytes()
    hub.repositories["someone/tiny"] = {"open_clip_model.safetensors": data}
    pixels = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bicubic"}
    tag = {"hf_hub": "someone/tiny/", "quick_gelu": True, **pixels, "resize_mode": "shortest"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, formats.NAME, {"tiny": tag})
    found = load.load_clip(ModelConfig(clip=formats.NAME, pretrained="tiny"))
    assert same(found.model.state_dict(), formats.build_clip().state_dict())
    assert (found.architecture.mean, found.architecture.std) == (tag["mean"], tag["std"])
