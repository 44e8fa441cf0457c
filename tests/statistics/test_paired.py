"""Comparisons of two systems equal those of statsmodels, and of images drawn one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from rft.statistics import paired
from rft.statistics.accuracy import wilson

rights = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)


def draw(images: int, one: float, two: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the images that two models classify correctly; hard images are hard for both."""
    draws = np.random.default_rng(seed)
    hard_N = draws.uniform(size=images)
    noise_N = 0.1 * draws.normal(size=(2, images))
    return hard_N + noise_N[0] < one, hard_N + noise_N[1] < two


@given(rights)
def test_mcnemar_is_statsmodels(pairs):
    one_N, two_N = np.array(pairs).T
    found = paired.mcnemar(one_N, two_N)
    table = [
        [np.sum(one_N & two_N), np.sum(one_N & ~two_N)],
        [np.sum(~one_N & two_N), np.sum(~one_N & ~two_N)],
    ]
    assert (found.gained, found.lost) == (table[0][1], table[1][0])
    # statsmodels' p-value exceeds 1 if both are equal
    assert found.p == pytest.approx(min(1.0, mcnemar(table, exact=True).pvalue), abs=1e-12)


def test_mcnemar_of_many_images_is_exact():
    one_N, two_N = draw(50_000, 0.76, 0.75)
    found = paired.mcnemar(one_N, two_N)
    smaller = min(found.gained, found.lost)
    expected = 2 * stats.binom.cdf(smaller, found.gained + found.lost, 0.5)
    assert found.p == pytest.approx(expected, rel=1e-12)
    # as if they were different images: a test of two proportions finds nothing
    assert found.p < 1e-3


def naive(sets, replicates: int, seed: int) -> np.ndarray:
    """Return the mean gain of each replicate, drawing images one by one."""
    draws = np.random.default_rng(seed)
    return np.array(
        [
            np.mean(
                [gain_N[draws.integers(len(gain_N), size=len(gain_N))].mean() for gain_N in sets]
            )
            for _ in range(replicates)
        ]
    )


def test_the_bootstrap_is_that_of_images_drawn_one_by_one():
    sets = [
        paired.gains(one_N[None], two_N[None])
        for one_N, two_N in (draw(300, 0.7, 0.6, 1), draw(120, 0.4, 0.41, 2))
    ]
    found = paired.bootstrap(sets, replicates=20_000)
    drawn = naive(sets, 20_000, seed=1)
    assert found.value == pytest.approx(np.mean([gain_N.mean() for gain_N in sets]), abs=1e-15)
    # an end's own error is about 0.02 standard deviations
    assert found.interval == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.1 * drawn.std()
    )


def test_the_bootstrap_of_one_set_is_scipys():
    one_N, two_N = draw(400, 0.7, 0.66)
    gain_N = paired.gains(one_N[None], two_N[None])
    found = paired.bootstrap([gain_N], replicates=20_000)
    expected = stats.bootstrap(
        (gain_N,),
        np.mean,
        n_resamples=20_000,
        method="percentile",
        # its name before SciPy 1.15, which later versions still accept
        random_state=np.random.default_rng(3),
    )
    assert found.interval == pytest.approx(
        tuple(expected.confidence_interval), abs=0.1 * expected.standard_error
    )


def test_seeds_are_folded_image_by_image():
    one_SN = np.array([[True, True, False, False], [True, False, False, True]])
    two_SN = np.array([[False, True, False, True]])
    gain_N = paired.gains(one_SN, two_SN)
    assert gain_N.tolist() == [1.0, -0.5, 0.0, -0.5]
    assert paired.bootstrap([gain_N]).value == 0.0


def test_equal_predictions_are_no_proof_of_equal_systems():
    """Resampled images show no difference either, but others may: about 3 of 100, at most."""
    one_N, _ = draw(100, 0.5, 0.5)
    value, (low, high), p = paired.bootstrap([paired.gains(one_N[None], one_N[None])])
    assert value == 0.0
    assert p == 1.0
    assert -0.04 < low < -0.01
    assert 0.01 < high < 0.04
    assert paired.mcnemar(one_N, one_N) == (0, 0, 1.0)


@pytest.mark.parametrize("images", [20, 200])
@pytest.mark.parametrize("right", [0, 1])
def test_an_interval_of_all_images_right_or_wrong_is_near_wilsons(images, right):
    """Three seeds for which resampled images always give the same accuracy."""
    found = paired.tally(np.full(images, 3 * right), 3)
    drawn_R = paired.redraw(found, np.random.default_rng(0))
    low, high = paired.summarise(found.mean, drawn_R).interval
    expected = wilson(right * images, images)
    assert 0 <= low <= high <= 1
    assert (high if right else low) == pytest.approx(right, abs=1e-12)
    width = expected.high - expected.low
    assert high - low == pytest.approx(width, abs=0.5 * width)


@pytest.mark.parametrize("right", [0, 1])
def test_units_of_several_sizes_that_are_all_right_have_a_width_too(right):
    size_U = np.array([1] * 50 + [4] * 50)
    found = paired.tally(3 * right * size_U, 3, size_N=size_U)
    low, high = paired.summarise(
        found.mean, paired.redraw(found, np.random.default_rng(0))
    ).interval
    assert 0.02 < high - low < 0.05
    equal = paired.tally(size_U, 1, size_U, 1, size_U)
    low, high = paired.summarise(
        equal.mean, paired.redraw(equal, np.random.default_rng(0))
    ).interval
    assert low < -0.02 < 0.02 < high


