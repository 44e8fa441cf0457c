"""CAR-FT, Lipsum-FT, FLYP and moving teachers: their steps, their options, their runs."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft import recipes
from rft.clip.classifier import load_state
from rft.clip.load import load_clip
from rft.clip.text import TextTower, head_weight, tokenize_prompts
from rft.config import Config, LoaderConfig, MethodConfig, ModelConfig, OptimConfig
from rft.dist import World
from rft.evaluate import command as evaluate_command
from rft.loading.dataset import Batch
from rft.merge import command as merge_command
from rft.method.contrastive import draw_templates
from rft.runs.filenames import LAST, SELECTED
from rft.shards.manifest import Manifest
from rft.storage import files
from rft.train import command, features, loop, texts
from rft.train.build import prepare
from rft.train.contrastive import Pairs
from rft.train.objective import Objective, TextDraws
from rft.train.step import draw_texts, terms_of
from tests import tiny
from tests.conftest import NAMES, TEMPLATES, build_clip, build_model, build_texts
from tests.reference import later, textbook

ALONE = World(rank=0, size=1, local_rank=0)
CPU = torch.device("cpu")
RANDOM_FILL = recipes.build("random-mask-single-fill").method

# no weight is 1, so that an ignored one shows
METHODS = {
    "car-ft": replace(recipes.build("car-ft").method, context_weight=2.5),
    "lipsum-ft": replace(recipes.build("lipsum-ft").method, lipsum_weight=0.3),
    "flyp": recipes.build("flyp").method,
    "all terms": MethodConfig(
        distill_weight=7, context_weight=2.5, lipsum_weight=0.3, loss="contrastive"
    ),
    "contexts with masks": replace(recipes.build(recipes.DEFAULT).method, context_weight=2.5),
}


def draws_of(objective: Objective, samples: torch.Tensor, step: int = 3) -> TextDraws:
    """The texts of a step with seed 0; FLYP's templates by a key of the test's own."""
    random_ME = pairs = None
    if objective.random_texts is not None:
        random_ME = objective.random_texts(objective.random_texts.draw(0, step))
    if objective.contrast is not None:
        template_B = draw_templates(samples, objective.contrast.templates, key=5)
        pairs = Pairs(template_B, lambda rows: rows, 0)
    return TextDraws(random_ME, pairs)


def reference_loss(objective: Objective, images, labels, template_B, random_ME) -> torch.Tensor:
    """The clean part of a step, image by image and text by text, through open_clip's text tower."""
    method, student, teacher = objective.method, objective.student, objective.teacher
    clip = build_clip()
    if objective.contrast is not None:
        # its parameters are those whose gradients are compared
        clip.model.load_state_dict(
            {**clip.model.state_dict(), **objective.contrast.tower.state_dict()}
        )
    pixels = textbook.normalise_images(student, images)
    own = [textbook.features(student.visual, image)[0] for image in pixels]
    with torch.no_grad():
        theirs = [textbook.features(teacher.visual, image)[0] for image in pixels]
    if method.loss == "contrastive":
        names = [
            TEMPLATES[m].replace("{c}", NAMES[label])
            for m, label in zip(template_B.tolist(), labels.tolist(), strict=True)
        ]
        found = [later.text_feature(clip.model, text) for text in clip.tokenize(names)]
        loss = later.info_nce(own, found, clip.model.logit_scale.exp())
    else:
        rows = [
            -textbook.logits(student, feature).log_softmax(dim=-1)[label]
            for feature, label in zip(own, labels, strict=True)
        ]
        loss = torch.stack(rows).mean()
    if method.distill_weight and not method.masks:
        squares = [((a - b) ** 2).mean() for a, b in zip(own, theirs, strict=True)]
        loss = loss + method.distill_weight * torch.stack(squares).mean()
    if method.context_weight:
        prompts = tokenize_prompts(clip, NAMES, TEMPLATES)
        contexts = []
        for m in range(len(TEMPLATES)):
            vectors = [later.text_feature(build_clip().model, row) for row in padded(prompts[:, m])]
            scale = build_clip().model.logit_scale.exp()
            contexts.append((scale * later.unit(torch.stack(vectors).mean(dim=0))).detach())
        term = later.context_divergence(torch.stack(own), torch.stack(theirs), contexts)
        loss = loss + method.context_weight * term
    if method.lipsum_weight:
        term = later.random_text_distance(torch.stack(own), torch.stack(theirs), random_ME)
        loss = loss + method.lipsum_weight * term
    return loss, clip


