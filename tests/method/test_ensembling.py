"""Ensembles, compared with definitions computed image by image."""

import pytest
import torch

from rft.method import ensembling
from rft.method.ensembling import BetaMixture
from tests.reference import ensembles as reference


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def randn(generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.9)])
def test_mixed_probabilities_equal_those_of_each_image(generator, temperatures):
    zero_shot, fine_tuned = (randn(generator, 9, 5, scale=4) for _ in range(2))
    weight = torch.rand(9, generator=generator, dtype=torch.float64)
    found = ensembling.mixed_log_probabilities(
        zero_shot, fine_tuned, weight[:, None], temperatures
    ).exp()
    rows = zip(zero_shot.tolist(), fine_tuned.tolist(), weight.tolist(), strict=True)
    for row, (z_zs, z_ft, w) in zip(found.tolist(), rows, strict=True):
        assert row == pytest.approx(reference.mixed(z_zs, z_ft, w, *temperatures), abs=1e-12)


def test_the_ends_of_an_output_ensemble_are_the_models_and_no_probability_is_zero(generator):
    logits = randn(generator, 4, 6, scale=2000), randn(generator, 4, 6, scale=2000)
    for weight, model in enumerate(logits):
        found = ensembling.mixed_log_probabilities(*logits, float(weight))
        torch.testing.assert_close(found, model.double().log_softmax(dim=1))
    assert ensembling.mixed_log_probabilities(*logits, 0.5).isfinite().all()


@pytest.mark.parametrize("block", [1, 7, 2**24])
@pytest.mark.parametrize("k", [1, 2, 40])
def test_the_kth_distance_is_that_of_a_sorted_list(generator, monkeypatch, k, block):
    monkeypatch.setattr(ensembling, "SIMILARITIES", block)
    query, bank = randn(generator, 6, 8).double(), randn(generator, 40, 8).double()
    found = ensembling.kth_distance(ensembling.unit(query), ensembling.unit(bank), k)
    expected = [reference.kth_distance(row, bank.tolist(), k) for row in query.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    # in the type of features
    half = ensembling.kth_distance(ensembling.unit(query.float()), ensembling.unit(bank.float()), k)
    assert half.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_weight_falls_with_the_distance():
    distance = torch.tensor([0.0, 1.5, 4.0])
    found = ensembling.vrf_weight(distance).tolist()
    assert found == pytest.approx([reference.vrf_weight(d) for d in distance.tolist()], abs=1e-12)
    assert found[1] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(("bank", "k"), [(1, 1), (999, 1), (2000, 2), (2999, 2), (150_000, 150)])
def test_k_is_a_thousandth_of_the_bank_and_at_least_one(bank, k):
    assert ensembling.nearest_rank(bank) == k


def test_coefficients_equal_those_of_each_image(generator):
    zero_shot, fine_tuned = (randn(generator, 30, 5, scale=3) for _ in range(2))
    entropies = [ensembling.entropy(z) for z in (zero_shot, fine_tuned)]
    assert entropies[0].tolist() == pytest.approx(
        [reference.entropy(row) for row in zero_shot.tolist()], abs=1e-9
    )
    found = ensembling.dawin_coefficients(*entropies)
    expected = reference.dawin_coefficients(zero_shot.tolist(), fine_tuned.tolist())
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert ((found > 0) & (found < 1)).all()


def test_coefficients_depend_on_the_other_images(generator):
    entropies = [ensembling.entropy(randn(generator, 30, 5, scale=3)) for _ in range(2)]
    whole = ensembling.dawin_coefficients(*entropies)
    half = ensembling.dawin_coefficients(*(one[:15] for one in entropies))
    assert not torch.allclose(whole[:15], half, atol=1e-4)


def test_models_that_are_certain_of_everything_share_equally():
    zeros = torch.zeros(4)
    assert ensembling.dawin_coefficients(zeros, zeros).tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="at least two images"):
        ensembling.dawin_coefficients(zeros[:1], zeros[:1])


def test_moments_and_densities_equal_those_of_each_component(generator):
    value = torch.rand(50, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    share = torch.rand(50, 3, generator=generator, dtype=torch.float64).softmax(dim=1)
    mixture = BetaMixture.of_moments(value, share)
    for j in range(3):
        a, b = reference.beta_moments(value.tolist(), share[:, j].tolist())
        assert float(mixture.a_J[j]) == pytest.approx(a, rel=1e-9)
        assert float(mixture.b_J[j]) == pytest.approx(b, rel=1e-9)
        own = mixture.log_parts(value)[:, j] - mixture.weight_J[j].log()
        expected = [reference.beta_log_density(x, a, b) for x in value.tolist()]
        assert own.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(mixture.weight_J.sum()) == pytest.approx(1)
    assert mixture.means.tolist() == pytest.approx(
        [float((value * share[:, j]).sum() / share[:, j].sum()) for j in range(3)], abs=1e-9
    )


def test_a_mixture_finds_the_components_that_values_were_drawn_from():
    torch.manual_seed(0)
    wanted = [(30.0, 70.0), (50.0, 50.0), (90.0, 10.0)]
    parts = [torch.distributions.Beta(a, b).sample((400,)) for a, b in wanted]
    mixture = ensembling.fit_beta_mixture(torch.cat(parts))
    assert mixture.means.tolist() == pytest.approx([0.3, 0.5, 0.9], abs=0.02)
    found = mixture.assign(torch.tensor([0.2, 0.5, 0.95], dtype=torch.float64))
    assert found.tolist() == [0, 1, 2]


def test_k_means_ends_where_each_value_is_nearest_to_the_mean_of_its_own(generator):
    value = torch.rand(200, generator=generator, dtype=torch.float64)
    label = ensembling.kmeans(value, 3)
    means = [float(value[label == j].mean()) for j in range(3)]
    for x, own in zip(value.tolist(), label.tolist(), strict=True):
        assert own == min(range(3), key=lambda j: abs(x - means[j]))


@pytest.mark.parametrize("values", [[0.4], [0.4, 0.4], [0.4, 0.4, 0.6], [0.1, 0.1, 0.5, 0.9]])
def test_few_different_values_make_few_components(values):
    value = torch.tensor(values, dtype=torch.float64)
    mixture = ensembling.fit_beta_mixture(value)
    assert len(mixture.means) == min(3, len(set(values)))
    assert mixture.means[mixture.assign(value)].tolist() == pytest.approx(values, abs=1e-3)


def test_values_outside_are_refused():
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        ensembling.fit_beta_mixture(torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        ensembling.fit_beta_mixture(torch.tensor([0.5, float("nan")]))
