"""Ensembles on real run folders: outputs, records, skips and refusals."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import costs
from rft.clip.classifier import Classifier, Saved, build_classifier, load_state
from rft.clip.model_folder import write_run
from rft.dist import World
from rft.ensemble import command as ensemble_command
from rft.evaluate import command as evaluate_command
from rft.evaluate.count import count_correct
from rft.evaluate.temperature import held_out_of
from rft.loading.dataset import PackedDataset
from rft.loading.split import held_out_split, split_set
from rft.method import ensembling
from rft.report import command as report_command
from rft.runs import predictions
from rft.runs.filenames import CLUSTERS, CONFIG, RESULTS, SELECTED
from rft.runs.trained_on import TrainedOn, entries
from rft.shards.manifest import Manifest
from rft.storage import files
from tests.conftest import build_model
from tests.reference import ensembles as reference
from tests.tiny import call, torchrun

SETS = ("imagenet-val", "imagenet-a", "imagenet-r")
DONE = "all results are current, nothing to do"
HELD_OUT = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data) -> Path:
    """Folder of two run folders: zero-shot, and vanilla that was trained on the tiny world."""
    root = tmp_path_factory.mktemp("made")
    train = PackedDataset(str(tiny_data / "imagenet-train"))
    classes = train.manifest.label_space
    seen = TrainedOn("imagenet-train", train.manifest.sha256, HELD_OUT, 3)
    for seed, (name, recipe) in enumerate([("zero", "zero-shot"), ("end", "vanilla")]):
        model = above_chance(build_model(seed, len(classes)), train, (0.6, 0.8)[seed])
        metadata = {"step": str(5 * seed), "recipe": recipe, **entries([seen][:seed])}
        saved = Saved(dict(model.state_dict()), model.architecture, metadata, classes)
        origin = {"imported_from": {"format": "test"}, "data": str(tiny_data)}
        write_run(root / name, saved, {"recipe": recipe, "seed": seed, **origin})
    return root


def above_chance(model: Classifier, packed: PackedDataset, right: float) -> Classifier:
    """Give a random tower a head with that accuracy, so that a temperature fits."""
    generator = torch.Generator().manual_seed(int(100 * right))
    batch = packed.batch(np.arange(len(packed)), model.architecture.image_size)
    with torch.no_grad():
        features = model.features(model.patches(batch.images_BCHW))
        features = torch.nn.functional.normalize(features)
        ones = torch.ones(len(features), 1)
        other = torch.rand(len(features), generator=generator) > right
        wanted = torch.nn.functional.one_hot((batch.labels_B + other) % len(model.head.bias))
        inputs = torch.cat([features, ones], dim=1)
        # ridge regression: otherwise weights and logits are huge
        found = torch.linalg.solve(
            inputs.T @ inputs + 0.003 * torch.eye(inputs.shape[1]), inputs.T @ wanted.float()
        )
        model.head.weight.copy_(9 * found[:-1].T)
        model.head.bias.copy_(9 * found[-1])
    return model


@pytest.fixture
def runs(made, tmp_path) -> Path:
    """A copy of them that a test may modify."""
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def ensemble(tiny_data, runs, tmp_path, capsys):
    """Evaluate an ensemble of both in this process; return its output and log."""

    def run(kind: str, *words: object, out: str = "out", sets: tuple[str, ...] = SETS) -> str:
        capsys.readouterr()
        call(ensemble_command, kind, *line(runs, tiny_data, tmp_path / out, sets), *words)
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.fixture
def wrong(tiny_data, runs, tmp_path, refused):
    """Evaluate an invalid ensemble; return the one-line error."""
    return lambda kind, *words: refused(
        ensemble_command, kind, *line(runs, tiny_data, tmp_path / "out"), *words
    )


def line(runs: Path, data: Path, out: Path, sets: tuple[str, ...] = SETS) -> list[object]:
    ends = runs / "zero", runs / "end"
    return [*ends, "--data", data, "--out", out, "--workers", 0, "--sets", *sets]


def answers(runs: Path, packed: PackedDataset, samples=None) -> list[tuple[list, list]]:
    """Logits and features of both models, image by image."""
    found = []
    samples = np.arange(len(packed)) if samples is None else samples
    for name in ("zero", "end"):
        saved = load_state(runs / name / SELECTED)
        model = build_classifier(saved.state, saved.architecture)
        images = packed.batch(samples, model.architecture.image_size).images_BCHW
        with torch.no_grad():
            features = model.features(model.patches(images))
            found.append((model.logits(features).tolist(), features.tolist()))
    return found


def grouped(logits: list[float], table: np.ndarray) -> list[float]:
    """The highest logit of each group, one after the other."""
    return [
        max(z for z, group in zip(logits, table, strict=True) if group == g)
        for g in range(table.max() + 1)
    ]


def rows_of(out: Path, packed: PackedDataset) -> predictions.Predictions:
    name = packed.manifest.dataset
    results = json.loads((out / RESULTS).read_text())["sets"][name]
    path = predictions.path_of(out, name)
    found = predictions.read(path, len(packed), results["predictions_sha256"])
    assert results["correct"] == int(found.right.sum())
    return found


def require_answers(out: Path, packed: PackedDataset, probabilities: list[list[float]]) -> None:
    """Check the rows of a set against the probabilities (groups) of each image."""
    table = packed.manifest.class_to_group()
    rows = rows_of(out, packed)
    first = [int(np.flatnonzero(table == g)[0]) for g in range(table.max() + 1)]
    for n, p in enumerate(probabilities):
        label = table[packed.index.label[n]]
        assert rows.prediction[n] == first[int(np.argmax(p))]
        assert rows.confidence[n] == pytest.approx(max(p), abs=1e-6)
        assert np.exp(rows.log_likelihood[n]) == pytest.approx(p[label], abs=1e-6)
        assert rows.rank[n] == sum(q > p[label] for q in p)


def mixed(runs: Path, packed: PackedDataset, weights, *at: float) -> list[list[float]]:
    table = packed.manifest.class_to_group()
    (zero, _), (end, features) = answers(runs, packed)
    return [
        reference.mixed(grouped(a, table), grouped(b, table), weights(f), *at)
        for a, b, f in zip(zero, end, features, strict=True)
    ]


def opened(data: Path, sets=SETS) -> list[PackedDataset]:
    return [PackedDataset(str(data / name)) for name in sets]


def test_an_output_ensemble_averages_probabilities_over_the_scored_groups(
    ensemble, runs, tiny_data, tmp_path
):
    ensemble("ose", "--alpha", 0.3)
    for packed in opened(tiny_data):
        require_answers(tmp_path / "out", packed, mixed(runs, packed, lambda _: 0.3))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["recipe"] == "ose"
    assert config["ensemble"] == {"kind": "ose", "alpha": 0.3}
    assert "transductive" not in config
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["ose", "vrf", "dawin"])
def test_classes_that_share_a_category_are_scored_together(
    ensemble, runs, tiny_data, tmp_path, monkeypatch, kind
):
    """As for ObjectNet: a category has the highest logit of its classes, before the softmax."""
    groups = np.array([0, 1, 1, 0])
    monkeypatch.setattr(Manifest, "class_to_group", lambda self: groups)
    ensemble(kind, *(() if kind == "ose" else ("--temperatures", 1, 1)), sets=SETS[:1])
    (packed,) = opened(tiny_data, SETS[:1])
    if kind == "ose":
        require_answers(tmp_path / "out", packed, mixed(runs, packed, lambda _: 0.5))
    rows = rows_of(tmp_path / "out", packed)
    assert set(rows.prediction) <= {0, 1}
    assert rows.rank.max() <= 1
    assert (rows.confidence >= 0.5).all()


@pytest.mark.parametrize(("alpha", "name"), [(0, "zero"), (1, "end")])
def test_the_ends_of_an_output_ensemble_are_the_models(
    ensemble, runs, tiny_data, tmp_path, alpha, name
):
    ensemble("ose", "--alpha", alpha)
    call(evaluate_command, runs / name, "--data", tiny_data, "--workers", 0, "--sets", *SETS)
    for packed in opened(tiny_data):
        own, found = rows_of(runs / name, packed), rows_of(tmp_path / "out", packed)
        assert np.array_equal(own.prediction, found.prediction)
        assert np.array_equal(own.rank, found.rank)
        np.testing.assert_allclose(own.confidence, found.confidence, rtol=1e-6)


def bank_of(runs: Path, data: Path) -> list[list[float]]:
    """VRF's bank: features of the training images that only the fine-tuned model gets right."""
    train = PackedDataset(str(data / "imagenet-train"))
    samples, _ = held_out_split(train.index.key, train.index.label, HELD_OUT, 3)
    (zero, _), (end, features) = answers(runs, train, samples)
    labels = train.index.label[samples]
    rows = zip(zero, end, features, labels, strict=True)
    return [f for a, b, f, y in rows if np.argmax(a) != y and np.argmax(b) == y]