def padded(tokens_KT: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(tokens_KT, (0, 12 - tokens_KT.shape[1]))


@pytest.mark.parametrize("name", METHODS)
def test_the_clean_gradients_are_the_references(name, images_BCHW, labels_B):
    method = METHODS[name]
    objective = Objective(build_model(0), build_model(1), method, texts=build_texts(method))
    drawn = draws_of(objective, torch.arange(6))
    slow = copy.deepcopy(objective)
    clean = objective(images_BCHW, labels_B, None, texts=drawn)
    clean.loss.backward()
    template_B = None if drawn.pairs is None else drawn.pairs.template_B
    loss, clip = reference_loss(slow, images_BCHW, labels_B, template_B, drawn.random_ME)
    loss.backward()
    torch.testing.assert_close(clean.loss, loss, rtol=1e-5, atol=1e-5)
    pairs = [
        (name, p, dict(slow.student.named_parameters())[name])
        for name, p in objective.student.named_parameters()
    ]
    if objective.contrast is not None:
        theirs = dict(clip.model.named_parameters())
        pairs += [(n, p, theirs[n]) for n, p in objective.contrast.tower.named_parameters()]
    for key, fast, reference in pairs:
        if key.startswith("head.") and objective.contrast is not None:
            assert fast.grad is None  # not part of the loss
            continue
        scale = reference.grad.abs().max().clamp(min=1e-3)
        difference = (fast.grad - reference.grad).abs().max() / scale
        assert difference < 1e-5, f"{key}: {difference}"


def test_flyps_own_options_are_its_papers():
    config = recipes.build("flyp")
    assert (config.optim.lr, config.optim.weight_decay) == (1e-5, 0.1)
    assert (config.loader.batch_size, config.optim.epochs) == (512, 10)
    assert recipes.build("lipsum-ft").optim.weight_decay == 0


def test_random_texts_are_a_steps_own_and_no_ranks():
    objective = build_objective("lipsum-ft")
    first = objective.random_texts.draw(0, 7)
    assert torch.equal(first, objective.random_texts.draw(0, 7))
    assert not torch.equal(first, objective.random_texts.draw(0, 8))
    assert not torch.equal(first, objective.random_texts.draw(1, 7))
    assert first.shape == (80, 10)
    assert (first[:, 0] == 1).all()
    assert (first[:, -1] == 8).all()
    # any word except start and end, each about as often
    counts = torch.cat([objective.random_texts.draw(0, n)[:, 1:-1] for n in range(40)])
    counts = counts.flatten().bincount(minlength=9)
    assert counts[1] == counts[8] == 0
    assert counts[counts > 0].min() > 0.9 * counts.sum() / 7


def test_a_text_tower_with_little_room_reads_shorter_random_texts():
    clip = build_clip()
    short = replace(clip, tokenize=lambda texts: clip.tokenize(texts)[:, :6])
    random = texts.RandomTexts(short, TextTower(clip, "a test"))
    assert random.draw(0, 0).shape == (80, 6)


def build_objective(recipe: str) -> Objective:
    method = recipes.build(recipe).method
    return Objective(build_model(0), build_model(1), method, texts=build_texts(method))


def test_contexts_need_two_templates():
    method = recipes.build("car-ft").method
    with pytest.raises(ValueError, match=r"--method.context-weight needs two prompt templates"):
        texts.build(build_clip(), NAMES, TEMPLATES[:1], method)


def test_most_methods_keep_no_text_tower():
    assert texts.build(build_clip(), NAMES, TEMPLATES, MethodConfig()) == texts.Texts()
    assert texts.Texts().fingerprint() == {}
    assert len(build_texts(recipes.build("car-ft").method).fingerprint()["text_sha256"]) == 64


def test_a_step_reports_the_terms_that_its_method_has():
    assert terms_of(recipes.build("vanilla").method) == ("ce", "mse", "kd", "replaced")
    assert terms_of(METHODS["contexts with masks"])[-2:] == ("replaced", "context")
    expected = ("contrastive", "mse", "kd", "replaced", "context", "lipsum")
    assert terms_of(METHODS["all terms"]) == expected


FLYP = {"loss": "contrastive", "distill_weight": 0}
REFUSED = {
    "masks of a CAM": (
        lambda: MethodConfig(mask="object", loss="contrastive"),
        "method.mask is object; it must be none or random where the loss is contrastive",
    ),
    "a second teacher": (
        lambda: MethodConfig(**FLYP, kd_weight=1),
        r"method.kd_weight is 1.0; it must be 0 where the loss is contrastive",
    ),
    "a probe": (
        lambda: config(MethodConfig(**FLYP), optim=OptimConfig(trains="head")),
        "optim.trains is head; it must be all where the loss is contrastive",
    ),
    "a random head": (
        lambda: config(MethodConfig(**FLYP), model=ModelConfig(head="random")),
        "model.head is random; it must be zero-shot where the loss is contrastive",
    ),
    "a run to start from": (
        lambda: config(MethodConfig(**FLYP), model=ModelConfig(start="runs/a")),
        "model.start is runs/a; it must be empty where the loss is contrastive",
    ),
    "a batch in parts": (
        lambda: config(MethodConfig(**FLYP), optim=OptimConfig(accumulate=2)),
        "optim.accumulate is 2; it must be 1 where the loss is contrastive",
    ),
    "an image alone": (
        lambda: config(MethodConfig(**FLYP), loader=LoaderConfig(batch_size=1)),
        "loader.batch_size is 1; it must be 2 or more where the loss is contrastive",
    ),
    "contexts of a probe": (
        lambda: config(MethodConfig(distill_weight=0, context_weight=1), optim=PROBE),
        "method.context_weight is 1.0; it must be 0 where only the head is trained",
    ),
    "random texts of a probe": (
        lambda: config(MethodConfig(distill_weight=0, lipsum_weight=1), optim=PROBE),
        "method.lipsum_weight is 1.0; it must be 0 where only the head is trained",
    ),
    "a teacher of nothing": (
        lambda: MethodConfig(distill_weight=0, teacher="wma"),
        "method.teacher is wma; it must be frozen where distill-weight is 0",
    ),
    "a moving pre-trained model": (
        lambda: MethodConfig(teacher="ema", context_weight=1),
        "method.teacher is ema; it must be frozen where context-weight, lipsum-weight",
    ),
    "a decay of nothing": (
        lambda: MethodConfig(teacher="wma", teacher_decay=0.9),
        "method.teacher_decay is 0.9; it must be 0.999 where the teacher is not ema",
    ),
}
PROBE = OptimConfig(trains="head")


def config(method: MethodConfig, **parts) -> Config:
    return Config(recipe="vanilla", data="d", run="r", method=method, **parts)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused(case):
    build, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        build()


def test_a_refusal_is_one_line(refused, tmp_path):
    options = ("--data", tmp_path, "--run-dir", tmp_path / "run", "--optim.accumulate", 2)
    line = refused(command, "flyp", *options)
    assert "because the negatives are those of the whole batch" in line


RUNS = {
    "car-ft": ("car-ft",),
    "lipsum-ft": ("lipsum-ft",),
    "flyp": ("flyp",),
    "flyp on counterfactuals": (
        *("random-mask-single-fill", "--method.loss", "contrastive"),
        *("--method.teacher", "wma"),
    ),
    "ema": (recipes.DEFAULT, "--method.teacher", "ema", "--method.teacher-decay", "0.8"),
    "wma": ("no-mask", "--method.teacher", "wma"),
    "contexts and random texts": (
        *(recipes.DEFAULT, "--method.context-weight", "1", "--method.lipsum-weight", "0.1"),
    ),
}
LENGTH = ("--loader.held-out", 16, "--optim.epochs", 2, "--log.checkpoint-steps", 4)


class Killed(BaseException):
    """Ends a training in the middle of a step."""


def die_at(step: int, monkeypatch) -> None:
    whole = loop.accumulate_gradients

    def dying(job, module, batch, at, *rest):
        if at == step:
            raise Killed
        return whole(job, module, batch, at, *rest)

    monkeypatch.setattr(loop, "accumulate_gradients", dying)


def newest(run: Path) -> dict:
    path = max((run / "checkpoints").glob("step-*.pt"))
    return torch.load(path, weights_only=True)


def leaves(value) -> list:
    """Every tensor and number of a checkpoint, in order, tensors as their exact bytes."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value]


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_a_killed_run_ends_as_an_undisturbed_one(train, monkeypatch, case):
    recipe, *options = RUNS[case]
    calm = train(recipe, *LENGTH, *options, name="calm")
    with monkeypatch.context() as patch:
        # after an epoch's end, where a head was rebuilt, and a checkpoint in the middle of the next
        die_at(17, patch)
        with pytest.raises(Killed):
            train(recipe, *LENGTH, *options, name="killed")
    killed = train(recipe, *LENGTH, *options, name="killed")
    for name in (SELECTED, LAST):
        assert files.sha256_file(killed / name) == files.sha256_file(calm / name), name
    one, two = newest(calm), newest(killed)
    assert one.keys() == two.keys()
    assert leaves(one) == leaves(two)
    has = {"text": "contrastive" in options or recipe == "flyp", "teacher": "--method.teacher"
           in options}  # fmt: skip
    assert {name: name in one for name in has} == has


def test_flyps_head_is_the_trained_text_towers(train, tiny_data, tiny_clip):
    run = train("flyp", *LENGTH)
    saved = load_state(run / LAST)
    clip = load_clip(ModelConfig(clip=tiny_clip))
    tower = TextTower(clip, "a test")
    start = head_weight(tower, prompts_of(clip, tiny_data))
    trained = newest(run)["text"]
    assert not torch.equal(trained["logit_scale"], tower.logit_scale)
    tower.load_state_dict(trained)
    found = head_weight(tower, prompts_of(clip, tiny_data))
    assert torch.equal(saved.state["head.weight"], found)
    assert (found - start).abs().max() > 0.01
    assert (saved.state["head.bias"] == 0).all()


def prompts_of(clip, data: Path) -> torch.Tensor:
    manifest = Manifest.load(f"{data}/imagenet-train")
    return tokenize_prompts(clip, manifest.classes, manifest.templates)


def lines(run: Path) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if "loss" in line]


def test_metrics_have_the_terms_and_their_sum(train):
    every = ("--log.every-steps", 1)
    for line in lines(train("flyp", *every)):
        assert "ce" not in line
        assert line["loss"] == line["contrastive"] > 0
    options = ("--method.context-weight", 2, "--method.lipsum-weight", 3, *every)
    found = lines(train("no-mask", *options))
    assert found[-1]["context"] > 0
    assert found[-1]["lipsum"] > 0
    for line in found:
        total = line["ce"] + 3 * line["mse"] + 2 * line["context"] + 3 * line["lipsum"]
        assert line["loss"] == pytest.approx(total)
    (line, *_) = lines(train("vanilla", *every))
    assert not {"contrastive", "context", "lipsum"} & line.keys()


@pytest.fixture
def job(tiny_data, tiny_clip, tmp_path):
    """A job of the tiny world, by recipe and options."""

    def build(recipe: str, *options: str):
        words = tiny.training(recipe, tiny_data, tiny_clip, tmp_path / "run", *options)
        parsed = replace(command.parse(words), precision="fp32")
        return prepare(parsed, ALONE, CPU)

    return build


def test_a_moving_teacher_begins_as_the_student_and_is_never_cached(job, train):
    probe = train("linear-probe", "--optim.epochs", 1)
    options = ("--method.teacher", "wma", "--optim.epochs", "3", "--model.start", str(probe))
    moving = job("no-mask", *options)
    assert moving.objective.frozen == {}
    assert not features.keeps(moving)
    assert features.keeps(job("no-mask", "--optim.epochs", "3"))
    start = dict(moving.student.visual.named_parameters())
    for name, value in moving.objective.teacher.visual.named_parameters():
        assert torch.equal(value, start[name])
        assert not value.requires_grad


@pytest.mark.parametrize("teacher", ["frozen", "wma"])
def test_a_moving_teacher_stays_fp32(tiny_data, tiny_clip, tmp_path, teacher):
    options = ("--method.teacher", teacher, "--precision", "bf16")
    words = tiny.training("no-mask", tiny_data, tiny_clip, tmp_path / "run", *options)
    made = prepare(command.parse(words), ALONE, CPU)
    kinds = {p.dtype for p in made.objective.teacher.visual.parameters() if p.ndim > 1}
    assert kinds == {torch.bfloat16 if teacher == "frozen" else torch.float32}


def test_the_teacher_moves_with_the_run(train):
    run = train("no-mask", *LENGTH, "--method.teacher", "wma")
    saved = newest(run)
    student = {k.removeprefix("visual."): v for k, v in saved["model"].items()}
    moved = max((student[k] - v).abs().max() for k, v in saved["teacher"].items())
    assert moved > 0
    other = newest(train("no-mask", *LENGTH, "--method.teacher", "ema", name="ema"))
    assert any(not torch.equal(v, other["teacher"][k]) for k, v in saved["teacher"].items())


def test_prompts_follow_the_sample_and_not_its_place(job):
    made = job("flyp")
    samples = torch.tensor([5, 9, 30, 2, 7, 11])
    labels = torch.zeros(6, dtype=torch.int64)
    batch = texts_batch(labels, samples)
    whole = draw_texts(made, made.objective, batch, step=4).pairs
    part = draw_texts(made, made.objective, texts_batch(labels[3:], samples[3:]), step=4).pairs
    assert torch.equal(whole.template_B[3:], part.template_B)
    many = torch.arange(500)
    now, next_step = (
        draw_texts(made, made.objective, texts_batch(many, many), step=step).pairs.template_B
        for step in (4, 5)
    )
    assert not torch.equal(now, next_step)


def texts_batch(labels: torch.Tensor, samples: torch.Tensor) -> Batch:
    return Batch(torch.empty(0), labels, samples)


@pytest.mark.slow
def test_features_of_the_pretrained_tower_are_kept(train):
    options = ("--optim.epochs", 3, "--loader.held-out", 16, "--loader.batch-size", 7)
    for recipe in ("car-ft", "lipsum-ft"):
        kept = train(recipe, *options, name=f"{recipe}-kept")
        plain = train(recipe, *options, "--loader.features-gb", 0, name=f"{recipe}-plain")
        assert tiny.weights(kept) == tiny.weights(plain)
        assert (kept / LAST).exists()


def test_masks_of_random_fills_go_with_flyp():
    method = replace(RANDOM_FILL, loss="contrastive")
    assert method.masks
    assert not method.needs_cam


def test_a_flyp_run_is_evaluated_and_averaged_as_any_other(train, tiny_data, tmp_path):
    zero, run = train("zero-shot", "--optim.epochs", 0), train("flyp", *LENGTH)
    assert load_state(run / SELECTED).state.keys() == load_state(zero / SELECTED).state.keys()
    mixed = tmp_path / "mixed"
    tiny.call(merge_command, "wise", zero, run, "--alpha", 0.5, "--out", mixed)
    options = ("--data", tiny_data, "--sets", "imagenet-val", "--workers", 0)
    tiny.call(evaluate_command, run, mixed, *options)
    for folder in (run, mixed):
        found = json.loads((folder / "results.json").read_text())["sets"]["imagenet-val"]
        assert found["total"] == 28


@pytest.mark.parametrize("recipe", recipes.LATER)
def test_a_set_of_some_photos_is_enough(train, recipe):
    run = train(recipe, "--scale", "small", "--loader.held-out", 8, "--optim.epochs", 1)
    assert (run / "training.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["flyp", "ema", "contexts and random texts"])
def test_bf16_learns_about_the_same(train, case):
    recipe, *options = RUNS[case]
    ends = {}
    for precision in ("fp32", "bf16"):
        run = train(recipe, *LENGTH, *options, "--precision", precision, name=precision)
        ends[precision] = lines(run)[-1]["loss"]
        assert all(value.dtype == torch.float32 for value in newest(run).get("text", {}).values())
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=0.05)
