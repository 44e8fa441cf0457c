"""A short run of each fuzzer with fixed examples; `make fuzz` is the long one."""

import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.hostile.fuzz import engine, guard
from tests.hostile.fuzz.targets import TARGETS

TRIES = 60


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str, made_world: Path, tmp_path: Path) -> None:
    target = TARGETS[name](made_world / "work", tmp_path)
    counts = engine.Counts()
    engine.explore(target, tmp_path, counts, tries=TRIES, seed=0, known=frozenset())
    assert counts.accepted, "nothing valid was among the tries"
    assert counts.refused, "nothing was refused"


def endless() -> None:
    while True:
        pass


HARM = {
    "a file outside": lambda folder: (folder.parent / "outside").write_text("x"),
    "a file moved away": lambda folder: (
        (folder / "..").resolve().joinpath("x").rename(folder / "x")
    ),
    "a folder outside": lambda folder: (folder.parent / "outside").mkdir(),
    "a process": lambda _: subprocess.run(["true"], check=True),
    "a connection": lambda _: socket.getaddrinfo("host.invalid", 80),
    "a bug": lambda _: {}["x"],
    "no end": lambda _: endless(),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HARM)
def test_harm_is_noticed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzers would detect each kind of harm, and the harm is prevented."""
    monkeypatch.setattr(guard, "CPU_SECONDS", 0.1)
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "x").touch()
    counts = engine.Counts()
    target = engine.Target(st.none(), lambda _: HARM[what](inside))
    with pytest.raises(engine.CrashError, match="KeyError" if what == "a bug" else "Harm"):
        engine.attempt(target, None, inside, counts, "0")
    assert counts.crashes.total() == counts.tries == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "x"]


def test_a_refusal_and_an_answer_are_counted(tmp_path: Path) -> None:
    def check(number: int) -> None:
        if number > 10:
            raise ValueError(number)

    counts = engine.Counts()
    target = engine.Target(st.integers(0, 20), check, (0, 20))
    engine.explore(target, tmp_path, counts, tries=50, seed=1, known=frozenset())
    assert counts.tries == counts.refused + counts.accepted
    assert min(counts.refused, counts.accepted) > 0
    assert not counts.crashes