def versions(units: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the images' versions that two systems classify correctly, and each version's unit."""
    draws = np.random.default_rng(0)
    unit_N = np.repeat(np.arange(units), draws.choice(sizes, units))
    hard_U = draws.uniform(size=units)
    noise_SN = 0.05 * draws.normal(size=(4, len(unit_N)))
    share_S = np.array([0.6, 0.6, 0.55, 0.55])
    return hard_U[unit_N] + noise_SN < share_S[:, None], unit_N


@pytest.mark.parametrize("sizes", [(10,), (1, 4, 10)])
def test_versions_of_an_image_are_drawn_together(sizes):
    right_SN, unit_N = versions(60, sizes)
    size_U = np.bincount(unit_N)
    one_U, two_U = (
        np.bincount(unit_N, rows.sum(axis=0)).astype(int) for rows in np.split(right_SN, 2)
    )
    found = paired.tally(one_U, 2, two_U, 2, size_U)
    gain_N = paired.gains(right_SN[:2], right_SN[2:])
    assert found.mean == pytest.approx(gain_N.mean(), abs=1e-14)
    assert (found.units_V * found.size_V).sum() == len(unit_N)
    interval = paired.summarise(found.mean, paired.redraw(found, np.random.default_rng(1))).interval
    # the same with explicit images: units are drawn, then all of their images are taken
    draws, images = np.random.default_rng(2), [np.flatnonzero(unit_N == u) for u in range(60)]
    drawn = np.array(
        [
            gain_N[np.concatenate([images[u] for u in draws.integers(60, size=60)])].mean()
            for _ in range(4000)
        ]
    )
    assert interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.15 * drawn.std())
    # as if versions were independent, it would be far too narrow
    apart = paired.bootstrap([gain_N]).interval
    assert interval.high - interval.low > 1.3 * (apart.high - apart.low)


@given(rights)
def test_exchanged_systems_have_the_other_sign(pairs):
    one_N, two_N = np.array(pairs).T
    there = paired.mcnemar(one_N, two_N)
    back = paired.mcnemar(two_N, one_N)
    assert (there.gained, there.lost, there.p) == (back.lost, back.gained, back.p)


def test_a_seed_gives_the_same_interval():
    one_N, two_N = draw(100, 0.6, 0.5)
    gain_N = paired.gains(one_N[None], two_N[None])
    assert paired.bootstrap([gain_N]) == paired.bootstrap([gain_N])
    assert paired.bootstrap([gain_N], seed=1) != paired.bootstrap([gain_N])


def test_pairs_say_more_than_two_intervals():
    """Intervals of two accuracies overlap although the pairs show a difference."""
    one_N, two_N = draw(7500, 0.52, 0.50)
    one, two = (wilson(int(right_N.sum()), 7500) for right_N in (one_N, two_N))
    assert one.low < two.high
    assert paired.bootstrap([paired.gains(one_N[None], two_N[None])]).interval.low > 0


def drawn_seeds(seeds: int, images: int, share: float, seed: int) -> np.ndarray:
    """Return the images that each seed of a system classifies correctly, bool (S, N)."""
    draws = np.random.default_rng(seed)
    hard_N = draws.uniform(size=images)
    return hard_N + 0.2 * draws.normal(size=(seeds, images)) < share


@pytest.mark.parametrize(("one_seeds", "two_seeds"), [(1, 1), (3, 3), (3, 1), (2, 3)])
def test_counted_gains_are_those_of_the_images(one_seeds, two_seeds):
    one_SN = drawn_seeds(one_seeds, 500, 0.7, 1)
    two_SN = drawn_seeds(two_seeds, 500, 0.6, 2)
    gain_N = paired.gains(one_SN, two_SN)
    found = paired.tally(one_SN.sum(axis=0), one_seeds, two_SN.sum(axis=0), two_seeds)
    values, counts = np.unique(gain_N.round(12), return_counts=True)
    assert found.gain_V == pytest.approx(values, abs=1e-12)
    assert found.units_V.tolist() == counts.tolist()
    assert found.mean == pytest.approx(gain_N.mean(), abs=1e-14)
    assert found.gained == np.count_nonzero(gain_N > 1e-9)
    assert found.lost == np.count_nonzero(gain_N < -1e-9)


@pytest.mark.slow
def test_an_accuracys_interval_is_that_of_images_drawn_one_by_one():
    """Over seeds, an image's value is its mean over seeds: it is drawn as one."""
    sets = [drawn_seeds(3, 300, 0.7, 1), drawn_seeds(3, 120, 0.4, 2)]
    counted = [paired.tally(right_SN.sum(axis=0), 3) for right_SN in sets]
    found = paired.bootstrap_of(counted, np.random.default_rng(0), replicates=20_000)
    drawn = naive([right_SN.mean(axis=0) for right_SN in sets], 20_000, seed=1)
    assert found.value == pytest.approx(np.mean([right_SN.mean() for right_SN in sets]))
    assert found.interval == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.1 * drawn.std()
    )


def test_an_exchanged_difference_is_the_other_system_minus_the_one():
    found = paired.Difference(0.5, (0.2, 0.7), 0.01)
    assert -found == (-0.5, (-0.7, -0.2), 0.01)


def test_the_p_value_has_both_sides():
    one_N, two_N = draw(2000, 0.6, 0.59)
    gain_N = paired.gains(one_N[None], two_N[None])
    z = gain_N.mean() / gain_N.std() * len(gain_N) ** 0.5
    # for so many images the normal distribution's is nearly the same
    assert paired.bootstrap([gain_N]).p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=0.2)


def test_holms_correction():
    # 3 x 0.02, 1 x 0.9, 4 x 0.01, the larger of 2 x 0.025 and the previous one
    assert paired.holm([0.02, 0.9, 0.01, 0.025]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert paired.holm([0.6, 0.7]) == [1.0, 1.0]
    assert paired.holm([]) == []
