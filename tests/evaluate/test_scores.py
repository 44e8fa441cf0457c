"""A set's declared score: computed from predictions, recorded and printed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tiny_world import LABELS, SIZE
from rft.evaluate import command
from rft.evaluate.count import domains_of
from rft.evaluate.scores import in_words, score_of
from rft.loading.dataset import PackedDataset
from rft.packing.domains import read_domains
from rft.packing.pack import Options, pack_source
from rft.runs import predictions
from rft.runs.predictions import Predictions
from rft.runs.records import SetCount
from tests import tiny


def rows(label: list[int], rank: list[int], domain: list[str]) -> Predictions:
    """Predictions with these labels, ranks and domains; the other columns do not matter here."""
    count = len(label)
    return Predictions(
        key=np.array([f"k{n}" for n in range(count)]),
        label=np.array(label, np.int32),
        prediction=np.array([a if not r else a + 1 for a, r in zip(label, rank, strict=True)]),
        rank=np.array(rank, np.int32),
        confidence=np.full(count, 0.5, np.float32),
        log_likelihood=np.full(count, -1, np.float32),
        domain=np.array(domain),
    )


IMAGES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from(["a/1", "a/2", "b"])),
    min_size=1,
    max_size=30,
)


@pytest.mark.slow
@given(IMAGES)
def test_scores_are_means_and_minima_of_accuracies(images):
    """Compared with the simplest implementation."""
    made = rows(*map(list, zip(*images, strict=True)))

    def accuracies(column: int) -> dict:
        groups: dict = {}
        for image in images:
            groups.setdefault(image[column], []).append(image[1] == 0)
        return {name: sum(right) / len(right) for name, right in groups.items()}

    of_class, of_domain = accuracies(0), accuracies(2)
    mean = score_of(made, "mean-per-class")
    assert mean.value == pytest.approx(sum(of_class.values()) / len(of_class), abs=1e-12)
    mean = score_of(made, "mean-over-domains")
    assert mean.value == pytest.approx(sum(of_domain.values()) / len(of_domain), abs=1e-12)
    worst = score_of(made, "worst-domain")
    assert worst.value == min(of_domain.values())
    assert of_domain[worst.worst_domain] == worst.value
    assert score_of(made, "top1").value is None


def test_scores_in_words():
    count = SetCount(correct=3, total=4, manifest_sha256="0" * 64)
    assert in_words(count) == "75.00"
    worst = replace(count, score="worst-domain", value=0.5, worst_domain="fog/1")
    assert in_words(worst) == "75.00, worst-domain 50.00 (fog/1)"
    assert in_words(replace(count, score="mean-per-class", value=0.25)) == (
        "75.00, mean-per-class 25.00"
    )


@pytest.mark.parametrize(
    "fields", [{"score": "worst-domain"}, {"value": 0.5}, {"score": "top1", "value": 0.5}]
)
def test_a_count_has_a_value_where_its_score_needs_one(fields):
    with pytest.raises(ValueError, match="value is"):
        SetCount(correct=3, total=4, manifest_sha256="0" * 64, **fields)


@pytest.fixture
def several(tiny_data, tmp_path):
    """A root with a set of two domains, which are the images of R and A."""
    for name in ("imagenet-r", "imagenet-a"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).symlink_to(tiny_data.parent / "images" / name)
    source = read_domains("shifted", tmp_path / "images", 1, LABELS).source
    options = Options(encoding="pixels", size=SIZE, shard_mb=0.02, workers=1)
    declared = replace(source, score="worst-domain", ood=True)
    assert pack_source(declared, str(tmp_path / "shards"), LABELS, options)
    return tmp_path / "shards"


@pytest.mark.slow
def test_an_evaluation_records_domains_and_the_sets_own_score(train, several, capsys):
    run = train("zero-shot", "--optim.epochs", 0)
    capsys.readouterr()
    tiny.call(command, run, "--data", several, "--sets", "shifted", "--workers", 0)
    out = capsys.readouterr().out
    count = json.loads((run / "results.json").read_text())["sets"]["shifted"]
    made = predictions.read(
        predictions.path_of(run, "shifted"), count["total"], count["predictions_sha256"]
    )
    assert sorted(set(made.domain.tolist())) == ["imagenet-a", "imagenet-r"]
    assert (made.domain == "imagenet-r").sum() == 20
    shares = {name: made.right[made.domain == name].mean() for name in set(made.domain.tolist())}
    assert (count["score"], count["ood"]) == ("worst-domain", True)
    assert count["value"] == min(shares.values())
    assert shares[count["worst_domain"]] == count["value"]
    assert f"worst-domain {100 * count['value']:.2f} ({count['worst_domain']})" in out
    # the damage is found before the work, not after it
    (several / "shifted/samples.npz").write_bytes(b"noise")
    (run / "results.json").unlink()
    with pytest.raises(SystemExit):
        tiny.call(command, run, "--data", several, "--sets", "shifted", "--workers", 0)
    assert "samples.npz does not have the sha256" in capsys.readouterr().err


def test_sets_without_domains_have_no_such_column(tmp_path):
    made = replace(rows([0, 1], [0, 1], ["a", "b"]), domain=None, prediction=np.int32([0, 0]))
    (tmp_path / "p.npz").write_bytes(made.to_bytes())
    assert "domain" not in np.load(tmp_path / "p.npz").files
    assert predictions.read(tmp_path / "p.npz", 2).domain is None


def test_a_column_of_domains_that_is_none_is_refused(tmp_path):
    made = replace(rows([0, 1], [0, 1], ["a", "b"]), prediction=np.int32([0, 0]))
    for domain, message in ((np.zeros(2, np.int32), "U, not int32"), (np.array(["a"]), "2 of U")):
        (tmp_path / "p.npz").write_bytes(replace(made, domain=domain).to_bytes())
        with pytest.raises(ValueError, match=f"domain must be .*{message}"):
            predictions.read(tmp_path / "p.npz", 2)


def test_domains_are_those_of_the_samples(several):
    packed = PackedDataset(str(several / "shifted"))
    every = domains_of(packed, np.arange(len(packed)))
    some = np.array([7, 3, 30])
    assert domains_of(packed, some).tolist() == every[some].tolist()
    assert sorted(set(every.tolist())) == ["imagenet-a", "imagenet-r"]
    # shuffled, so that the first images are from several domains
    assert len(set(every[:8].tolist())) == 2