def test_the_bank_of_a_few_shot_model_has_the_images_that_it_was_shown(
    ensemble, runs, tiny_data, tmp_path
):
    train = PackedDataset(str(tiny_data / "imagenet-train"))
    saved = load_state(runs / "end" / SELECTED)
    seen = TrainedOn("imagenet-train", train.manifest.sha256, HELD_OUT, 3, 2)
    few = saved._replace(metadata={**saved.metadata, **entries([seen])})
    config = json.loads((runs / "end" / CONFIG).read_text())
    shutil.rmtree(runs / "end")
    write_run(runs / "end", few, config)
    ensemble("vrf", "--temperatures", 0.8, 1.7)
    bank = json.loads((tmp_path / "out" / CONFIG).read_text())["fitted"]["bank"]
    samples, _ = split_set(train.index, train.manifest, HELD_OUT, 2, 3)
    assert bank["of"] == len(samples) == 2 * len(train.manifest.classes)
    (zero, _), (end, _) = answers(runs, train, samples)
    labels = train.index.label[samples]
    rows = zip(zero, end, labels, strict=True)
    assert bank["images"] == sum(np.argmax(a) != y and np.argmax(b) == y for a, b, y in rows)


def test_vrf_weighs_by_the_distance_to_what_fine_tuning_gained(ensemble, runs, tiny_data, tmp_path):
    ensemble("vrf", "--temperatures", 0.8, 1.7, "--centre", 0.5)
    bank = bank_of(runs, tiny_data)
    assert bank
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["fitted"]["bank"]["images"] == len(bank)
    assert config["fitted"]["bank"]["k"] == 1

    def weight(feature):
        return reference.vrf_weight(reference.kth_distance(feature, bank, 1), 0.5)

    for packed in opened(tiny_data):
        require_answers(tmp_path / "out", packed, mixed(runs, packed, weight, 0.8, 1.7))


