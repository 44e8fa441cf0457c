"""Weight interpolation."""

import pytest
import torch

from rft.method.averaging import interpolate


def test_ends_are_exact_and_the_middle_is_the_mean():
    start, end = {"w": torch.randn(4), "b": torch.randn(2)}, {}
    end = {name: value + torch.randn_like(value) for name, value in start.items()}
    for name in start:
        assert torch.equal(interpolate(start, end, 0.0)[name], start[name])
        assert torch.equal(interpolate(start, end, 1.0)[name], end[name])
        middle = interpolate(start, end, 0.5)[name]
        torch.testing.assert_close(middle, (start[name] + end[name]) / 2)


def test_unlike_models_are_refused():
    with pytest.raises(ValueError, match="only one of them has 'b'"):
        interpolate({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        interpolate({"a": torch.ones(1)}, {"a": torch.ones(2)}, 0.5)
