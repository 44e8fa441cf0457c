"""Utilities shared by many tests."""

import contextlib
import gc
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from benchmarks import tiny_world
from benchmarks.servers.loopback import NotHereError
from rft import dist, log
from rft.clip.architecture import Architecture
from rft.clip.classifier import Classifier
from rft.clip.load import PretrainedClip, WordTokenizer
from rft.config import MethodConfig
from rft.storage import urls
from rft.train import texts
from rft.train.texts import Texts
from tests import tiny
from tests.servers import bucket, store  # noqa: F401
from tests.slowness import (  # noqa: F401
    pytest_addoption,
    pytest_fixture_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

# as in a command; functions that tests call themselves log too
log.setup()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """Skip tests that need something this machine lacks; fixtures detect it."""
    try:
        return (yield)
    except NotHereError as reason:
        pytest.skip(str(reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip as above if the test itself detects it."""
    try:
        return (yield)
    except NotHereError as reason:
        pytest.skip(str(reason))


# a remote store without a server; product code never opens it, see tests/storage/test_urls.py
urls.PROTOCOLS = (*urls.PROTOCOLS, "memory")

# the tensors are tiny: more threads only wait for each other and for other tests' processes
torch.set_num_threads(1)

# if a script or nohup started the tests in the background, they and their children would ignore
# these signals
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# the same examples each time, however slow the machine: a failure is of the change before it. For
# others: pytest --hypothesis-profile explore
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("same")

ARCHITECTURE = Architecture(
    clip="test",
    embed_dim=12,
    vision_cfg={
        "layers": 3,
        "width": 32,
        "head_width": 8,
        "patch_size": 4,
        "image_size": 16,
        "mlp_ratio": 2.0,
    },
    quick_gelu=True,
    mean=(0.48, 0.46, 0.41),
    std=(0.27, 0.26, 0.28),
)


def build_model(seed: int = 0, classes: int = 5) -> Classifier:
    """A tiny random classifier with logits of CLIP's scale."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        visual = ARCHITECTURE.build_visual()
        for parameter in visual.parameters():
            nn.init.normal_(parameter, std=0.15)
        head = nn.Linear(ARCHITECTURE.embed_dim, classes)
        nn.init.normal_(head.weight, std=30 / ARCHITECTURE.embed_dim**0.5)
        nn.init.zeros_(head.bias)
    return Classifier(visual, head, ARCHITECTURE)


TEMPLATES = ("a {c}", "the {c}", "{c}")
NAMES = ("red", "green", "blue", "grey", "a blue grey")  # the last one makes the longest prompt
VOCABULARY = ("", "<start>", "a", "the", "red", "green", "blue", "grey", "<end>")


def build_clip(seed: int = 0) -> PretrainedClip:
    """A tiny random CLIP whose text tower has features as wide as `build_model`'s."""
    text: Any = {"context_length": 12, "vocab_size": len(VOCABULARY), "width": 16, "heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(ARCHITECTURE.embed_dim, ARCHITECTURE.vision_cfg, {**text, "layers": 2})
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return PretrainedClip(model.eval(), WordTokenizer(VOCABULARY, 12), ARCHITECTURE)


def build_texts(method: MethodConfig) -> Texts:
    """The inputs of a method beside the models of `build_model`, from the tiny CLIP."""
    return texts.build(build_clip(), NAMES, TEMPLATES, method)


def sharpen(model: Classifier) -> Classifier:
    """Make the last layer distinguish patches: its maps differ, and GradCAM has negative values."""
    with torch.no_grad():
        attention = model.visual.transformer.resblocks[-1].attn
        attention.in_proj_weight[: 2 * attention.embed_dim] *= 8  # queries and keys
    return model


@pytest.fixture
def images_BCHW() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.fixture
def labels_B() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 1])


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Data root of the tiny world's shards."""
    return tiny_world.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    """Name of the tiny world's CLIP."""
    return tiny_world.write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def train(tiny_data, tiny_clip, tmp_path):
    """Train a recipe on the tiny world (`tiny.train`); returns the run folder."""

    def run(recipe: str, *options: object, name: str = "") -> Path:
        return tiny.train(recipe, tiny_data, tiny_clip, tmp_path / (name or recipe), *options)

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command line in this process; return its one-line error."""

    def run(command, *arguments: object, **variables: str) -> str:
        capsys.readouterr()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stopped:
            tiny.call(command, *arguments)
        assert stopped.value.code == 2
        lines = tiny.complaints(capsys.readouterr().err)
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def terminal(monkeypatch):
    """Make stdout and stderr one terminal; the context yields a function that reads it."""

    @contextlib.contextmanager
    def open_terminal(columns: int):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        master, slave = os.openpty()
        drawn = b""

        def text() -> str:
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
            return shown.replace("\r\n", "\n").replace("\r", "\n")

        with open(slave, "w") as stream:  # noqa: PTH123 (a descriptor)
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "stderr", stream)
            try:
                yield text
                stream.flush()
                while select.select([master], [], [], 0.2)[0]:  # it comes in pieces
                    drawn += os.read(master, 100_000)
            finally:
                monkeypatch.undo()
        os.close(master)

    return open_terminal


@pytest.fixture
def disagreeing(monkeypatch):
    """Let the other rank have a different value wherever `what` is compared."""

    def on(what: str) -> None:
        real = dist.require_agreement

        def compare(world, name, value, *rest):
            if name != what:
                return real(world, name, value, *rest)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "gather_objects", lambda _, value: [value, "another"])
                return real(world, name, value, *rest)

        monkeypatch.setattr(dist, "require_agreement", compare)

    return on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # these wait for minutes; started last, they would run alone at the end
    waiting = Path(__file__).parent / "launch"
    items.sort(key=lambda item: not item.path.is_relative_to(waiting))


def pytest_collection_finish() -> None:
    """Exclude the objects of all imports from later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Restore them for libraries that count their objects at exit."""
    gc.unfreeze()