def test_temperatures_are_fitted_on_held_out_images_and_read_again(
    ensemble, runs, tiny_data, tmp_path, monkeypatch
):
    ensemble("vrf", sets=SETS[:1])
    fitted = json.loads((tmp_path / "out" / CONFIG).read_text())["fitted"]
    fitted = fitted["zero_shot"], fitted["fine_tuned"]
    train = PackedDataset(str(tiny_data / "imagenet-train"))
    _, held_out = held_out_split(train.index.key, train.index.label, HELD_OUT, 3)
    for one, (logits, _) in zip(fitted, answers(runs, train, held_out), strict=True):
        assert (one["images"], one["train_set"]) == (HELD_OUT, "imagenet-train")
        # no other temperature gives the labels a higher likelihood
        at = torch.tensor(logits, dtype=torch.float64)
        labels = torch.from_numpy(train.index.label[held_out].astype(np.int64))
        losses = [
            float(torch.nn.functional.cross_entropy(at / (one["value"] * f), labels))
            for f in (0.99, 1, 1.01)
        ]
        assert losses[1] == min(losses)
    # sets evaluated later have the same temperatures, and config.json does not change
    before = (tmp_path / "out" / CONFIG).read_bytes()
    monkeypatch.setattr(ensemble_command, "fit_on", None)
    ensemble("vrf")
    assert (tmp_path / "out" / CONFIG).read_bytes() == before
    assert DONE in ensemble("vrf")


