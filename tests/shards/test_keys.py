"""Keys are distinct, or refused; tests/packing/test_sources.py tests their names."""

import pytest

from rft.shards.keys import make_keys


def test_a_path_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^image a/x\.jpg is listed twice; remove one"):
        make_keys(["a/y.jpg", "a/x.jpg", "a/x.jpg"])
