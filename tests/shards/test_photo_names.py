"""The source file of each sample of own photos."""

import pytest

from rft.shards import photo_names
from rft.shards.folder import PHOTOS


def test_paths_of_any_letters_are_read_as_written(tmp_path):
    names = {"gr__e": "c/größe.jpg", "_": "日本/\n\u2028.png", "=1": '=HYPERLINK("x")'}
    photo_names.write(str(tmp_path), names.items())
    assert photo_names.read(str(tmp_path)) == names


def test_a_set_of_other_images_has_none(tmp_path):
    assert photo_names.read(str(tmp_path)) == {}


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"key": "a"}', b"\xff", b"[" * 100_000])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / PHOTOS).write_bytes(b'{"key": "a", "path": "b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"{PHOTOS}, line 2, is not a photo: .*pack again$"):
        photo_names.read(str(tmp_path))