def test_dawin_forwards_each_cluster_with_its_own_weights(ensemble, runs, tiny_data, tmp_path):
    ensemble("dawin", "--temperatures", 1, 1)
    out = tmp_path / "out"
    assert json.loads((out / CONFIG).read_text())["transductive"] is True
    clusters = json.loads((out / CLUSTERS).read_text())["sets"]
    start, end = (load_state(runs / name / SELECTED) for name in ("zero", "end"))
    for packed in opened(tiny_data):
        table = packed.manifest.class_to_group()
        both = [[grouped(z, table) for z in logits] for logits, _ in answers(runs, packed)]
        shares = reference.dawin_coefficients(*both)
        found = clusters[packed.manifest.dataset]
        assert sum(one["images"] for one in found) == len(packed)
        mixture = ensembling.fit_beta_mixture(torch.tensor(shares, dtype=torch.float64))
        cluster = mixture.assign(torch.tensor(shares, dtype=torch.float64)).numpy()
        probabilities = [None] * len(packed)
        for one, number in zip(found, np.unique(cluster), strict=True):
            own = np.flatnonzero(cluster == number)
            assert one["images"] == len(own)
            assert one["share"] == pytest.approx(float(mixture.means[number]), abs=1e-5)
            state = {
                name: (1 - one["share"]) * value + one["share"] * end.state[name]
                for name, value in start.state.items()
            }
            model = build_classifier(state, start.architecture)
            images = packed.batch(own, model.architecture.image_size).images_BCHW
            with torch.no_grad():
                for n, z in zip(own, model(images).tolist(), strict=True):
                    probabilities[n] = reference.softmax(grouped(z, table))
        require_answers(out, packed, probabilities)


@pytest.mark.parametrize("kind", ["ose", "vrf", "dawin"])
def test_the_forwards_of_a_test_image_are_those_of_the_table_of_costs(
    ensemble, tiny_data, monkeypatch, kind
):
    """The one-time work for VRF's bank does not grow with the test sets."""
    seen, features = [], Classifier.features

    def counting(self, patches_BPV, **options):
        seen.append(len(patches_BPV))
        return features(self, patches_BPV, **options)

    monkeypatch.setattr(Classifier, "features", counting)
    words = [] if kind == "ose" else ["--temperatures", 0.8, 1.7]
    packed, forwards = opened(tiny_data), []
    for out, sets in (("one", SETS[:1]), ("all", SETS)):
        seen.clear()
        ensemble(kind, *words, out=out, sets=sets)
        forwards.append(sum(seen))
    more = sum(len(one) for one in packed[1:])
    assert forwards[1] - forwards[0] == costs.besides(kind).forwards * more
    assert (forwards[0] > costs.besides(kind).forwards * len(packed[0])) == (kind == "vrf")


