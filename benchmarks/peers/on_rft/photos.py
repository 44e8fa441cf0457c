"""The data set that rft's loader processes get, with as few imports as possible."""

from typing import Any

import numpy as np

from benchmarks.peers.samples import Reading
from rft.loading.dataset import PackedDataset
from rft.shards.cache import Cache


class Photos(PackedDataset):
    """rft's dataset, which first reports the resources that its process inherited."""

    def __init__(self, reading: Reading, cache: Cache | None = None) -> None:
        super().__init__(reading.source, cache=cache)
        self.inheritance = reading.decode

    def batch(
        self, samples: np.ndarray, size: int, out_BCHW: Any = None, augmentation: Any = None
    ) -> Any:
        """Return what rft reads."""
        if self.inheritance.report:
            self.inheritance.tell()
        return super().batch(samples, size, out_BCHW, augmentation)

    def numbers(self, samples_B: Any) -> list[int]:
        """Return the photographs' numbers, which their files are named after."""
        return [int(self.key(int(sample))[-5:]) for sample in samples_B]
