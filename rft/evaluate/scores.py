"""The score of a packed set, if it is not the share of right images.

Shapes: N images.
"""

from dataclasses import dataclass

import numpy as np

from rft.runs.predictions import Predictions
from rft.runs.records import SetCount
from rft.sets import Score
from rft.statistics.accuracy import mean_of_groups, per_group, worst_group


@dataclass(frozen=True)
class Scored:
    """The score of a set, in the fields of a count (`rft.runs.records.SetCount`)."""

    score: Score
    value: float | None = None
    worst_domain: str = ""


def score_of(predictions: Predictions, score: Score) -> Scored:
    """Compute the score of a set from a model's predictions for all of its images."""
    if score == "top1":
        return Scored(score)
    group_N = predictions.label if score == "mean-per-class" else predictions.domain
    assert group_N is not None, "a manifest with such a score has domains"
    names, number_N = np.unique(group_N, return_inverse=True)
    correct, total = per_group(predictions.right, number_N, len(names))
    if score == "worst-domain":
        worst = worst_group(correct, total)
        return Scored(score, float(correct[worst] / total[worst]), str(names[worst]))
    return Scored(score, mean_of_groups(correct, total))


def in_words(count: SetCount) -> str:
    """Format top-1 in percent, followed by the set's own score if that is a different one."""
    top1 = f"{100 * count.correct / count.total:.2f}"
    if count.value is None:
        return top1
    where = f" ({count.worst_domain})" if count.worst_domain else ""
    return f"{top1}, {count.score} {100 * count.value:.2f}{where}"
