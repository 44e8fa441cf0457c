"""Coverage of objects by patch masks, compared with sets of pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.evaluate.coverage import Pixels, count_masked, count_object
from tests.conftest import build_model
from tests.evaluate.masks import blob
from tests.reference import pixels as reference

SUMS = ("masked", "both", "either")


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3, 7]), st.sampled_from([1, 2, 4]))
def test_counts_and_rates_equal_sets_of_pixels(seed, grid, side):
    rng = np.random.default_rng(seed)
    size, images = grid * side, 5
    objects_NHW = np.stack([blob(rng, size, size) for _ in range(images)])
    objects_NHW[2] = False  # the segmenter found nothing
    mask_TNP = torch.from_numpy(rng.random((2, images, grid * grid)) < 0.4)
    object_NP = count_object(torch.from_numpy(objects_NHW), grid * grid)
    masked_TN, both_TN = count_masked(mask_TNP, object_NP, side * side)
    assert {object_NP.dtype, masked_TN.dtype, both_TN.dtype} == {torch.int64}
    pixels = Pixels(
        image=size * size,
        object_N=object_NP.sum(dim=1).numpy(),
        masked_TN=masked_TN.numpy(),
        both_TN=both_TN.numpy(),
    ).with_object()
    for place, (mean, pooled) in enumerate(
        zip(pixels.mean_rates(), pixels.pooled().mean_rates(), strict=True)
    ):
        expected = reference.table_2(mask_TNP[place].tolist(), objects_NHW)
        assert len(pixels.object_N) == expected["images"] == images - 1
        assert pixels.object_N.sum() == expected["object"]
        assert pixels.masked_TN[place].sum() == expected["masked"]
        assert pixels.both_TN[place].sum() == expected["both"]
        assert pixels.either[place].sum() == expected["either"]
        assert mean._asdict() == pytest.approx(
            {name: expected[name] for name in mean._fields}, rel=1e-12
        )
        assert pooled.image_masking_rate == expected["masked"] / expected["image"]
        assert pooled.object_masking_rate == expected["both"] / expected["object"]
        assert pooled.iou == expected["both"] / expected["either"]


def test_sums_beyond_32_bits_are_exact():
    images = 100_000
    whole_N = np.full(images, 224 * 224 - 1, dtype=np.int64)
    pixels = Pixels(
        image=224 * 224, object_N=whole_N, masked_TN=whole_N[None], both_TN=whole_N[None]
    )
    assert pixels.either.sum() == images * (224 * 224 - 1) > 2**32
    assert pixels.pooled().mean_rates()[0].iou == 1


def test_patches_are_the_models_patches():
    # an image that is white at its object: the lit patches must be the object's
    model, rng = build_model(), np.random.default_rng(0)
    objects_BHW = torch.from_numpy(np.stack([blob(rng, 16, 16) for _ in range(20)]))
    images_BCHW = objects_BHW[:, None].expand(-1, 3, -1, -1).to(torch.uint8) * 255
    black_V = model.patches(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0, 0]
    lit_BP = (model.patches(images_BCHW) != black_V).any(dim=2)
    assert 0 < lit_BP.sum() < lit_BP.numel()
    assert (lit_BP == (count_object(objects_BHW, 16) > 0)).all()
