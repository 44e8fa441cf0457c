"""The sandbox, and one world for all processes of a test run."""

from pathlib import Path

import pytest

from tests.hostile import world
from tests.hostile.sandbox import Sandbox

started: list[Sandbox] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fork the sandbox before the first test, while this process has no threads of a test."""
    here = Path(__file__).parent
    if not session.config.option.collectonly and any(
        here in item.path.parents for item in session.items
    ):
        started.append(Sandbox())


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    return started[0]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def packed_world(shared: Path, sandbox: Sandbox) -> Path:
    return world.once(shared / "hostile-world", "packed", lambda root: world.pack(root, sandbox))


@pytest.fixture(scope="session")
def trained_world(packed_world: Path, sandbox: Sandbox) -> Path:
    return world.once(packed_world, "trained", lambda root: world.train(root, sandbox))


@pytest.fixture(scope="session")
def made_world(trained_world: Path, sandbox: Sandbox) -> Path:
    """The valid world, which tests must not write to."""
    return world.once(trained_world, "finished", lambda root: world.finish(root, sandbox))