def contents(out: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    results = json.loads(found[RESULTS])
    del results["provenance"]
    return {**found, RESULTS: json.dumps(results).encode()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ose", "vrf", "dawin"])
def test_ranks_batches_and_kept_features_change_nothing(ensemble, runs, tiny_data, tmp_path, kind):
    ensemble(kind, out="one")
    ensemble(kind, "--batch-size", 1, "--features-dir", tmp_path / "features", out="small")
    ensemble(kind, "--features-dir", tmp_path / "features", out="kept")
    words = map(str, line(runs, tiny_data, tmp_path / "two"))
    done = torchrun(2, "rft.ensemble", kind, *words, "--device", "cpu")
    assert done.returncode == 0
    for name in ("small", "kept", "two"):
        assert contents(tmp_path / name) == contents(tmp_path / "one")


@pytest.mark.parametrize("kind", ["ose", "vrf", "dawin"])
def test_the_same_command_again_skips_and_a_damaged_file_is_made_anew(ensemble, tmp_path, kind):
    assert DONE not in ensemble(kind)
    before = contents(tmp_path / "out")
    assert DONE in ensemble(kind)
    path = predictions.path_of(tmp_path / "out", SETS[0])
    path.write_bytes(path.read_bytes()[:-7])
    assert DONE not in ensemble(kind)
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ose", "dawin"])
def test_a_full_disk_leaves_nothing_wrong(
    ensemble, wrong, runs, tiny_data, tmp_path, monkeypatch, refused, kind
):
    ensemble(kind, out="clean")
    clean = contents(tmp_path / "clean")
    publish = files.publish
    # config.json, clusters.json of DaWin, predictions of each set, results.json
    for allowed in range(2 + (kind == "dawin") + len(SETS)):
        out, left = tmp_path / str(allowed), iter(range(allowed))

        def fill(url, *rest, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device", url)
            return publish(url, *rest)

        words = kind, *line(runs, tiny_data, out)
        with monkeypatch.context() as patch:
            patch.setattr(files, "publish", fill)
            assert "No space left" in refused(ensemble_command, *words)
        assert not (out / RESULTS).exists()
        call(ensemble_command, *words)
        assert contents(out) == clean


def test_other_options_and_other_weights_need_another_folder(ensemble, wrong, runs, tmp_path):
    ensemble("ose")
    assert "holds a different ensemble: ensemble.alpha: 0.5 -> 0.7" in wrong("ose", "--alpha", 0.7)
    assert "holds a different ensemble: " in wrong("dawin", "--temperatures", 1, 1)
    saved = load_state(runs / "end" / SELECTED)
    state = {name: value + 1 for name, value in saved.state.items()}
    shutil.rmtree(runs / "end")
    config = {"recipe": "vanilla", "seed": 1, "imported_from": {"format": "test"}}
    write_run(runs / "end", saved._replace(state=state), config)
    assert "holds a different ensemble: ensemble_of.1: " in wrong("ose")


def test_what_cannot_be_an_ensemble_is_refused(wrong, runs, tiny_data, tmp_path, refused):
    other = partial(refused, ensemble_command)
    same = line(runs, tiny_data, tmp_path / "out")
    assert "same weights; name two models" in other("ose", same[0], *same[:1], *same[2:])
    # a weights file alone is known to be untrained by its header
    swapped = [same[1], runs / "zero" / SELECTED, *same[2:]]
    assert "ZERO_SHOT is the zero-shot model, FINE_TUNED the fine-tuned one; swap the two" in other(
        "ose", *swapped
    )
    assert "--alpha" in wrong("ose", "--alpha", 1.5)
    assert "--scale" in wrong("vrf", "--scale", 0)
    assert "--temperatures" in wrong("vrf", "--temperatures", 0, 1)
    assert "--components" in wrong("dawin", "--components", 0)
    assert "unknown ensemble 'osse'" in other("osse", *same)
    run = [*same[:5], runs / "end", *same[6:]]
    assert "holds a different model" in other("ose", *run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    full = [*same[:5], tmp_path / "full", *same[6:]]
    assert "is not empty and not a run folder" in other("ose", *full)


def test_without_held_out_images_temperatures_must_be_given(wrong, ensemble, runs):
    saved = load_state(runs / "end" / SELECTED)
    (seen,) = [held_out_of(runs / "end", saved.metadata)]
    metadata = {**saved.metadata, **entries([seen._replace(held_out=0)])}
    shutil.rmtree(runs / "end")
    config = {"recipe": "vanilla", "seed": 1, "imported_from": {"format": "test"}}
    write_run(runs / "end", saved._replace(metadata=metadata), config)
    for kind in ("vrf", "dawin"):
        message = wrong(kind)
        assert "has no images that its temperature may be fitted on" in message
        assert "--temperatures, such as 1 1" in message
        ensemble(kind, "--temperatures", 1, 1, out=kind)


def test_a_zero_shot_model_that_saw_the_held_out_images_sets_no_temperature(wrong, runs):
    saved = load_state(runs / "zero" / SELECTED)
    end = load_state(runs / "end" / SELECTED)
    seen = held_out_of(runs / "end", end.metadata)._replace(split_seed=4)
    shutil.rmtree(runs / "zero")
    config = {"recipe": "zero-shot", "seed": 0, "imported_from": {"format": "test"}}
    metadata = {**saved.metadata, **entries([seen])}
    write_run(runs / "zero", saved._replace(metadata=metadata), config)
    assert "was trained on images that" in wrong("vrf")


def test_vrf_needs_the_training_set_and_something_gained(wrong, ensemble, runs, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "argmax", lambda self, dim: torch.zeros(len(self)).long())
    assert "VRF has nothing to measure distances to" in wrong("vrf", "--temperatures", 1, 1)
    monkeypatch.undo()
    saved = load_state(runs / "end" / SELECTED)
    metadata = {**saved.metadata, "trained_on": "[]"}
    shutil.rmtree(runs / "end")
    config = {"recipe": "vanilla", "seed": 1, "imported_from": {"format": "test"}}
    write_run(runs / "end", saved._replace(metadata=metadata), config)
    assert "it is not known what it was trained on" in wrong("vrf", "--temperatures", 1, 1)
    # the others do not need training images
    ensemble("ose", out="ose")
    ensemble("dawin", "--temperatures", 1, 1, out="dawin")


def test_logits_that_are_not_finite_are_refused(wrong, runs):
    saved = load_state(runs / "end" / SELECTED)
    # finite weights with non-finite sums
    state = {**saved.state, "visual.proj": torch.full_like(saved.state["visual.proj"], 3e38)}
    shutil.rmtree(runs / "end")
    config = {"recipe": "vanilla", "seed": 1, "imported_from": {"format": "test"}}
    write_run(runs / "end", saved._replace(state=state), config)
    for kind in ("ose", "vrf", "dawin"):
        words = () if kind == "ose" else ("--temperatures", 1, 1)
        assert "are NaN or infinite" in wrong(kind, *words)


def test_an_ensemble_has_no_weights_to_use(ensemble, runs, tiny_data, tmp_path, refused):
    ensemble("ose", sets=SETS[:1])
    out = tmp_path / "out"
    message = refused(evaluate_command, out, "--data", tiny_data, "--sets", SETS[0])
    assert "is an ensemble of two models and has no weights of its own" in message


@pytest.mark.slow
def test_the_report_shows_ensembles_and_marks_the_transductive_one(
    ensemble, runs, tiny_data, tmp_path, capsys
):
    ends = [runs / "zero", runs / "end"]
    call(evaluate_command, *ends, "--data", tiny_data, "--workers", 0, "--sets", *SETS)
    for kind in ("ose", "vrf", "dawin"):
        ensemble(kind, out=kind)
    ensemble("ose", "--alpha", 0.3, out="less")
    outs = [tmp_path / kind for kind in ("ose", "vrf", "dawin", "less")]
    capsys.readouterr()
    call(report_command, *ends, *outs, "--out", tmp_path / "report")
    printed = capsys.readouterr().out
    assert "dawin (transductive)" in printed.replace("\n", " ").replace("dawin\n", "dawin ")
    for name in ("table.md", "table.csv", "table.tex", "statistics.csv", "index.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "dawin (transductive)" in text, name
        assert "ose" in text
        assert "vrf" in text
    page = (tmp_path / "report" / "index.html").read_text()
    assert "depend on the other test images" in page
    assert "Average the probabilities of zero-shot and vanilla" in page
    # accuracies with intervals, and the order of the tables
    with (tmp_path / "report" / "table.csv").open(newline="") as stream:
        names = [row["recipe"] for row in csv.DictReader(stream)]
    assert names == [
        *("zero-shot", "vanilla", "dawin (transductive)", "ose, alpha 0.3", "ose, alpha 0.5"),
        "vrf",
    ]
    # a manipulated file is detected
    config = tmp_path / "ose" / CONFIG
    config.write_text(config.read_text().replace("0.5", "0.6"))
    with pytest.raises(SystemExit):
        call(report_command, *ends, *outs, "--out", tmp_path / "report")
    assert "was changed after" in capsys.readouterr().err


def test_counts_are_those_of_the_members_on_any_world(made, tiny_data):
    """Members do not change: an ensemble does not affect the results of its single models."""
    saved = load_state(made / "end" / SELECTED)
    model = build_classifier(saved.state, saved.architecture)
    packed = PackedDataset(str(tiny_data / "imagenet-val"))
    world = World(rank=0, size=1, local_rank=0)
    (count,) = count_correct(
        [model], packed, image_size=16, world=world, device=torch.device("cpu")
    )
    (logits, _) = answers(made, packed)[1]
    assert count.correct == sum(np.argmax(logits, axis=1) == packed.index.label)
