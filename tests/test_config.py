"""Configurations validate themselves and survive JSON."""

import dataclasses
import json

import pytest

from rft import paper, recipes
from rft.config import (
    Config,
    LoaderConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    completed,
    settings,
)
from rft.storage import documents, files


@pytest.mark.parametrize("name", recipes.TRAINED)
@pytest.mark.parametrize("scale", ["paper", "miniature"])
@pytest.mark.parametrize("preset", ["paper", "official-parity"])
def test_every_recipe_round_trips(name, scale, preset):
    config = recipes.build(name, scale=scale, preset=preset, data="d", run="r")
    assert documents.convert(json.loads(json.dumps(config.to_dict())), Config, "config") == config
    assert config.recipe == name
    assert config.scale == scale


def test_the_papers_numbers():
    config = recipes.build("object-mask-single-fill")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.epochs) == (3e-5, 0.1, 10)
    assert (config.optim.warmup_steps, config.optim.clip_norm) == (500, 1.0)
    assert (config.loader.batch_size, config.loader.held_out) == (512, 10240)
    assert (config.method.distill_weight, config.method.threshold) == (30, 0.3)


def test_adamws_numbers_are_the_papers():
    optim = recipes.build("vanilla").optim
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (optim.schedule, optim.clip, optim.accumulate) == ("cosine", "step", 1)


