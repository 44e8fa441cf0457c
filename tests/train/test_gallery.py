"""The gallery of a run: every mask and fill of the selected model, by the textbook."""

import numpy as np
import pytest
import torch

from rft import recipes, rng
from rft.loading.dataset import PackedDataset
from rft.runs import gallery as gallery_file
from rft.train.gallery import one_of_each_class, write_gallery
from tests import tiny
from tests.conftest import build_model
from tests.reference import textbook

SAMPLES = np.array([3, 30, 40, 60])


@pytest.fixture(scope="module")
def gallery(tiny_data, tmp_path_factory) -> dict[str, np.ndarray]:
    packed = PackedDataset(f"{tiny_data}/imagenet-train")
    path = tmp_path_factory.mktemp("gallery") / "gallery.npz"
    model = build_model(classes=len(tiny.LABELS.ids))
    write_gallery(str(path), model, packed, SAMPLES, recipes.masked_methods())
    with np.load(path) as columns:
        return {**columns, "packed": packed}


@pytest.fixture(scope="module")
def relevance_BP(gallery) -> torch.Tensor:
    model = build_model(classes=len(tiny.LABELS.ids))
    images = textbook.normalise_images(model, torch.from_numpy(gallery["images_BCHW"]))
    maps = [
        textbook.relevance(model, image, int(label))
        for image, label in zip(images, gallery["labels_B"], strict=True)
    ]
    return torch.stack([cam_P / (cam_P.max() + 1e-8) for cam_P in maps])


def test_it_shows_the_images_with_their_labels_and_maps(gallery, relevance_BP):
    packed = gallery["packed"]
    for place, sample in enumerate(SAMPLES):
        assert (gallery["images_BCHW"][place] == packed.image(int(sample), tiny.SIZE)).all()
        assert gallery["labels_B"][place] == packed.index.label[sample]
    assert gallery["class_names"].tolist() == list(tiny.COLOURS)
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
    model = build_model(classes=len(tiny.LABELS.ids))
    monkeypatch.setattr(gallery_file, "SIDE", tiny.SIZE - 1)
    write_gallery(str(tmp_path / "gallery.npz"), model, packed, SAMPLES, {})
    assert f"no picture of masks and fills: images_BCHW is 4 images of {tiny.SIZE} pixels" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_one_image_of_each_class_spread_over_the_classes():
    labels = np.array([9, 2, 2, 5, 9, 7, 5, 0])
    samples = np.array([0, 2, 3, 4, 5, 6])  # of the classes 9, 2, 5, 9, 7, 5
    assert one_of_each_class(labels, samples, 8).tolist() == [2, 3, 5, 0]
    assert one_of_each_class(labels, samples, 2).tolist() == [2, 0]
    assert one_of_each_class(labels, samples, 3).tolist() == [2, 3, 0]
