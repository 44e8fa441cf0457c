"""Preparation of a run: data, models, plan, and the hashes that identify them."""

import copy
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from rft import rng
from rft.classes import Classes, check_head, compare_prompts
from rft.clip import vit
from rft.clip.classifier import Classifier, load_state, map_state, tower_sha256
from rft.clip.head import zero_shot_head
from rft.clip.load import load_clip
from rft.config import Config
from rft.dist import World
from rft.loading import augment
from rft.loading.batches import TrainingBatches, fingerprint, plan_training
from rft.loading.dataset import PackedDataset
from rft.method.averaging import require_alike
from rft.runs import trained_on
from rft.runs.folder import checkpoint_path, require_own_weights, unfinished
from rft.runs.trained_on import TrainedOn
from rft.shards.cache import Cache
from rft.shards.guard import require_no_test_images
from rft.shards.manifest import warn_of_one_class
from rft.storage import files
from rft.train import texts
from rft.train.job import Job
from rft.train.objective import Objective
from rft.train.texts import Texts

log = logging.getLogger(__name__)


def prepare(config: Config, world: World, device: torch.device) -> Job:
    """Load data and models and make the plan; the same on every rank.

    Raises:
        ValueError: if the data, the model or the configuration do not fit together.
    """
    loader = config.loader
    cache = Cache(Path(loader.cache_dir), int(loader.cache_gb * 1e9)) if loader.cache_dir else None
    url = files.join(config.data, config.train_set)
    packed = PackedDataset(url, cache=cache, max_pixels=loader.max_pixels, option="--train-set")
    warn_of_one_class(packed.url, packed.manifest.groups)
    require_no_test_images(config.data, config.train_set, packed.manifest, packed.index.key)
    plan, samples, held_out = plan_training(packed, config)
    if loader.augment != "none":
        packed.require_decoded(f"--loader.augment {loader.augment}")
    pretrained = load_clip(config.model)
    # decode one image now, so that shards of the wrong size stop the run here and not in training
    packed.image(int(samples[0]), pretrained.architecture.image_size)
    # before the head is built: embedding ImageNet's prompts takes an hour on one CPU thread
    pretrained.model.to(device)
    prompts = (packed.manifest.classes, packed.manifest.templates)
    head = zero_shot_head(pretrained, *prompts)
    own_texts = texts.build(pretrained, *prompts, config.method)
    teacher = Classifier(pretrained.model.visual, head, pretrained.architecture)
    classes = packed.manifest.label_space
    # the frozen teacher is the pre-trained model; the student starts as a copy of it
    student = starting_student(config, teacher, classes)
    ensemble = second_teacher(config, teacher, classes)
    pretrained_sha256 = tower_sha256(teacher)
    objective = join(config, student, teacher, ensemble=ensemble, own_texts=own_texts)
    batches = TrainingBatches(
        packed,
        samples,
        plan,
        image_size=pretrained.architecture.image_size,
        rank=world.rank,
        world_size=world.size,
        ranks_on_node=world.ranks_on_node,
        augment_seed=None if loader.augment == "none" else config.seed,
    )
    return Job(
        config=config,
        world=world,
        device=device,
        objective=objective.to(device),
        batches=batches,
        held_out=held_out,
        fingerprint={
            **fingerprint(packed, plan, loader.held_out, config.held_out_seed, loader.shots),
            **({} if loader.augment == "none" else {"augmentation": augment.ALGORITHM}),
            **inputs_fingerprint(config),
            "pretrained_sha256": pretrained_sha256,
            **own_texts.fingerprint(),
        },
        start_seen=start_seen(config),
    )


def join(
    config: Config,
    student: Classifier,
    teacher: Classifier,
    *,
    ensemble: Classifier | None = None,
    own_texts: Texts = Texts(),  # noqa: B008 (a constant)
) -> Objective:
    """Join the models of a run into its objective, on their device.

    A frozen `teacher` and the `ensemble` are converted to the run's precision; a moving teacher
    starts with the student's weights.
    """
    moves = config.method.teacher != "frozen"
    lowered = config.precision == "bf16"
    # theta_0 in fp32, if the teacher below is moved or converted
    anchor = copy.deepcopy(teacher) if config.optim.anchored and (moves or lowered) else None
    if moves:
        # the average includes the student's start
        teacher.visual.load_state_dict(student.visual.state_dict())
    if lowered:
        # a moving teacher stays fp32: its steps are below the resolution of bf16
        for frozen in filter(None, (None if moves else teacher, ensemble)):
            vit.lower(frozen.visual, torch.bfloat16)
    return Objective(
        student,
        teacher,
        config.method,
        ensemble=ensemble,
        pretrained=anchor,
        texts=own_texts,
        recompute=config.recompute,
    )


