"""`--loader.augment`: random crops and flips, determined by seed, epoch and image id alone."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from rft.loading.augment import Augmentation, Draw
from rft.loading.batches import EvaluationBatches, TrainingBatches
from rft.loading.dataset import PackedDataset
from rft.loading.read import read_batches
from rft.packing.pack import Options, pack
from rft.shards.label_space import LabelSpace
from tests.ranks.loading import CPU, plan_of
from tests.reference.augment import crop_flip

LABELS = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("{c}",))
SIZE = 24
AREA, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)  # the specification, reimplemented
SHAPES = ((37, 30), (30, 37), (24, 24), (41, 19), (15, 60), (9, 11), (100, 1), (1, 100))
SLOW = pytest.mark.slow  # where loader processes start


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in SHAPES
    ]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, PackedDataset]:
    """The same images as files, as JPEG squares and as pixels, in shards of several sizes."""
    root, rng = tmp_path_factory.mktemp("augment"), np.random.default_rng(1)
    for number in range(26):
        path = root / "train" / LABELS.ids[number % 2] / f"{LABELS.ids[number % 2]}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*rng.integers(26, 44, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return {encoding: _packed(root, encoding) for encoding in ("original", "jpeg", "pixels")}


def _packed(root: Path, encoding: str) -> PackedDataset:
    megabytes = {"original": 0.02, "jpeg": 0.01, "pixels": 0.05}[encoding]
    options = Options(encoding=encoding, size=SIZE, shard_mb=megabytes, workers=1)
    pack("imagenet-train", str(root), str(root / encoding), LABELS, options)
    return PackedDataset(str(root / encoding / "imagenet-train"))


def batches(packed: PackedDataset, batch: int = 6, rank: int = 0, ranks: int = 1, seed: int = 3):
    return TrainingBatches(
        packed,
        np.arange(len(packed)),
        plan_of(packed, batch, 1, 0),
        image_size=SIZE,
        rank=rank,
        world_size=ranks,
        augment_seed=seed,
    )


def seen(all_ranks: list[TrainingBatches], steps: range, workers: int) -> dict[str, bytes]:
    """The pixels of each image in some steps, by its id."""
    found = {}
    for one in all_ranks:
        for batch in read_batches(one, steps, workers=workers, device=CPU):
            for sample, image_CHW in zip(batch.samples_B.tolist(), batch.images_BCHW, strict=True):
                assert one.packed.key(sample) not in found
                found[one.packed.key(sample)] = image_CHW.numpy().tobytes()
    return found


def draws(width: int, height: int, count: int) -> Iterator[Draw]:
    return (Augmentation(0, epoch).draw("n01_1", width, height) for epoch in range(count))


def test_it_is_torchvisions_pixel_by_pixel(images):
    flips = set()
    for image in images:
        for epoch in range(8):
            augmentation = Augmentation(5, epoch)
            *box, flip = augmentation.draw("n01_7", *image.size)
            flips.add(flip)
            found = augmentation.pixels(image, "n01_7", SIZE)
            assert np.array_equal(found, crop_flip(image, tuple(box), SIZE, flip))
    assert flips == {False, True}


def test_the_border_is_cut_first(images):
    image, augmentation = images[0], Augmentation(5, 0)
    inner = image.crop((3, 3, image.width - 3, image.height - 3))
    expected = augmentation.pixels(inner, "a", SIZE)
    assert np.array_equal(augmentation.pixels(image, "a", SIZE, border=3), expected)
    with pytest.raises(ValueError, match="is all border"):
        augmentation.pixels(image, "a", SIZE, border=15)


@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
    st.text(),
)
def test_every_crop_is_inside_and_nearly_the_whole(width, height, seed, epoch, key):
    left, top, wide, high, flip = Augmentation(seed, epoch).draw(key, width, height)
    assert 0 <= left <= left + wide <= width
    assert 0 <= top <= top + high <= height
    assert wide >= 1
    assert high >= 1
    assert isinstance(flip, bool)
    # sides are whole pixels, so each may be off by half a pixel
    slack = (wide + high) / 2 + 1
    fits = RATIO[0] <= width / height <= RATIO[1]
    if fits:
        assert AREA[0] * width * height - slack <= wide * high <= width * height
    else:
        # if no crop of that ratio is so large, the largest is taken, or a larger one
        ratio = RATIO[0] if width < height else RATIO[1]
        largest = width * width / ratio if width < height else height * height * ratio
        assert wide * high >= min(AREA[0] * width * height, largest) - slack


def test_crops_are_distributed_as_torchvisions():
    count = 4000
    for width, height in ((60, 60), (80, 60), (50, 75), (120, 50)):
        ours = np.array([(*one[:4],) for one in draws(width, height, count)])
        image = torch.empty(3, height, width)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = [
                RandomResizedCrop.get_params(image, list(AREA), list(RATIO)) for _ in range(count)
            ]
        # theirs: top, left, height, width
        theirs = np.array(theirs)[:, [1, 0, 3, 2]]
        spread = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / count)
        assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4 * spread).all()
        assert np.allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.1, atol=0.1)
        flips = np.mean([one.flip for one in draws(width, height, count)])
        assert abs(flips - 0.5) < 0.04


@pytest.mark.parametrize("encoding", ["original", "jpeg"])
@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 0), (2, 0), (3, 0), pytest.param(1, 2, marks=SLOW), pytest.param(2, 1, marks=SLOW)],
)
def test_ranks_and_loader_processes_do_not_matter(packed, encoding, ranks, workers):
    dataset = packed[encoding]
    epoch = range(4, 8)  # the second epoch: 26 images are four batches of six
    alone = seen([batches(dataset)], epoch, 0)
    assert len(alone) == 24
    assert (
        seen([batches(dataset, 6, rank, ranks) for rank in range(ranks)], epoch, workers) == alone
    )
    # nor if an epoch is entered half way: a resumed run reads its remainder
    for rank in range(ranks):
        rest = seen([batches(dataset, 6, rank, ranks)], epoch[2:], workers)
        assert rest.items() <= alone.items()


def test_batches_and_packing_do_not_matter(packed):
    """Different batches contain the same pixels; single-image batches cover both epochs."""
    dataset = packed["original"]
    singly = seen([batches(dataset, 1)], range(26, 52), 0)
    assert len(singly) == 26
    assert seen([batches(dataset)], range(4, 8), 0).items() <= singly.items()
    for sample in range(len(dataset)):
        image = dataset.picture(sample, dataset.payload(sample))
        pixels = Augmentation(3, 1).pixels(image, dataset.key(sample), SIZE)
        assert singly[dataset.key(sample)] == pixels.tobytes()


def test_epochs_and_seeds_differ(packed):
    dataset = packed["original"]
    first, second = (seen([batches(dataset, 1)], range(n, n + 26), 0) for n in (0, 26))
    other = seen([batches(dataset, 1, seed=4)], range(26), 0)
    plain = {dataset.key(n): dataset.image(n, SIZE).tobytes() for n in range(len(dataset))}
    for one, two in ((first, second), (first, other), (first, plain)):
        assert one.keys() == two.keys()
        assert sum(one[key] == two[key] for key in one) <= 1
    # each image has draws of its own
    assert len({Augmentation(0, 0).draw(dataset.key(n), 60, 60) for n in range(26)}) >= 15


def test_only_training_images_are_augmented(packed):
    dataset = packed["original"]
    everything = np.arange(len(dataset))
    held_out = EvaluationBatches(dataset, everything, image_size=SIZE, batch_size=8)
    found = chain.from_iterable(
        batch.images_BCHW.clone()
        for batch in read_batches(held_out, range(4), workers=0, device=CPU)
    )
    for sample, image_CHW in enumerate(found):
        assert np.array_equal(image_CHW.numpy(), dataset.image(sample, SIZE))


def test_pixels_are_refused_with_the_reason(packed):
    with pytest.raises(ValueError, match="is copied into the batch and never decoded") as caught:
        packed["pixels"].require_decoded("--loader.augment crop-flip")
    assert str(caught.value) == (
        "--loader.augment crop-flip crops each image anew in each epoch, but "
        f"{packed['pixels'].url} holds the model's input itself (--encoding pixels), which is "
        "copied into the batch and never decoded; pack the set with --encoding original, or leave "
        "the option out"
    )
    packed["original"].require_decoded("")
    packed["jpeg"].require_decoded("")
