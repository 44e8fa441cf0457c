"""Averages of weights, compared with definitions computed number by number."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rft.method.averaging import (
    greedy_soup,
    interpolate,
    interpolate_tower,
    model_stock,
    uniform_soup,
)
from tests.reference import ensembles as reference

NUMBERS = st.floats(-1e6, 1e6, width=32)
SHAPES = {"w": (2, 3), "b": (2,)}
ALPHAS = st.floats(0, 1)


@st.composite
def models(draw, least: int = 1, most: int = 5) -> list[dict[str, torch.Tensor]]:
    """Models of the same entries, any finite fp32 numbers up to a million, -0 included."""
    count = draw(st.integers(least, most))
    return [
        {
            name: torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=NUMBERS)))
            for name, shape in SHAPES.items()
        }
        for _ in range(count)
    ]


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in state.items()}


def numbers(state: dict[str, torch.Tensor]) -> list[float]:
    return torch.cat([state[name].flatten() for name in SHAPES]).tolist()


def exact_mean(states) -> list[float]:
    """The mean of fp32 numbers as a fraction, rounded once."""
    columns = zip(*map(numbers, states), strict=True)
    means = [sum(map(Fraction, column)) / len(column) for column in columns]
    return torch.tensor([float(mean) for mean in means], dtype=torch.float64).float().tolist()


# WiSE-FT


@pytest.mark.slow
@given(models(2, 2), ALPHAS)
def test_interpolation_is_the_weighted_mean(pair, alpha):
    found = numbers(interpolate(*pair, alpha))
    for a, b, value in zip(*map(numbers, pair), found, strict=True):
        expected = (1 - alpha) * a + alpha * b
        # two products and a sum, each rounded to fp32
        assert abs(value - expected) <= 2e-7 * (abs(a) + abs(b)) + 1e-44


@pytest.mark.slow
@given(models(2, 2))
def test_the_ends_are_the_models_bit_for_bit(pair):
    assert bits(interpolate(*pair, 0.0)) == bits(pair[0])
    assert bits(interpolate(*pair, 1.0)) == bits(pair[1])


def test_the_ends_are_copies_and_take_nothing_from_the_other():
    start, end = {"w": torch.tensor([1.0])}, {"w": torch.tensor([torch.inf])}
    found = interpolate(start, end, 0)
    assert found["w"].item() == 1
    found["w"].zero_()
    assert start["w"].item() == 1


@pytest.mark.slow
@given(models(2, 2), ALPHAS)
def test_the_way_back_is_the_way(pair, alpha):
    there, back = interpolate(*pair, alpha), interpolate(*reversed(pair), 1 - alpha)
    for a, b, one, other in zip(*map(numbers, (*pair, there, back)), strict=True):
        # 1 - alpha is rounded too
        assert abs(one - other) <= 4e-7 * (abs(a) + abs(b)) + 1e-44


# uniform soup


@pytest.mark.slow
@given(models())
def test_the_soup_is_the_exact_mean_rounded(states):
    found = torch.tensor(numbers(uniform_soup(states)))
    torch.testing.assert_close(found, torch.tensor(exact_mean(states)), rtol=1.2e-7, atol=1e-9)


@pytest.mark.slow
@given(models(1, 1), st.integers(1, 80))
def test_the_soup_of_equal_models_is_that_model(states, count):
    assert numbers(uniform_soup(states * count)) == numbers(states[0])


@pytest.mark.slow
@given(models(2), st.randoms(use_true_random=False))
def test_the_order_does_not_matter_but_for_rounding(states, random):
    shuffled = random.sample(states, len(states))
    one, other = (torch.tensor(numbers(uniform_soup(order))) for order in (states, shuffled))
    torch.testing.assert_close(one, other, rtol=1.2e-7, atol=1e-9)


def test_a_sum_in_fp32_would_lose_what_the_soup_keeps():
    # 2^24 + 1 is not an fp32 number: a running fp32 sum never leaves 2^24
    states = [{"w": torch.tensor([2.0**24])}, *[{"w": torch.tensor([1.0])}] * 1023]
    assert uniform_soup(states)["w"].item() == np.float32((2**24 + 1023) / 1024)


def test_models_are_taken_one_after_the_other():
    alive = []

    def load():
        for number in range(5):
            alive.append(number)
            yield {"w": torch.full((3,), float(number))}
            alive.remove(number)

    def watched():
        for state in load():
            assert len(alive) == 1
            yield state
            state["w"].fill_(torch.nan)  # earlier models are not read again

    assert uniform_soup(watched())["w"].tolist() == [2, 2, 2]


def test_the_inputs_stay_and_the_type_too():
    states = [{"w": torch.ones(2, dtype=torch.float64)}, {"w": torch.zeros(2, dtype=torch.float64)}]
    found = uniform_soup(states)
    assert found["w"].dtype == torch.float64
    assert states[0]["w"].tolist() == [1, 1]
    assert uniform_soup([{"w": torch.ones(2, dtype=torch.bfloat16)}])["w"].dtype == torch.bfloat16


# greedy soup


def score_by(target: float):
    """Count like accuracy, in whole numbers: how near the mean of all weights is to `target`."""
    return lambda state: -round(abs(sum(numbers(state)) - target) * 8)


def textbook(states, score) -> tuple[list[float], list[int]]:
    """Wortsman et al., recipe 1, in fractions: sort, then add each one that helps."""
    order = sorted(range(len(states)), key=lambda n: (-score(states[n]), -n))
    kept = [order[0]]
    best = score(states[order[0]])
    for n in order[1:]:
        mean = exact_mean([states[m] for m in [*kept, n]])
        flat = torch.tensor(mean).split([6, 2])
        candidate = {"w": flat[0].reshape(2, 3), "b": flat[1]}
        if score(candidate) > best:
            best = score(candidate)
            kept.append(n)
    return exact_mean([states[m] for m in kept]), kept


# whole numbers, so that every mean rounds like its fraction
WHOLE = st.lists(st.lists(st.integers(-8, 8), min_size=8, max_size=8), min_size=1, max_size=6)


def whole_models(rows) -> list[dict[str, torch.Tensor]]:
    flat = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return [{"w": row[:6].reshape(2, 3), "b": row[6:]} for row in flat]


@pytest.mark.slow
@given(WHOLE, st.integers(-40, 40))
def test_greedy_is_the_textbook_recipe(rows, target):
    states, score = whole_models(rows), score_by(target)
    loaded = []

    def load(number):
        loaded.append(number)
        return states[number]

    soup, steps = greedy_soup([score(state) for state in states], load, score)
    expected, kept = textbook(states, score)
    assert [step.model for step in steps if step.kept] == kept
    assert numbers(soup) == expected
    assert sorted(loaded) == list(range(len(states)))
    # the result is exactly the uniform soup of the kept models
    assert bits(soup) == bits(uniform_soup(states[n] for n in kept))


@pytest.mark.slow
@given(models(), st.floats(-100, 100))
def test_greedy_never_scores_below_its_best_ingredient(states, target):
    score = score_by(target)
    alone = [score(state) for state in states]
    soup, steps = greedy_soup(alone, states.__getitem__, score)
    assert max(step.score for step in steps) >= max(alone)
    if sum(step.kept for step in steps) > 1:
        assert score(soup) == max(step.score for step in steps) > max(alone)
    # a kept model raised the score, a rejected one did not
    best = -float("inf")
    for step in steps:
        assert step.kept == (step.score > best)
        best = max(best, step.score)


def test_ties_go_to_the_later_model_and_an_equal_soup_is_left_out():
    states = [{"w": torch.tensor([float(n)])} for n in range(4)]
    told = []
    soup, steps = greedy_soup([5, 7, 7, 6], states.__getitem__, lambda _: 7, told.append)
    assert [step.model for step in steps] == [2, 1, 3, 0]
    assert [step.kept for step in steps] == [True, False, False, False]
    assert soup["w"].item() == 2
    assert told == steps


def test_a_candidate_is_the_mean_of_the_kept_and_the_new():
    states = [{"w": torch.tensor([value])} for value in (1.0, 3.0, 8.0, 100.0)]
    seen = []
    answers = iter([11, 10, 12])

    def score(state):
        seen.append(state["w"].item())
        return next(answers)

    soup, _ = greedy_soup([9, 8, 7, 6], states.__getitem__, score)
    # (1 + 3) / 2 is kept, (2 x 2 + 8) / 3 is not, (2 x 2 + 100) / 3 is
    assert seen == pytest.approx([2, 4, 104 / 3])
    assert soup["w"].item() == pytest.approx(104 / 3)


# models that differ


def test_unlike_models_are_refused():
    one, two = {"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="only one of them has 'b'"):
        interpolate(one, two, 0.5)
    with pytest.raises(ValueError, match="only one of them has 'b'"):
        interpolate(one, two, 1)
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        interpolate(one, {"a": torch.ones(2)}, 0.5)
    with pytest.raises(ValueError, match="only one of them has 'b'"):
        uniform_soup([one, two])
    with pytest.raises(ValueError, match=r"types torch.float32 and torch.float16"):
        uniform_soup([one, {"a": torch.ones(1).half()}])
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        greedy_soup([1, 0], [one, {"a": torch.ones(2)}].__getitem__, lambda _: 2)


def test_no_model_is_refused():
    with pytest.raises(ValueError, match="at least one model"):
        uniform_soup([])
    with pytest.raises(ValueError, match="at least one model"):
        greedy_soup([], [].__getitem__, lambda _: 0)


# Model Stock


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_equals_its_definition(count):
    generator = torch.Generator().manual_seed(count)
    shapes = {"visual.w": (7, 5), "visual.b": (5,), "head.scale": ()}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [
        {
            name: start[name] + common[name] + torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        for _ in range(count)
    ]
    found, ratios = model_stock(start, iter(models))
    for name, shape in shapes.items():
        expected, ratio = reference.model_stock(
            start[name].flatten().tolist(), [one[name].flatten().tolist() for one in models]
        )
        assert ratios[name] == pytest.approx(ratio, abs=1e-12)
        assert found[name].shape == shape
        assert found[name].dtype == torch.float32
        assert found[name].flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    # both kinds occur: tensors that move, and those that move less than all the way
    assert 0 < ratios["visual.w"] < 1


def test_model_stock_of_equal_models_is_their_mean_and_of_opposite_ones_the_start():
    start = {"same": torch.zeros(2), "against": torch.ones(2), "still": torch.full((2,), 3.0)}
    one = {"same": torch.tensor([1.0, 2.0]), "against": torch.tensor([3.0, 1.0])}
    other = {"same": torch.tensor([2.0, 4.0]), "against": torch.tensor([-1.0, 1.0])}
    models = [{**model, "still": start["still"]} for model in (one, other)]
    found, ratios = model_stock(start, models)
    assert ratios == {"same": pytest.approx(1), "against": 0, "still": 0}
    assert found["same"].tolist() == pytest.approx([1.5, 3])
    # a negative cosine would lead to the opposite side of the start
    assert found["against"].tolist() == [1, 1]
    assert torch.equal(found["still"], start["still"])


def test_a_model_that_did_not_move_a_tensor_is_orthogonal_to_the_others():
    start = {"w": torch.zeros(2)}
    models = [{"w": torch.tensor(values)} for values in ([1.0, 0.0], [1.0, 0.0], [0.0, 0.0])]
    # one pair of three has cosine 1, so c = 1/3
    assert model_stock(start, models)[1]["w"] == pytest.approx(3 / 3 / (1 + 2 / 3))


def test_model_stock_refuses_fewer_than_two_models_and_others_than_the_start():
    start = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="at least two fine-tuned models, 1 named"):
        model_stock(start, [{"w": torch.ones(2)}])
    with pytest.raises(ValueError, match="only one of them has 'b'"):
        model_stock(start, [{"w": torch.ones(2)}, {"b": torch.ones(2)}])


def test_of_the_tower_alone_every_other_entry_is_the_end():
    start = {"visual.w": torch.zeros(2), "head.w": torch.zeros(2)}
    end = {"visual.w": torch.ones(2), "head.w": torch.ones(2)}
    found = interpolate_tower(start, end, 0.25)
    assert found["visual.w"].tolist() == [0.25, 0.25]
    assert found["head.w"].tolist() == [1, 1]
    assert found["head.w"] is not end["head.w"]