def start_seen(config: Config) -> frozenset[TrainedOn]:
    """List the sets that --model.start was trained on; the new weights have seen them too."""
    if not config.model.start:
        return frozenset()
    path = Path(config.model.start)
    return trained_on.of_model(path, map_state(checkpoint_path(path)).metadata)


def starting_student(config: Config, pretrained: Classifier, classes: Classes) -> Classifier:
    """Make the student with its first weights; raises the errors of `load_alike`.

    `classes` are those of the training set.
    """
    student = copy.deepcopy(pretrained)
    if config.model.head == "random":
        bound = student.head.in_features**-0.5  # torch's default for a linear layer
        # drawn by address, so that every rank starts with the same head
        draw = rng.torch_generator(config.seed, "head")
        weight_KE = torch.rand(student.head.weight.shape, generator=draw) * 2 * bound - bound
        with torch.no_grad():
            student.head.weight.copy_(weight_KE)
    if config.model.start:
        load_alike(student, config.model.start, "--model.start", classes)
    if config.optim.trains == "head":
        student.visual.requires_grad_(False)
    if config.method.loss == "contrastive":
        # the head is built from the text tower
        student.head.requires_grad_(False)
    freeze(student, config.optim.freeze)
    return student


def freeze(student: Classifier, patterns: Sequence[str]) -> None:
    """Freeze the weights whose names match a pattern.

    Raises:
        ValueError: if a pattern matches no weight, or only frozen ones, or if no trainable weight
            is left in the image tower or at all.
    """
    weights = dict(student.named_parameters())
    tower = [name for name in weights if name.startswith("visual.")]
    tower_learns = any(weights[name].requires_grad for name in tower)
    for pattern in patterns:
        matched = [name for name in weights if fnmatchcase(name, pattern)]
        if not matched:
            near = get_close_matches(pattern, weights, n=3, cutoff=0.3) or list(weights)[:3]
            raise ValueError(
                f"--optim.freeze {pattern!r} matches no weight; the nearest: {', '.join(near)}"
            )
        if not any(weights[name].requires_grad for name in matched):
            raise ValueError(
                f"--optim.freeze {pattern!r} has no effect: {matched[0]} and all other matches are "
                "frozen already; leave it out"
            )
        for name in matched:
            weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise ValueError(
            "--optim.freeze leaves no trainable weight in image tower and head; name fewer"
        )
    if tower_learns and not any(weights[name].requires_grad for name in tower):
        raise ValueError(
            "--optim.freeze names every weight of the image tower; use --optim.trains head, which "
            "computes the tower's features only once"
        )


def second_teacher(config: Config, pretrained: Classifier, classes: Classes) -> Classifier | None:
    """Load WiSE-KD's teacher; None if the method has none. Raises the errors of `load_alike`."""
    if config.method.kd_weight == 0:
        return None
    teacher = copy.deepcopy(pretrained)
    load_alike(teacher, config.method.kd_teacher, "--method.kd-teacher", classes)
    return teacher


def load_alike(model: Classifier, path: str, option: str, classes: Classes) -> None:
    """Load the weights of a run folder or a file into a model with a head for `classes`.

    Raises:
        ValueError: naming the option, if architectures or classes differ, with the first that does.
    """
    state, architecture, _, known = load_state(checkpoint_path(Path(path)))
    require_own_weights(Path(path))
    where = f"{option} {path}"
    if reached := unfinished(Path(path)):
        log.warning(f"{where} has not finished training ({reached})")
    if changed := model.architecture.difference(architecture):
        raise ValueError(f"{where} has a different architecture: {changed[0]}")
    pair = (known, where, classes, "the training set")
    rows = len(state["head.weight"])
    for warning in (
        *check_head(known, rows, where, classes, "the training set"),
        *compare_prompts(*pair),
    ):
        log.warning(warning)
    try:
        # checked here, because load_state_dict's RuntimeError would look like a bug of rft
        require_alike(model.state_dict(), state)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    model.load_state_dict(state)


def inputs_fingerprint(config: Config) -> dict[str, str]:
    """Hash the weights of the runs that this run builds on: other weights make it another run."""
    paths = {"start": config.model.start, "kd_teacher": config.method.kd_teacher}
    return {
        f"{name}_sha256": files.sha256_file(checkpoint_path(Path(path)))
        for name, path in paths.items()
        if path
    }