# recipe -> mask, fill, and the threshold or rate in the released code's example script
SETTINGS = {
    "no-mask": ("none", "none", None),
    "random-mask-no-fill": ("random", "none", 0.75),
    "context-mask-no-fill": ("context", "none", 0.6),
    "object-mask-no-fill": ("object", "none", 0.3),
    "random-mask-single-fill": ("random", "single", 0.5),
    "context-mask-single-fill": ("context", "single", 0.5),
    "object-mask-single-fill": ("object", "single", 0.3),
    "random-mask-multi-fill": ("random", "multi", 0.5),
    "context-mask-multi-fill": ("context", "multi", 0.3),
    "object-mask-multi-fill": ("object", "multi", 0.6),
    "wise-kd-object-mask-single-fill": ("object", "single", 0.3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_masked_recipe_is_what_its_name_says(name):
    method = recipes.build(name).method
    mask, fill, setting = SETTINGS[name]
    assert (method.mask, method.fill) == (mask, fill)
    if setting is not None:
        assert (method.rate if mask == "random" else method.threshold) == setting
    assert method.distill_weight == 30
    assert (method.kd_weight, method.kd_temperature) == (float(name.startswith("wise-kd")), 10)
    # beta weighs a mean square of features, which is ten times larger in the miniature's CLIP
    assert recipes.build(name, scale="miniature").method.distill_weight == 3


@pytest.mark.parametrize("name", ["zero-shot", "vanilla", "linear-probe", "lp-ft"])
def test_baselines_distil_nothing(name):
    config = recipes.build(name)
    assert (config.method.distill_weight, config.method.kd_weight) == (0, 0)
    assert (config.method.mask, config.method.fill) == ("none", "none")
    epochs = {"zero-shot": 0, "vanilla": 10, "linear-probe": 5, "lp-ft": 5}
    assert config.optim.epochs == epochs[name]
    assert config.optim.trains == ("head" if name == "linear-probe" else "all")


def test_identity_is_what_decides_the_result():
    config = recipes.build("vanilla", data="a", run="b")
    moved = dataclasses.replace(
        config, data="c", run="d", loader=dataclasses.replace(config.loader, workers=4)
    )
    assert moved.identity() == config.identity()
    assert dataclasses.replace(config, seed=1).identity() != config.identity()
    assert dataclasses.replace(config, split_seed=0).identity() == config.identity()
    assert dataclasses.replace(config, order_seed=0).identity() == config.identity()
    assert dataclasses.replace(config, order_seed=1).identity() != config.identity()


def test_the_official_preset_is_the_released_code():
    paper = recipes.build("object-mask-single-fill")
    official = recipes.build("object-mask-single-fill", preset="official-parity", data="", run="")
    changed = files.difference(paper.to_dict(), dataclasses.replace(official, seed=7).to_dict())
    assert sorted(changed) == [
        "method.same_draws: False -> True",
        "optim.clip: 'step' -> 'micro-step'",
        "optim.schedule: 'cosine' -> 'one-cycle'",
        "order_seed: None -> 0",
        "precision: 'auto' -> 'tf32'",
        "preset: 'paper' -> 'official-parity'",
        "seed: 0 -> 7",
    ]
    assert dataclasses.replace(official, seed=7).sample_seed == 0
    assert dataclasses.replace(official, seed=7).held_out_seed == 7


@pytest.mark.parametrize(("scale", "rate"), [("paper", 3e-5), ("small", 3e-5), ("miniature", 3e-4)])
def test_the_official_linear_probe_is_the_released_codes(scale, rate):
    probe = recipes.build("linear-probe", scale=scale, preset="official-parity")
    tuned = recipes.build("vanilla", scale=scale, preset="official-parity")
    # the released run.sh: the zero-shot model, frozen, --weight_decay 0, all else as fine-tuning
    assert probe.optim == dataclasses.replace(tuned.optim, trains="head", weight_decay=0.0)
    assert (probe.optim.epochs, probe.optim.lr) == (10, rate)
    assert probe.model == tuned.model


def test_no_row_of_the_paper_lacks_a_recipe():
    rows = {row.recipe for row in (*paper.VIT_B_32, *paper.VIT_B_16)}
    assert rows - {"wise-ft-0.5"} <= {*recipes.TRAINED, *recipes.MERGED}
    assert "wise-ft" in recipes.MERGED


def test_help_shows_every_system_and_the_grid():
    text = recipes.list_in_words()
    for name in (*recipes.TRAINED, *recipes.MERGED):
        assert f"  {name} " in text
    assert "--method.threshold 0.3 0.4 0.5 0.6" in text
    assert "--method.rate 0.25 0.5 0.75" in text


RANDOM, START = ModelConfig(head="random"), ModelConfig(start="probe")


def held(model: ModelConfig, **optim) -> Config:
    return Config(recipe="", data="d", run="r", model=model, optim=OptimConfig(**optim))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoaderConfig(batch_size=0), "loader.batch_size is 0"),
        (lambda: LoaderConfig(batch_size=64, streams=3), "loader.streams is 3"),
        (lambda: MethodConfig(threshold=1.5), "method.threshold is 1.5"),
        (lambda: MethodConfig(kd_temperature=0), "method.kd_temperature is 0"),
        (lambda: MethodConfig(mask="object", distill_weight=0), "method.mask is object; it must"),
        (lambda: MethodConfig(fill="single"), "method.fill is single; it must be none where"),
        (lambda: MethodConfig(kd_teacher="x"), "method.kd_teacher is x; it must be empty"),
        (lambda: OptimConfig(lr=float("inf")), "optim.lr is inf"),
        (lambda: OptimConfig(beta1=1.0), "optim.beta1 is 1.0"),
        (lambda: OptimConfig(weight_decay=-1), "optim.weight_decay is -1"),
        (lambda: OptimConfig(l2_sp=-1), "optim.l2_sp is -1"),
        (lambda: OptimConfig(optimizer="adam"), "optim.optimizer is 'adam'"),
        (lambda: OptimConfig(optimizer="spd", spd=0), "optim.spd is 0"),
        (lambda: OptimConfig(optimizer="ftp", ftp_k=1.1), "optim.ftp_k is 1.1"),
        (lambda: OptimConfig(spd=0.5), "optim.spd is 0.5; it must be 1 where optim.optimizer is"),
        (lambda: OptimConfig(optimizer="spd", ftp_k=0.5), "is 0.5; it must be 1 where .* not ftp"),
        (lambda: held(optimizer="spd", model=RANDOM), "model.head is random; it must be zero-shot"),
        (lambda: held(l2_sp=0.1, model=RANDOM), "model.head is random; it must be zero-shot"),
        (lambda: held(optimizer="ftp", model=START), "model.start is probe; it must be empty for"),
        (
            lambda: dataclasses.replace(
                recipes.build("object-mask-single-fill"), model=ModelConfig(head="random")
            ),
            "model.head is random; it must be zero-shot where a CAM",
        ),
        (
            lambda: recipes.require_inputs(
                dataclasses.replace(recipes.build("zero-shot"), model=ModelConfig(start="x"))
            ),
            "zero-shot is the pre-trained model as it is",
        ),
        (lambda: recipes.build("wise-ft"), "not trained but merged: python -m rft.merge"),
        (lambda: recipes.build("vanilla", preset="official"), "unknown preset 'official'"),
        (
            lambda: dataclasses.replace(
                recipes.build("linear-probe"), method=recipes.build("no-mask").method
            ),
            "distill_weight is 30.0; it must be 0 where only the head is trained",
        ),
        (lambda: recipes.build("object-mask-singlefill"), "did you mean 'object-mask-single-fill'"),
        (lambda: documents.convert({"recipes": 1}, Config, "config"), "config: recipe is missing"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_must_fit_the_ranks():
    config = recipes.build("object-mask-single-fill")
    assert config.micro_batch(8) == 64
    with pytest.raises(ValueError, match="cannot be cut into 3 ranks x 1 accumulation"):
        config.micro_batch(3)
    with pytest.raises(ValueError, match="needs another image in the micro-batch"):
        config.micro_batch(512)
    assert recipes.build("vanilla").micro_batch(512) == 1


def test_a_record_of_before_an_option_has_its_default():
    config = recipes.build("vanilla")
    now = config.identity()
    older = {**now, "optim": {k: v for k, v in now["optim"].items() if k != "clip"}}
    assert completed(older) == now
    whole = config.to_dict()
    whole["optim"].pop("clip")
    assert settings(whole) == settings(config.to_dict())
    # without a known option it keeps its value, and unknown options are kept
    assert completed({"merged_from": [1], "method": 3}) == {"merged_from": [1], "method": 3}
    assert completed({"optim": {"later": 1}})["optim"]["later"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "random", "fill": "single", "cam_model": "teacher"}, "no CAM decides the masks"),
        ({"distill_weight": 0, "head_weight": 1.0}, "beside the features"),
        ({"mask": "object", "fill": "none", "donor_choice": "unlike"}, "are refilled"),
        (
            {"mask": "object", "fill": "single", "donor_choice": "unlike", "donors": "global"},
            "local donors",
        ),
        (
            {
                "mask": "object",
                "fill": "single",
                "donor_choice": "unlike",
                "single_fill": "derangement",
            },
            "with replacement",
        ),
    ],
)
def test_a_research_option_without_effect_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**changes)


def test_patterns_of_frozen_weights_are_part_of_the_identity_and_survive_json(tmp_path):
    config = recipes.build("vanilla", data="d", run=str(tmp_path))
    frozen = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, freeze=("a*", "b"))
    )
    assert frozen.identity() != config.identity()
    path = str(tmp_path / "config.json")
    files.write_json(path, frozen.to_dict())
    # of a recorded run and of one created now, whose lists have the same type
    assert files.read_document(path, Config).identity() == frozen.identity()
    assert settings(files.read_json(path)) == settings(frozen.to_dict())


def test_a_record_of_before_the_methods_in_weight_space_is_a_run_without_them():
    config = recipes.build("vanilla")
    older = config.identity()
    for name in ("freeze", "l2_sp", "optimizer", "spd", "ftp_k"):
        older["optim"].pop(name)
    assert completed(older) == config.identity()
