"""Choice of the training images that select the checkpoint, and of few-shot training images.

Both are chosen by image id, so they never depend on how the images were packed. The held-out split
is that of the released code: sklearn's stratified split over the images in class and name order
(its data/imagenet.py). The few-shot images are drawn from the rest, so that the held-out images are
the same for every number of shots.
"""

import numpy as np

from rft import rng
from rft.shards.index import Index
from rft.shards.manifest import Manifest


def split_set(
    index: Index, manifest: Manifest, held_out: int, shots: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split a set into training and held-out samples: sorted numbers of both.

    With `shots` above 0, training has that many samples per class, and all others are unused.

    Raises:
        ValueError: if the set, or one of its classes, is too small.
    """
    samples, held = held_out_split(index.key, index.label, held_out, seed)
    if not shots:
        return samples, held
    classes = len(manifest.classes)
    # a class without images in the set is allowed, as it is without shots
    present_K = np.bincount(index.label, minlength=classes) > 0
    count_K = np.bincount(index.label[samples], minlength=classes)
    short = np.flatnonzero(present_K & (count_K < shots))
    if len(short):
        name, count = manifest.classes[short[0]], count_K[short[0]]
        others = f", and {len(short) - 1:,} more classes have too few" if len(short) > 1 else ""
        raise ValueError(
            f"--loader.shots is {shots}, but class {name!r} has {count} training "
            f"image{'s' if count != 1 else ''} besides the {held_out:,} held out{others}; choose "
            "fewer shots or a smaller --loader.held-out, or add images"
        )
    return few_shot(index.key, index.label, samples, shots, seed), held


def held_out_split(
    keys: np.ndarray, labels: np.ndarray, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split a set into training and held-out samples: the sorted numbers of both.

    Keys and labels are (N,); held-out images are distributed over the classes by class size.

    Raises:
        ValueError: if the set is too small for the split.
    """
    samples = len(keys)
    if held_out == 0:
        return np.arange(samples), np.arange(0)
    classes = len(np.unique(labels))
    if not classes <= held_out <= samples - classes:
        raise ValueError(
            f"--loader.held-out is {held_out}, but {samples} training images of {classes} classes "
            f"allow {classes} to {samples - classes} (one of each class on both sides); choose "
            "another value, or --scale small, which derives all numbers from the size of the set"
        )
    # here, because importing sklearn takes a second, and other commands do not need it
    from sklearn.model_selection import train_test_split

    # lexsort's last key is the primary one: by class, then by name
    canonical = np.lexsort((keys, labels))
    train, held = train_test_split(
        np.arange(samples),
        train_size=samples - held_out,
        random_state=seed,
        stratify=labels[canonical],
    )
    # in the order of the set, as `PackedDataset.shard_sizes` requires
    return np.sort(canonical[train]), np.sort(canonical[held])


def few_shot(
    keys: np.ndarray, labels: np.ndarray, samples: np.ndarray, shots: int, seed: int
) -> np.ndarray:
    """Choose `shots` of the given samples per class: their sorted numbers.

    Each id is hashed with the seed, and the smallest hashes of each class are chosen. A choice is
    therefore part of every larger one, and depends neither on the packing nor on other classes.

    Args:
        keys: ids of the full set, (N,).
        labels: their classes, (N,).
        samples: numbers of the samples to choose from, at least `shots` per class.
        shots: images per class.
        seed: of the choice.
    """
    key_N, label_N = keys[samples], labels[samples]
    hashed = (rng.derive(seed, "shots", key.decode()) for key in key_N.tolist())
    hash_N = np.fromiter(hashed, np.int64, len(key_N))
    # lexsort's last key is the primary one: by class, then by hash; ids only break ties
    order = np.lexsort((key_N, hash_N, label_N))
    firsts = np.flatnonzero(np.diff(label_N[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(firsts, np.diff(firsts, append=len(order)))
    return np.sort(samples[order[rank < shots]])
