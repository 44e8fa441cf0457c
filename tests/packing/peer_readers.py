"""Third-party readers on our shards: python -m tests.packing.peer_readers PEER OUT FOLDER...

Each child process writes the samples it received, in order, to OUT/<number of the folder>.npz:
labels and images (uint8, 3 x SIZE x SIZE) as the peer's own code delivers them. Run by
test_peers.py, with the peer's versions of its dependencies first on the path.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from rft.shards.images import clip_pixels

SIZE = 16
Pair = tuple[int, np.ndarray]


def read_webdataset(folder: Path) -> Iterator[Pair]:
    """webdataset's own pipeline, in two loader processes."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    data = data.to_tuple("jpg;png;webp;npy", "cls", "json")
    for image, label, description in webdataset.WebLoader(data, batch_size=None, num_workers=2):
        assert description["path"].startswith("n0")
        # the loader converts arrays to tensors
        yield label, as_pixels(image) if isinstance(image, Image.Image) else np.asarray(image)


def read_timm(folder: Path) -> Iterator[Pair]:
    """timm's create_dataset, which takes the shards' names from _info.json."""
    from timm.data import create_dataset

    split = "train" if folder.name.endswith("-train") else "validation"
    data = create_dataset("wds/", root=str(folder), split=split, is_training=False)
    assert len(data) > 0
    for image, label in data:
        yield label, as_pixels(image)


CAPTIONS = ("one", "two", "three")  # of the classes in test_peers.py


def read_open_clip(folder: Path) -> Iterator[Pair]:
    """open_clip's training data, one epoch; the number of samples comes from sizes.json."""
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    last = sorted(folder.glob("*.tar"))[-1].stem
    arguments = Namespace(
        train_data=f"{folder}/{{000000..{last}}}.tar",
        train_num_samples=None,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=1,
        workers=0,
        world_size=1,
    )
    transform = image_transform(SIZE, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    data = get_wds_dataset(
        arguments, transform, is_train=True, tokenizer=lambda text: [CAPTIONS.index(text)]
    )
    for images_BCHW, labels in data.dataloader:
        yield int(labels[0]), (images_BCHW[0] * 255).round().byte().numpy()


READERS = {"webdataset": read_webdataset, "timm": read_timm, "open_clip": read_open_clip}


def as_pixels(image: Image.Image) -> np.ndarray:
    return clip_pixels(image.convert("RGB"), SIZE)


def main() -> None:
    peer, out, *folders = sys.argv[1:]
    print(f"webdataset {webdataset.__version__}")
    for number, folder in enumerate(folders):
        pairs = list(READERS[peer](Path(folder)))
        labels = np.array([label for label, _ in pairs], dtype=np.int64)
        np.savez(Path(out) / f"{number}.npz", labels=labels, images=[image for _, image in pairs])


if __name__ == "__main__":
    main()
