"""Configurations check themselves and survive JSON."""

import dataclasses
import json

import pytest

from rft import recipes
from rft.config import Config, LoaderConfig, MethodConfig


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("scale", ["paper", "miniature"])
def test_every_recipe_round_trips(name, scale):
    config = recipes.build(name, scale=scale, data="d", run="r")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.recipe == name
    assert config.scale == scale


def test_the_papers_numbers():
    config = recipes.build("object-mask-single-fill")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.epochs) == (3e-5, 0.1, 10)
    assert (config.optim.warmup_steps, config.optim.clip_norm) == (500, 1.0)
    assert (config.loader.batch_size, config.loader.held_out) == (512, 10240)
    assert (config.method.distill_weight, config.method.threshold) == (30, 0.3)


def test_identity_is_what_decides_the_result():
    config = recipes.build("vanilla", data="a", run="b")
    moved = dataclasses.replace(
        config, data="c", run="d", loader=dataclasses.replace(config.loader, workers=4)
    )
    assert moved.identity() == config.identity()
    assert dataclasses.replace(config, seed=1).identity() != config.identity()
    assert dataclasses.replace(config, split_seed=0).identity() == config.identity()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoaderConfig(batch_size=0), "loader.batch_size is 0"),
        (lambda: LoaderConfig(batch_size=64, streams=3), "loader.streams is 3"),
        (lambda: MethodConfig(threshold=1.5), "method.threshold is 1.5"),
        (lambda: recipes.build("object-mask-singlefill"), "did you mean 'object-mask-single-fill'"),
        (lambda: Config.from_dict({"recipes": 1}), "unknown fields: recipes"),
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
