"""The held-out split: training images that select the checkpoint, chosen by image id.

A split by id never depends on how the images were packed, and it is the released code's own:
sklearn's stratified split over the images in class and name order (its data/imagenet.py).
"""

import numpy as np


def held_out_split(
    keys: np.ndarray, labels: np.ndarray, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split a set into training and held-out samples: the sorted numbers of both.

    Keys and labels are (N,); the classes share the images that are held out by their sizes.

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
            "another, or take all numbers from the size of the set with --scale small"
        )
    # here, because importing sklearn takes a second that no other command needs to spend
    from sklearn.model_selection import train_test_split

    # the last key counts first: by class, then by name
    canonical = np.lexsort((keys, labels))
    train, held = train_test_split(
        np.arange(samples),
        train_size=samples - held_out,
        random_state=seed,
        stratify=labels[canonical],
    )
    # sorted as the set is stored: `PackedDataset.shard_sizes` requires it
    return np.sort(canonical[train]), np.sort(canonical[held])
