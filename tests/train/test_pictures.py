"""The picture of what a step distilled on, pixel by pixel."""

import torch

from rft.clip import vit
from rft.method import refill
from rft.train import pictures
from rft.train.pictures import Counterfactuals, grid, join_patches

SIDE, SIZE, TIMES = 8, 16, pictures.TILE // 16


def tile(picture_CHW: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """One image of the grid, at its own size: a line of one pixel lies before each."""
    small = picture_CHW[:, ::TIMES, ::TIMES]
    top, left = 1 + row * (SIZE + 1), 1 + column * (SIZE + 1)
    return small[:, top : top + SIZE, left : left + SIZE]


def test_patches_are_put_together_as_they_were_cut(images_BCHW):
    assert torch.equal(join_patches(vit.cut_patches(images_BCHW, 4), 4), images_BCHW)


def test_every_patch_is_where_its_donor_says(images_BCHW):
    # images 4 and 5 of a pool of 6, four patches each: kept, refilled from two images, dropped
    donor_BP = torch.tensor([[4, 0, 1, refill.DROP], [5, 5, 5, 2]])
    picture = grid(Counterfactuals(images_BCHW, donor_BP, torch.tensor([[4], [5]])), SIDE)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, TIMES * (3 * (SIZE + 1) + 1), TIMES * (2 * (SIZE + 1) + 1))
    assert (picture[:, :TIMES] == 255).all()
    for column, own in enumerate((4, 5)):
        assert torch.equal(tile(picture, 0, column), images_BCHW[own])
        masks = vit.cut_patches(tile(picture, 1, column)[None], SIDE)[0]
        shown = vit.cut_patches(tile(picture, 2, column)[None], SIDE)[0]
        for patch, donor in enumerate(donor_BP[column].tolist()):
            color = pictures.LIGHT if donor == own else pictures.DARK
            assert (masks[patch] == color).all()
            if donor == refill.DROP:
                assert (shown[patch] == pictures.GREY).all()
            else:
                expected = vit.cut_patches(images_BCHW[donor : donor + 1], SIDE)[0, patch]
                assert torch.equal(shown[patch], expected)


def test_no_more_columns_than_can_be_seen(images_BCHW):
    pool = images_BCHW.repeat(2, 1, 1, 1)
    own_B1 = torch.arange(len(pool))[:, None]
    picture = grid(Counterfactuals(pool, own_B1.expand(-1, 4), own_B1), SIDE)
    assert picture.shape[-1] == TIMES * (pictures.COLUMNS * (SIZE + 1) + 1)
