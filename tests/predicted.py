"""Synthetic predictions without a model."""

import numpy as np

from rft.evaluate.count import Predicted
from rft.evaluate.results import Evaluated
from rft.runs.predictions import Predictions


def evaluated(correct: int, manifest: str = "0" * 64, total: int = 10) -> Evaluated:
    """So many images, some of them predicted correctly."""
    wrong_N = np.arange(total) >= correct
    rows = Predictions(
        key=np.array([f"image{n}" for n in range(total)]),
        label=np.zeros(total, np.int32),
        prediction=wrong_N.astype(np.int32),
        rank=wrong_N.astype(np.int32),
        confidence=np.full(total, 0.5, np.float32),
        log_likelihood=np.full(total, -1.0, np.float32),
    )
    return Evaluated(Predicted(rows, None), manifest)
