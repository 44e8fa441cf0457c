"""The picture of a step's counterfactuals, pixel by pixel; and a run's gallery, by the textbook."""

import numpy as np
import pytest
import torch

from benchmarks import tiny_world
from rft import recipes, rng
from rft.clip import vit
from rft.loading.dataset import PackedDataset
from rft.method import refill
from rft.runs import gallery_file
from rft.train import pictures
from rft.train.pictures import Counterfactuals, grid, join_patches, one_of_each_class, write_gallery
from tests.conftest import build_model
from tests.reference import textbook

SIDE, SIZE, TIMES = 8, 16, pictures.TILE // 16
SAMPLES = np.array([3, 30, 40, 60])


def tile(picture_CHW: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """One image of the grid, at its own size: a line of one pixel precedes each."""
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


@pytest.fixture(scope="module")
def gallery(tiny_data, tmp_path_factory) -> dict[str, np.ndarray]:
    packed = PackedDataset(f"{tiny_data}/imagenet-train")
    path = tmp_path_factory.mktemp("gallery") / "gallery.npz"
    model = build_model(classes=len(tiny_world.LABELS.ids))
    write_gallery(str(path), model, packed, SAMPLES, recipes.MASKED, {})
    with np.load(path) as columns:
        return {**columns, "packed": packed}


@pytest.fixture(scope="module")
def relevance_BP(gallery) -> torch.Tensor:
    model = build_model(classes=len(tiny_world.LABELS.ids))
    images = textbook.normalise_images(model, torch.from_numpy(gallery["images_BCHW"]))
    maps = [
        textbook.relevance(model, image, int(label))
        for image, label in zip(images, gallery["labels_B"], strict=True)
    ]
    return torch.stack([cam_P / (cam_P.max() + 1e-8) for cam_P in maps])


def test_it_shows_the_images_with_their_labels_and_maps(gallery, relevance_BP):
    packed = gallery["packed"]
    for place, sample in enumerate(SAMPLES):
        assert (gallery["images_BCHW"][place] == packed.image(int(sample), tiny_world.SIZE)).all()
        assert gallery["labels_B"][place] == packed.index.label[sample]
    assert gallery["class_names"].tolist() == list(tiny_world.COLOURS)
    assert gallery["patch"] == 4
    np.testing.assert_allclose(gallery["relevance_BP"], relevance_BP, rtol=1e-4, atol=1e-5)


def test_each_donor_map_is_its_recipes(gallery, relevance_BP):
    own_B1 = torch.arange(4)[:, None]
    shift = torch.randint(1, 4, (4, 16), generator=rng.torch_generator(0, "fill", 0, 0, 0))
    fills = {
        "no": torch.tensor([[-1]]),
        "single": torch.randperm(4, generator=rng.torch_generator(0, "fill", 0, 0, 0))[:, None],
        "multi": (own_B1 + shift) % 4,
    }
    found = {name for name in gallery if name.startswith("donor/")}
    masks = [(mask, fill) for mask in ("object", "context") for fill in fills]
    assert found > {f"donor/{mask}-mask-{fill}-fill" for mask, fill in masks}
    assert len(found) == 9
    for mask, fill in masks:
        threshold = recipes.build(f"{mask}-mask-{fill}-fill").method.threshold
        object_BP = relevance_BP > threshold
        masked_BP = object_BP if mask == "object" else ~object_BP
        expected = torch.where(masked_BP, fills[fill], own_B1)
        assert (gallery[f"donor/{mask}-mask-{fill}-fill"] == expected.numpy()).all(), (mask, fill)


def test_none_is_written_that_no_report_would_draw(tiny_data, tmp_path, monkeypatch, capsys):
    packed = PackedDataset(f"{tiny_data}/imagenet-train")
    model = build_model(classes=len(tiny_world.LABELS.ids))
    monkeypatch.setattr(gallery_file, "SIDE", tiny_world.SIZE - 1)
    write_gallery(str(tmp_path / "gallery.npz"), model, packed, SAMPLES, {}, {})
    assert (
        f"no picture of masks and fills: images_BCHW is 4 images of {tiny_world.SIZE} pixels"
        in (capsys.readouterr().err)
    )
    assert not list(tmp_path.iterdir())


def test_one_image_of_each_class_spread_over_the_classes():
    labels = np.array([9, 2, 2, 5, 9, 7, 5, 0])
    samples = np.array([0, 2, 3, 4, 5, 6])  # of the classes 9, 2, 5, 9, 7, 5
    assert one_of_each_class(labels, samples, 8).tolist() == [2, 3, 5, 0]
    assert one_of_each_class(labels, samples, 2).tolist() == [2, 0]
    assert one_of_each_class(labels, samples, 3).tolist() == [2, 3, 0]
