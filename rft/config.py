"""What a training run is: a tree of frozen dataclasses, checked when made, round-tripped as JSON.

Everything a run depends on is here and nothing is added to it later. No torch: the report and the
command line read this too. Numbers are the paper's (appendix A.1) unless a comment says otherwise.
"""

import contextlib
import dataclasses
import re
import typing
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

import tyro
from pydantic import BeforeValidator, Field

from rft import __version__
from rft.runs import filenames, records
from rft.sets import TRAIN_SET
from rft.storage import documents, files, urls
from rft.storage.documents import (
    Above0,
    BatchSize,
    Beta,
    Epochs,
    From0,
    Megapixels,
    Positive,
    Seed,
    Share,
    Whole,
    document,
)

# Millions of pixels that an image may have, unless the user says otherwise. Decoding takes up to 16
# bytes for each (WebP), so the largest needs less than 2 GB. Phones make 108 million; Pillow warns
# of 89 million and refuses twice as many.
MAX_PIXELS = 110.0

Mask = Literal["none", "random", "context", "object"]
Fill = Literal["none", "single", "multi"]
Precision = Literal["fp32", "tf32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "tf32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Scale = Literal["paper", "small", "miniature"]
Preset = Literal["paper", "official-parity"]
Compile = Literal["auto", "on", "off"]
Cam = Literal["relevance", "grad-cam"]
Optimizer = Literal["adamw", "spd", "ftp"]
Augment = Literal["none", "crop-flip"]
Loss = Literal["cross-entropy", "contrastive"]
Teacher = Literal["frozen", "ema", "wma"]

Seconds = Annotated[float, Field(ge=0, lt=1e7)]


def _of_flag(value: object) -> object:
    """Read the flag that `compile` was in runs of earlier versions."""
    return ("off", "on")[value] if isinstance(value, bool) else value


@document(name="model")
class ModelConfig:
    """Which pre-trained CLIP is fine-tuned."""

    clip: str = "ViT-B-32-quickgelu"
    """An open_clip model name, or local-dir:PATH for a folder in open_clip's hub layout."""
    pretrained: str = "openai"
    """An open_clip weights tag or a weights file; unused with local-dir:."""
    start: str = ""
    """Run folder or .safetensors file that the student starts from (LP-FT: a linear probe's run);
    empty starts from the pre-trained model."""
    head: Literal["zero-shot", "random"] = "zero-shot"
    """The head that the student starts with: text embeddings, or random (a linear probe's own)."""


@document(name="loader")
class LoaderConfig:
    """How training samples are cut into batches (see rft/loading/order.py)."""

    batch_size: BatchSize = 512
    """Images in a global batch, over all ranks and accumulation steps."""
    held_out: Whole = 10240
    """Training images kept out, stratified by class, to select the checkpoint; 0 keeps the last."""
    shots: Whole = 0
    """Images of each class to train on (few-shot), drawn by id with the split's seed from those
    that are not held out; 0 trains on all. The choice for 4 contains that for 2."""
    augment: Augment = "none"
    """crop-flip: a random crop of 0.9 to 1 of the area and a random horizontal flip, new in each
    epoch, of each image that is trained on; not for sets packed as pixels."""
    streams: Positive = 1
    """Sample streams a global batch is drawn from (block shuffle only)."""
    block_shards: Whole = 0
    """Shards shuffled together in each stream; 0 shuffles the whole set."""
    workers: Whole = 4
    """Loader processes of each rank; 0 reads in the training process."""
    cache_dir: str = ""
    """Folder on this node's own disk for shards that lie on remote storage; empty keeps none."""
    cache_gb: Above0 = 100
    """Largest size of that folder, in GB; the ranks of a node share it."""
    features_dir: str = ""
    """Folder that several runs share for the features of frozen image towers (linear probe,
    the teacher of no-mask, CAR-FT and Lipsum-FT, WiSE-KD's second teacher): filled in the first
    epoch, read in later ones.
    Empty keeps them in the run folder while the run trains."""
    features_gb: From0 = 10
    """Largest size of that folder, in GB; 0 keeps no features."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have which is decoded while training; raise it if the
    set was packed so. It never changes a result."""

    def __post_init__(self) -> None:
        divides = self.batch_size % self.streams == 0
        _require(divides, "loader.streams", self.streams, f"a divisor of {self.batch_size}")


@document(name="method")
class MethodConfig:
    """The counterfactual image and the feature distillation on it (section 3.2)."""

    mask: Mask = "none"
    """Which patches are masked: those of the object, of the context, random ones, or none."""
    fill: Fill = "none"
    """What replaces them: nothing (dropped), one other image, or several."""
    threshold: Share = 0.3
    """Object patches are those with relevance / max relevance above this (object, context)."""
    rate: Share = 0.5
    """Share of patches masked (random)."""
    cam: Cam = "relevance"
    """The class activation map: Chefer's relevance over all layers, or GradCAM on the last one."""
    cam_model: Literal["student", "teacher"] = "student"
    """Whose map decides the masks: the model being trained, as in the paper, or the frozen
    pre-trained one, through its zero-shot head."""
    random_mask: Literal["auto", "bernoulli", "fixed"] = "auto"
    """Each patch on its own (bernoulli) or the same number in each image (fixed); auto is the
    released code's: fixed where masked patches are dropped, bernoulli where they are refilled."""
    single_fill: Literal["permutation", "derangement", "replacement"] = "permutation"
    """Donors of a single fill: a permutation, in which an image may be its own, one without, or any
    other image for each, drawn with replacement."""
    donor_choice: Literal["any", "unlike"] = "any"
    """Images that a fill draws from: all of the pool, or for each image the half of the others to
    which the frozen pre-trained model gives the smallest probability of its label."""
    no_fill: Literal["auto", "key-mask", "token-drop"] = "auto"
    """How patches are dropped, the result is the same: masked keys, or shorter token lists; auto
    drops tokens where every image keeps the same number."""
    donors: Literal["local", "global"] = "local"
    """Images that fills take patches from: one rank's micro-batch, as in the released code, or the
    whole global batch, exchanged by the ranks in every step."""
    same_draws: bool = False
    """All ranks draw the same masks and fills, as in the released code."""
    distill_weight: From0 = 30.0
    """Weight (beta) of the feature MSE to the frozen pre-trained model; 0 is plain fine-tuning."""
    head_weight: From0 = 0.0
    """Weight of KL(teacher || student) of the class probabilities where features are distilled: the
    teacher's through the zero-shot head, the student's through its own."""
    kd_weight: From0 = 0.0
    """Weight (gamma) of the distillation of kd-teacher's logits on clean images (WiSE-KD)."""
    kd_temperature: Above0 = 10.0
    """Temperature that softens both models' logits in that distillation."""
    kd_teacher: str = ""
    """Run folder or .safetensors file of the second teacher: a WiSE-FT model."""
    loss: Loss = "cross-entropy"
    """What the clean images are learnt by: the head's cross-entropy, or CLIP's own contrastive loss
    between them and their prompts, which trains the text tower too (FLYP)."""
    context_weight: From0 = 0.0
    """Weight (alpha) of the KL divergence from the pre-trained model's distribution over contexts,
    which are the set's prompt templates (CAR-FT)."""
    lipsum_weight: From0 = 0.0
    """Weight (lambda) of the squared distance from the pre-trained model's logits of 80 random
    texts, new ones in each step (Lipsum-FT)."""
    teacher: Teacher = "frozen"
    """The model whose features are distilled: the pre-trained one, or a running average of the
    student, exponential (ema) or weighted over the whole run by Beta(0.5, 0.5) (wma)."""
    teacher_decay: Beta = 0.999
    """Share of itself that an exponential average keeps in each step (ema); Mean Teacher's."""

    @property
    def compares(self) -> bool:
        """Whether the pre-trained model's features of the clean images are wanted."""
        distils = self.distill_weight > 0 and not self.masks and self.teacher == "frozen"
        # a CAM of the teacher has a forward of its own, whose features serve the choice as well
        chooses = self.donor_choice == "unlike" and self.cam_model == "student"
        return distils or chooses or self.context_weight > 0 or self.lipsum_weight > 0

    @property
    def masks(self) -> bool:
        """Whether the images that are distilled on are counterfactual."""
        return self.distill_weight > 0 and self.mask != "none"

    @property
    def drops(self) -> bool:
        """Whether masked patches are left out instead of refilled."""
        return self.masks and self.fill == "none"

    @property
    def needs_cam(self) -> bool:
        """Whether masks come from the class activation map."""
        match self.mask:
            case "object" | "context":
                return True
            case "random" | "none":
                return False
            case _:
                assert_never(self.mask)

    @property
    def fixed_count(self) -> bool:
        """Whether random masks have the same number of patches in each image."""
        return self.random_mask == "fixed" or (self.random_mask == "auto" and self.fill == "none")

    def __post_init__(self) -> None:
        # an option without effect is a mistake that stays unseen
        masks = self.distill_weight > 0 or self.mask == "none"
        _require(masks, "method.mask", self.mask, "none where distill-weight is 0")
        fills = self.mask != "none" or self.fill == "none"
        _require(fills, "method.fill", self.fill, "none where nothing is masked")
        taught = self.kd_weight > 0 or not self.kd_teacher
        _require(taught, "method.kd_teacher", self.kd_teacher, "empty where kd-weight is 0")
        looks = self.needs_cam or self.cam_model == "student"
        wanted = "student where no CAM decides the masks"
        _require(looks, "method.cam_model", self.cam_model, wanted)
        distils = self.distill_weight > 0 or self.head_weight == 0
        wanted = "0 where distill-weight is 0, because it is beside the features"
        _require(distils, "method.head_weight", self.head_weight, wanted)
        self._check_donors()
        self._check_loss()
        self._check_teacher()

    def _check_donors(self) -> None:
        if self.donor_choice == "any":
            return
        fills = self.fill != "none" and self.single_fill == "permutation"
        wanted = (
            "any unless patches are refilled from local donors and --method.single-fill is left as "
            "it is: unlike donors are drawn with replacement, and from the images that this rank's "
            "teacher has seen"
        )
        fills = fills and self.donors == "local"
        _require(fills, "method.donor_choice", self.donor_choice, wanted)

    def _check_loss(self) -> None:
        cross = self.loss == "cross-entropy"
        wanted = (
            "none or random where the loss is contrastive: a CAM looks through the head, which is "
            "rebuilt from the text tower after each epoch alone; --method.cam-model teacher looks "
            "through the pre-trained one"
        )
        looks = self.needs_cam and self.cam_model == "student"
        _require(cross or not looks, "method.mask", self.mask, wanted)
        for name in ("kd_weight", "head_weight"):
            weight = getattr(self, name)
            wanted = "0 where the loss is contrastive, because the head's logits are not trained"
            _require(cross or weight == 0, f"method.{name}", weight, wanted)

    def _check_teacher(self) -> None:
        frozen = self.teacher == "frozen"
        wanted = "frozen where distill-weight is 0"
        _require(frozen or self.distill_weight > 0, "method.teacher", self.teacher, wanted)
        weights = (self.context_weight, self.lipsum_weight, self.head_weight)
        apart = not any(weights) and self.donor_choice == "any" and self.cam_model == "student"
        wanted = (
            "frozen where context-weight, lipsum-weight, head-weight, donor-choice or cam-model "
            "look at the pre-trained model"
        )
        _require(frozen or apart, "method.teacher", self.teacher, wanted)
        decays = self.teacher == "ema" or self.teacher_decay == type(self).teacher_decay
        wanted = f"{type(self).teacher_decay:g} where the teacher is not ema"
        _require(decays, "method.teacher_decay", self.teacher_decay, wanted)


@document(name="optim")
class OptimConfig:
    """The optimizer, its schedule, and what holds weights to the pre-trained model's (theta_0)."""

    epochs: Epochs = 10
    """Passes over the training set; 0 keeps the zero-shot model."""
    lr: Above0 = 3e-5
    """Peak learning rate of every parameter."""
    weight_decay: From0 = 0.1
    """Decoupled weight decay of every parameter."""
    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Above0 = 1e-8
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """Linear warm-up and half a cosine to zero, or the released code's OneCycle (2% warm-up along a
    cosine, beta1 swings from 0.95 to 0.85 and back)."""
    warmup_steps: Whole = 500
    """Optimizer steps of linear warm-up (cosine)."""
    clip_norm: Above0 = 1.0
    """Largest L2 norm of the whole gradient."""
    clip: Literal["step", "micro-step"] = "step"
    """Clip once, over the averaged gradient, or after every micro-batch, over what has been added
    up so far, as the released code does."""
    accumulate: Positive = 1
    """Micro-batches of one optimizer step; each is its own local donor pool."""
    trains: Literal["all", "head"] = "all"
    """What learns: every weight, or the head on the frozen image tower (linear probe)."""
    freeze: tuple[str, ...] = ()
    """Patterns of weights that do not learn, such as 'visual.conv1*' or
    'visual.transformer.resblocks.[0-5].*' (* any text, ? one character, [0-5] one of them)."""
    l2_sp: From0 = 0.0
    """Strength (lambda) of L2-SP: lambda / 2 |theta - theta_0|^2 is part of the loss, though not of
    the logged one. theta_0 are tower and zero-shot head of the pre-trained model, wherever the
    student starts."""
    optimizer: Optimizer = "adamw"
    """AdamW, or AdamW whose steps are drawn back towards theta_0: by selective projection decay
    (spd) or by fast trainable projection (ftp). weight-decay works beside them; recipes spd and
    ftp have none."""
    spd: Above0 = 1.0
    """Strength (lambda) of selective projection decay; 1 takes back all that a step moved away from
    theta_0 in tensors that had moved too far."""
    ftp_k: Share = 1.0
    """Fast trainable projection: factor of what would tighten a constraint; below 1 it holds
    weights less."""

    @property
    def anchored(self) -> bool:
        """Whether weights are held to the pre-trained model's."""
        return self.l2_sp > 0 or self.optimizer != "adamw"

    def __post_init__(self) -> None:
        # an option without effect is a mistake that stays unseen
        for name, value, optimizer in (("spd", self.spd, "spd"), ("ftp_k", self.ftp_k, "ftp")):
            used = self.optimizer == optimizer or value == getattr(OptimConfig, name)
            _require(used, f"optim.{name}", value, f"1 where optim.optimizer is not {optimizer}")


@document(name="log")
class LogConfig:
    """What a run writes while it runs; never changes its result."""

    every_steps: Positive = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    checkpoint_steps: Positive = 500
    """Optimizer steps between two checkpoints; every epoch ends with one as well."""
    keep: Positive = 2
    """Checkpoints kept for resuming."""
    checkpoints: str = ""
    """Where checkpoints are kept, in a folder named as the run folder: a folder or a URL (s3://,
    gs://, az://); empty keeps them in the run folder."""
    image_steps: Whole = 500
    """Optimizer steps between two grids of counterfactuals in TensorBoard; 0 draws none."""
    wandb: str = ""
    """Weights & Biases project to log to as well, empty for none (pip install -e '.[wandb]')."""


@document(name="cluster")
class ClusterConfig:
    """How a run lives with other jobs and with faults; never changes its result."""

    stop_file: str = ""
    """As soon as this file is there, the run writes a checkpoint and stops. A job script makes it
    when its time is nearly up; SIGTERM, SIGINT, SIGHUP and SIGUSR1 to a rank do the same. The exit
    code is 75 then, which torchrun makes 1."""
    timeout: Annotated[Seconds, Field(gt=0)] = 600
    """Seconds that ranks wait for one of them before the run stops and names it."""
    lock_wait: Seconds = 30
    """Seconds to wait for another job to leave the run folder before this one is refused."""


@document(name="config")
class Config:
    """One fine-tuning run."""

    # the word in front of the options names it, so it is no option itself
    recipe: tyro.conf.Suppress[tyro.conf.Fixed[str]]
    """Name of the recipe this configuration started from."""
    data: str
    """Data root: the URL under which the tools wrote imagenet-train, imagenet-val, ..."""
    # torchrun refuses "--run": its own parser takes it for an abbreviation of --run-path
    run: Annotated[str, tyro.conf.arg(name="run-dir", aliases=("--run",))]
    """Run folder: configuration, metrics, checkpoints, results."""
    train_set: str = TRAIN_SET
    """Name of the packed set to train on, below the data root."""
    scale: Scale = "paper"
    """Which numbers the recipe starts from: ImageNet's, those for some thousand photos of one's own
    (small: batch, warm-up, held-out images and checkpoint interval follow from the size of the set,
    as --dry-run prints), or those of the embedded world (miniature)."""
    preset: Preset = "paper"
    """The paper's text, or what its released code really does where the two differ
    (docs/paper.md); a preset only chooses other defaults."""
    seed: Seed = 0
    """Seed of the sample order, the masks, the fills and the augmentation."""
    split_seed: Seed | None = None
    """Seed of the held-out split and of the few-shot choice; the run's seed if not given, as in the
    paper."""
    order_seed: Seed | None = None
    """Seed of the sample order; the run's seed if not given."""
    precision: PrecisionChoice = "auto"
    """auto is bf16 on a GPU that has it and fp32 elsewhere; a run keeps its first one. tf32 is
    for every matrix product, bf16 for the towers' alone: CAM, losses and head stay fp32. Weights
    and optimizer are always fp32."""
    device: Device = "auto"
    recompute: bool = False
    """Keep only each layer's input and compute the layer again in the backward pass (activation
    checkpointing): a third more time for a fraction of the memory."""
    compile: Annotated[Compile, BeforeValidator(_of_flag)] = "auto"
    """Compile what lies between the products of the layers and of the CAM (torch.compile, Triton).
    auto measures on a GPU what is faster there, if the run is long enough, and is off on a CPU,
    where it was measured to be slower; a run keeps its first choice."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        # here, for a config.json of before too: the name is part of the run's identity
        object.__setattr__(self, "train_set", urls.set_name(self.train_set, "--train-set"))
        weight = self.method.distill_weight
        learns = weight == 0 or self.optim.trains == "all"
        wanted = "0 where only the head is trained, because no feature changes"
        _require(learns, "method.distill_weight", weight, wanted)
        for name in ("context_weight", "lipsum_weight"):
            weight = getattr(self.method, name)
            learns = weight == 0 or self.optim.trains == "all"
            _require(learns, f"method.{name}", weight, wanted)
        if self.method.loss == "contrastive":
            self._check_contrastive()
        sees = self.model.head == "zero-shot" or not (self.method.needs_cam or self.model.start)
        wanted = "zero-shot where a CAM looks through it, or another run's head replaces it"
        _require(sees, "model.head", self.model.head, wanted)
        held = self.model.head == "zero-shot" or not self.optim.anchored
        wanted = "zero-shot where l2-sp, spd or ftp hold weights to the pre-trained model's"
        _require(held, "model.head", self.model.head, wanted)
        kept = not self.model.start or self.optim.optimizer != "ftp"
        wanted = "empty for the optimizer ftp, whose first step returns to the pre-trained weights"
        _require(kept, "model.start", self.model.start, wanted)

    def _check_contrastive(self) -> None:
        """Check what trains the text tower and makes the head of it."""
        optim, model, batch = self.optim, self.model, self.loader.batch_size
        where = "where the loss is contrastive"
        wanted = f"all {where}: the head is made of the text tower"
        _require(optim.trains == "all", "optim.trains", optim.trains, wanted)
        _require(model.head == "zero-shot", "model.head", model.head, f"zero-shot {where}")
        wanted = f"empty {where}: a run's weights have no text tower to start from"
        _require(not model.start, "model.start", model.start, wanted)
        wanted = f"0 {where}: the text tower has no part in it"
        _require(optim.l2_sp == 0, "optim.l2_sp", optim.l2_sp, wanted)
        wanted = f"adamw {where}: spd and ftp hold image tower and head alone"
        _require(optim.optimizer == "adamw", "optim.optimizer", optim.optimizer, wanted)
        wanted = f"1 {where}, because the negatives are those of the whole batch"
        _require(optim.accumulate == 1, "optim.accumulate", optim.accumulate, wanted)
        wanted = f"2 or more {where}, which needs another image's prompt"
        _require(batch > 1, "loader.batch_size", batch, wanted)

    @property
    def held_out_seed(self) -> int:
        """Seed of the held-out split."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def sample_seed(self) -> int:
        """Seed of the sample order."""
        return self.seed if self.order_seed is None else self.order_seed

    def micro_batch(self, world_size: int) -> int:
        """Return how many images one rank forwards at once.

        Raises:
            ValueError: if the global batch cannot be cut so, or leaves a fill without donors.
        """
        parts = world_size * self.optim.accumulate
        batch = self.loader.batch_size
        if batch % parts:
            raise ValueError(
                f"loader.batch_size {batch} cannot be cut into {world_size} ranks x "
                f"{self.optim.accumulate} accumulation steps; choose a multiple of {parts}"
            )
        micro, method = batch // parts, self.method
        if method.masks and method.fill != "none" and self.donor_pool(world_size) < 2:
            raise ValueError(
                f"a {method.fill} fill needs another image in the micro-batch, which has only 1; "
                "use a larger loader.batch_size, fewer ranks x accumulation steps, or "
                "--method.donors global"
            )
        return micro

    def donor_pool(self, world_size: int) -> int:
        """Return how many images a fill chooses from."""
        # a local pool is one micro-batch of one rank
        pools = 1 if self.method.donors == "global" else world_size * self.optim.accumulate
        return self.loader.batch_size // pools

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a JSON document."""
        document = dataclasses.asdict(self)
        # as JSON has it, so that a recorded configuration and a new one compare equal
        document["optim"]["freeze"] = list(self.optim.freeze)
        return document

    def identity(self) -> dict[str, Any]:
        """Return the part of the configuration that decides the result.

        Where data and the run lie, what is logged, how many processes read and how the same numbers
        are computed may change between two starts of one run. The identity of the data and of all
        weights that a run builds on is their hash in the checkpoint's fingerprint.
        """
        # the set counts by its hash: a renamed or moved one is the same data
        document = _deciding(self.to_dict(), {"train_set"})
        # resolved: no seed and the run's own seed named are one run
        document["split_seed"], document["order_seed"] = self.held_out_seed, self.sample_seed
        return document


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """Give a recorded configuration, or its identity, the options that its rft did not have yet.

    Their defaults are what every run did before. A merged or imported model's document, which has
    other parts, stays as it is.
    """
    groups = Config(recipe="", data="", run="").identity()
    known = {name: group for name, group in groups.items() if isinstance(group, dict)}
    return recorded | {
        name: {**known[name], **recorded[name]}
        for name in known.keys() & recorded.keys()
        if isinstance(recorded[name], dict)  # a document of others may have anything here
    }


def load_config(folder: Path) -> Config:
    """Read the configuration that a training recorded in its run folder.

    Raises:
        ValueError: if it is absent, damaged, or written by a version with other settings, which is
            named.
    """
    path = folder / filenames.CONFIG
    try:
        return files.read_document(str(path), Config, records.RECORD_BYTES)
    except ValueError as error:
        if not documents.names_unknown(error):
            raise
        raise ValueError(
            f"{error}; it was written by {_writer(folder)}, this is rft {__version__}: use that "
            "version, or a different run folder"
        ) from error


def _writer(folder: Path) -> str:
    """Return the version of rft that wrote a run folder, in words for a message."""
    found = None
    with contextlib.suppress(ValueError):
        found = records.find(folder / filenames.PROVENANCE, records.Provenance)
    if found is None or not found.rft:
        return f"a different version of rft (its {filenames.PROVENANCE} does not say which)"
    version, commit = found.rft, found.git
    # as lists of numbers: as texts, 0.10 would come before 0.9
    numbers, own = ([int(n) for n in re.findall(r"\d+", v)] for v in (version, __version__))
    kind = "a newer rft" if numbers > own else "a different rft"
    return f"{kind} ({version}{f', commit {commit}' if commit else ''})"


def resolve_precision(choice: PrecisionChoice, *, gpu: bool, bf16: bool) -> tuple[Precision, str]:
    """Turn `auto` into the precision that a run computes in and records.

    A GPU without native bf16 (compute capability below 8.0: V100, T4) has no TF32 either and only
    emulates bf16, so fp32 is left.

    `bf16` is whether the device has it natively. A reason in a few words comes with the precision,
    none where the precision was named.
    """
    if choice != "auto":
        return choice, ""
    if bf16:
        return "bf16", "auto: native on this GPU"
    return "fp32", "auto: this GPU has no native bf16" if gpu else "auto: on a CPU"


def repeat_precision(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the option that resumes a run in its recorded precision, for an error message.

    The recorded identity and the new one differ, in precision or in something else.
    """
    recorded = old.get("precision")
    if recorded == new["precision"] or recorded not in typing.get_args(Precision):
        return ""
    return f" (--precision {recorded}; auto depends on the device)"


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {wanted}")


# fields that never change a result: where things lie, how the work is done, what is logged. Models
# that a run starts from are named by their folders, and compared by their hashes
NEUTRAL: dict[str, set[str]] = {
    "": {"data", "run", "log", "cluster", "device", "recompute", "compile"},
    "model": {"start"},
    "method": {"kd_teacher"},
    "loader": {"workers", "cache_dir", "cache_gb", "features_dir", "features_gb", "max_pixels"},
}
# fields that seeds of one recipe may differ in besides; each seed builds on runs of its own
OF_SEED = {
    *("seed", "split_seed", "order_seed", "merged_from", "imported_from", "ensemble_of"),
    *("soup", "stock", "fitted"),
}


def _deciding(document: dict[str, Any], others: set[str]) -> dict[str, Any]:
    """Copy a config.json without its neutral fields and some others."""
    kept = {name: value for name, value in document.items() if name not in NEUTRAL[""] | others}
    for group in NEUTRAL.keys() & kept.keys():
        if isinstance(kept[group], dict):  # a document of others may have anything here
            kept[group] = {k: v for k, v in kept[group].items() if k not in NEUTRAL[group]}
    return kept


def settings(document: dict[str, Any]) -> dict[str, Any]:
    """Return a run folder's config.json without what may differ between the seeds of a recipe.

    The document may be a merged or imported model's, or an older version's.
    """
    return _deciding(completed(document), OF_SEED)
