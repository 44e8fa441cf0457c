"""Files of features: after any fault, a row is either correct or missing."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rft.loading.features import FeatureFile, FeatureFolder, record_bytes
from tests import tiny

ROWS, WIDTH = 40, 6
SIZE = ROWS * record_bytes(WIDTH)
KEY = {"tower": "a"}


def rows(numbers) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)[numbers]


def lines(capsys) -> list[str]:
    out, err = capsys.readouterr()
    return [tiny.unstamped(line) for line in (out + err).splitlines()]


def opened(folder: Path, key: dict = KEY, limit: int = SIZE, size: int = ROWS) -> FeatureFile:
    file = FeatureFolder(folder, limit).open(key, size, WIDTH)
    assert file is not None
    return file


@pytest.fixture
def file(tmp_path) -> Iterator[FeatureFile]:
    """A file with its even rows, written in random order."""
    file = opened(tmp_path)
    file.keep(np.array([8, 2, 4, 6]), rows([8, 2, 4, 6]))
    file.keep(np.array([0, *range(10, ROWS, 2)]), rows([0, *range(10, ROWS, 2)]))
    yield file
    file.close()


def test_rows_come_back_and_others_are_missing(file, tmp_path, capsys):
    for reader in (file, opened(tmp_path)):
        for numbers in (np.arange(ROWS), np.array([5, 4, 39, 38, 0, 4])):
            found, whole = reader.read(numbers)
            assert whole.tolist() == (numbers % 2 == 0).tolist()
            assert np.array_equal(found[whole], rows(numbers[whole]))
    assert lines(capsys) == []


def test_a_refused_read_is_one_warning_and_no_row(file, monkeypatch, capsys):
    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "preadv", stale)
    for _ in range(2):
        found, whole = file.read(np.array([0, 2]))
        assert found.shape == (2, WIDTH)
        assert not whole.any()
    (line,) = lines(capsys)
    assert line.startswith(f"WARNING: features cannot be read from {file.path}: ")
    assert file.failed


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4 * record_bytes(WIDTH) + 9] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    data, each = bytearray(path.read_bytes()), record_bytes(WIDTH)
    data[4 * each : 5 * each], data[6 * each : 7 * each] = (
        data[6 * each : 7 * each],
        data[4 * each : 5 * each],
    )
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, 5 * record_bytes(WIDTH) - 1)


@pytest.mark.parametrize(
    ("spoil", "missing", "warns"),
    [(flip, [4], True), (swap, [4, 6], True), (truncate, range(6, ROWS, 2), True)],
)
def test_what_is_damaged_while_the_file_is_open_is_missing(file, capsys, spoil, missing, warns):
    spoil(file.path)
    numbers = np.arange(0, ROWS, 2)
    found, whole = file.read(numbers)
    expected = set(missing) | ({4} if spoil is truncate else set())
    assert set(numbers[~whole].tolist()) == expected
    assert np.array_equal(found[whole], rows(numbers[whole]))
    assert any("damaged or from a different file" in line for line in lines(capsys)) == warns
    # and is as good as before after it is rewritten
    file.keep(numbers, rows(numbers))
    found, whole = file.read(numbers)
    assert whole.all()
    assert np.array_equal(found, rows(numbers))


def test_a_deleted_file_stays_readable_and_a_new_one_is_empty(file, tmp_path):
    shutil.rmtree(tmp_path)
    assert file.read(np.array([2]))[1].all()
    assert not opened(tmp_path).read(np.array([2]))[1].any()


def test_rows_of_a_different_key_are_missing(file, tmp_path, capsys):
    other = opened(tmp_path, {"tower": "b"}, limit=2 * SIZE)
    shutil.copyfile(file.path, other.path)
    assert not other.read(np.arange(ROWS))[1].any()
    assert "20 of 40 rows" in " ".join(lines(capsys))


@pytest.mark.parametrize("size", [1, SIZE - 1, SIZE + 1])
def test_a_file_of_a_different_size_is_cleared(file, tmp_path, capsys, size):
    os.truncate(file.path, size)
    assert not opened(tmp_path).read(np.arange(ROWS))[1].any()
    assert f"has {size:,} bytes instead of {SIZE:,}" in " ".join(lines(capsys))


def test_the_limit_holds(tmp_path, capsys):
    assert FeatureFolder(tmp_path, SIZE - 1).open(KEY, ROWS, WIDTH) is None
    assert "are not kept" in " ".join(lines(capsys))
    first, second = (opened(tmp_path, {"tower": n}, 2 * SIZE) for n in (1, 2))
    # both are open, so neither may be removed
    assert FeatureFolder(tmp_path, 2 * SIZE).open(KEY, ROWS, WIDTH) is None
    second.close()
    (tmp_path / "notes.txt").write_text("of somebody else")
    third = opened(tmp_path, limit=2 * SIZE)
    assert {path.name for path in tmp_path.iterdir()} == {
        first.path.name,
        third.path.name,
        "notes.txt",
    }


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to write beyond 4 MB of a file, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refused_write_is_one_warning_and_no_row(tmp_path, capsys, request):
    far = 4_000_000 // record_bytes(WIDTH) + 5
    file = opened(tmp_path, limit=10**9, size=far + 1)
    request.getfixturevalue("small_files")
    for _ in range(3):
        file.keep(np.array([1, far]), rows([1, 2]))
    assert file.failed
    assert file.read(np.array([1, far]))[1].tolist() == [True, False]
    (line,) = lines(capsys)
    assert "cannot be written" in line
    assert str(file.path) in line


def test_links_are_not_used_and_a_file_is_no_folder(tmp_path, file, capsys):
    aside = tmp_path / "aside"
    aside.mkdir()
    path = aside / file.path.name
    path.symlink_to(file.path)
    assert FeatureFolder(aside, SIZE).open(KEY, ROWS, WIDTH) is None
    assert "is a link" in " ".join(lines(capsys))
    for path in (file.path, file.path / "below"):
        with pytest.raises(ValueError, match="is a file; name a different folder"):
            FeatureFolder(path, SIZE).open(KEY, ROWS, WIDTH)
    FeatureFolder(aside, SIZE).clear()
    assert file.read(np.array([2]))[1].all()
