"""The configuration of a training run: frozen dataclasses, validated and stored as JSON.

Everything that a run depends on is here, and nothing is added later. No torch: the report and the
command line import this too. Defaults are the paper's (appendix A.1) unless a comment says
otherwise.
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

# Default limit on an image's size, in millions of pixels. Decoding takes up to 16 bytes per pixel
# (WebP), so the largest image needs less than 2 GB. Phones take photos of 108 million; Pillow warns
# above 89 million and refuses twice as many.
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
    """Convert `compile` from runs of earlier versions, where it was a flag."""
    return ("off", "on")[value] if isinstance(value, bool) else value


@document(name="model")
class ModelConfig:
    """The pre-trained CLIP to fine-tune."""

    clip: str = "ViT-B-32-quickgelu"
    """An open_clip model name, or local-dir:PATH for a folder in open_clip's hub layout."""
    pretrained: str = "openai"
    """An open_clip weights tag or a weights file; unused with local-dir:."""
    start: str = ""
    """Run folder or .safetensors file with the student's first weights (LP-FT: a linear probe's
    run); empty for the pre-trained model."""
    head: Literal["zero-shot", "random"] = "zero-shot"
    """The student's first head: text embeddings, or random (as in LP-FT's own probe)."""


@document(name="loader")
class LoaderConfig:
    """How training samples are split into batches (see rft/loading/order.py)."""

    batch_size: BatchSize = 512
    """Images in a global batch, over all ranks and accumulation steps."""
    held_out: Whole = 10240
    """Training images held out, stratified by class, to select the checkpoint; 0 keeps the last
    checkpoint."""
    shots: Whole = 0
    """Images per class to train on (few-shot), drawn by id with the split's seed from those not
    held out; 0 trains on all. The draw for 4 contains the draw for 2."""
    augment: Augment = "none"
    """crop-flip: a random crop of 0.9 to 1 of the area and a random horizontal flip of each
    training image, drawn anew in each epoch; not for sets packed as pixels."""
    streams: Positive = 1
    """Sample streams from which a global batch is drawn (block shuffle only)."""
    block_shards: Whole = 0
    """Shards shuffled together in each stream; 0 shuffles the full set."""
    workers: Whole = 4
    """Loader processes per rank; 0 reads in the training process."""
    cache_dir: str = ""
    """Folder on this node's local disk that caches shards of remote storage; empty caches none."""
    cache_gb: Above0 = 100
    """Largest size of that folder, in GB; the ranks of a node share it."""
    features_dir: str = ""
    """Folder, shared by several runs, for the features of frozen image towers (linear probe, the
    teacher of no-mask, CAR-FT and Lipsum-FT, WiSE-KD's second teacher): filled in the first epoch,
    read in later ones. Empty keeps them in the run folder until training ends."""
    features_gb: From0 = 10
    """Largest size of that folder, in GB; 0 keeps no features."""
    max_pixels: Megapixels = MAX_PIXELS
    """Limit on the size of images decoded in training, in millions of pixels; raise it if the set
    was packed with a higher limit. It never changes a result."""

    def __post_init__(self) -> None:
        divides = self.batch_size % self.streams == 0
        _require(divides, "loader.streams", self.streams, f"a divisor of {self.batch_size}")


@document(name="method")
class MethodConfig:
    """The counterfactual image and the feature distillation on it (section 3.2)."""

    mask: Mask = "none"
    """Masked patches: those of the object, those of the context, random ones, or none."""
    fill: Fill = "none"
    """Replacement of masked patches: nothing (dropped), one other image, or several."""
    threshold: Share = 0.3
    """Patches with relevance / max relevance above this belong to the object (object, context)."""
    rate: Share = 0.5
    """Share of patches masked (random)."""
    cam: Cam = "relevance"
    """The class activation map: Chefer's relevance over all layers, or GradCAM on the last one."""
    cam_model: Literal["student", "teacher"] = "student"
    """The model whose map decides the masks: the one being trained, as in the paper, or the frozen
    pre-trained one with its zero-shot head."""
    random_mask: Literal["auto", "bernoulli", "fixed"] = "auto"
    """Mask each patch independently (bernoulli) or the same number in each image (fixed). auto
    follows the released code: fixed if masked patches are dropped, bernoulli if they are
    refilled."""
    single_fill: Literal["permutation", "derangement", "replacement"] = "permutation"
    """Donors of a single fill: a permutation, in which an image may be its own donor; a
    derangement, in which it may not; or any other image, drawn with replacement."""
    donor_choice: Literal["any", "unlike"] = "any"
    """Images that a fill draws from: the full pool, or for each image the half of the others to
    which the frozen pre-trained model gives the lowest probability of its label."""
    no_fill: Literal["auto", "key-mask", "token-drop"] = "auto"
    """How patches are dropped: masked keys, or shorter token lists, with the same result. auto
    drops tokens if every image keeps the same number."""
    donors: Literal["local", "global"] = "local"
    """Images that fills take patches from: the rank's own micro-batch, as in the released code, or
    the global batch, which the ranks exchange in every step."""
    same_draws: bool = False
    """Draw the same masks and fills on all ranks, as in the released code."""
    distill_weight: From0 = 30.0
    """Weight (beta) of the feature MSE to the frozen pre-trained model; 0 is plain fine-tuning."""
    head_weight: From0 = 0.0
    """Weight of KL(teacher || student) of the class probabilities on the distilled images; the
    teacher uses the zero-shot head, the student its own."""
    kd_weight: From0 = 0.0
    """Weight (gamma) of distilling kd-teacher's logits on clean images (WiSE-KD)."""
    kd_temperature: Above0 = 10.0
    """Temperature that softens both models' logits in that distillation."""
    kd_teacher: str = ""
    """Run folder or .safetensors file of the second teacher: a WiSE-FT model."""
    loss: Loss = "cross-entropy"
    """Loss on the clean images: the head's cross-entropy, or CLIP's contrastive loss between images
    and prompts, which also trains the text tower (FLYP)."""
    context_weight: From0 = 0.0
    """Weight (alpha) of the KL divergence from the pre-trained model's distribution over contexts;
    the contexts are the set's prompt templates (CAR-FT)."""
    lipsum_weight: From0 = 0.0
    """Weight (lambda) of the squared distance from the pre-trained model's logits for 80 random
    texts, drawn anew in each step (Lipsum-FT)."""
    teacher: Teacher = "frozen"
    """The model whose features are distilled: the pre-trained one, or a running average of the
    student, exponential (ema) or weighted over the full run by Beta(0.5, 0.5) (wma)."""
    teacher_decay: Beta = 0.999
    """Decay of the exponential average per step (ema), as in Mean Teacher."""

    @property
    def compares(self) -> bool:
        """Whether the pre-trained model's features of the clean images are needed."""
        distils = self.distill_weight > 0 and not self.masks and self.teacher == "frozen"
        # a CAM of the teacher runs its own forward, whose features serve the donor choice as well
        chooses = self.donor_choice == "unlike" and self.cam_model == "student"
        return distils or chooses or self.context_weight > 0 or self.lipsum_weight > 0

    @property
    def masks(self) -> bool:
        """Whether features are distilled on counterfactual images."""
        return self.distill_weight > 0 and self.mask != "none"

    @property
    def drops(self) -> bool:
        """Whether masked patches are dropped instead of refilled."""
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
        # refuse options without effect: the mistake would stay unnoticed
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
        wanted = "0 where distill-weight is 0, because it is added to feature distillation"
        _require(distils, "method.head_weight", self.head_weight, wanted)
        self._check_donors()
        self._check_loss()
        self._check_teacher()

    def _check_donors(self) -> None:
        if self.donor_choice == "any":
            return
        fills = self.fill != "none" and self.single_fill == "permutation"
        wanted = (
            "any unless patches are refilled from local donors with the default "
            "--method.single-fill: unlike donors are drawn with replacement, from the images that "
            "this rank's teacher has seen"
        )
        fills = fills and self.donors == "local"
        _require(fills, "method.donor_choice", self.donor_choice, wanted)

    def _check_loss(self) -> None:
        cross = self.loss == "cross-entropy"
        wanted = (
            "none or random where the loss is contrastive: a CAM needs the head, which is rebuilt "
            "from the text tower only after each epoch; --method.cam-model teacher uses the "
            "pre-trained head"
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
            "need the pre-trained model"
        )
        _require(frozen or apart, "method.teacher", self.teacher, wanted)
        decays = self.teacher == "ema" or self.teacher_decay == type(self).teacher_decay
        wanted = f"{type(self).teacher_decay:g} where the teacher is not ema"
        _require(decays, "method.teacher_decay", self.teacher_decay, wanted)


@document(name="optim")
class OptimConfig:
    """The optimizer, its schedule, and the pull towards the pre-trained weights (theta_0)."""

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
    cosine, beta1 from 0.95 to 0.85 and back)."""
    warmup_steps: Whole = 500
    """Optimizer steps of linear warm-up (cosine)."""
    clip_norm: Above0 = 1.0
    """Largest L2 norm of the full gradient."""
    clip: Literal["step", "micro-step"] = "step"
    """Clip once per step, the averaged gradient, or after every micro-batch, the sum so far, as the
    released code does."""
    accumulate: Positive = 1
    """Micro-batches of one optimizer step; each is its own local donor pool."""
    trains: Literal["all", "head"] = "all"
    """Trained weights: all, or only the head on the frozen image tower (linear probe)."""
    freeze: tuple[str, ...] = ()
    """Patterns of weights to freeze, such as 'visual.conv1*' or
    'visual.transformer.resblocks.[0-5].*' (* matches any text, ? one character, [0-5] one digit of
    0 to 5)."""
    l2_sp: From0 = 0.0
    """Strength (lambda) of L2-SP: lambda / 2 |theta - theta_0|^2 is added to the loss, but not to
    the logged loss. theta_0 are the tower and zero-shot head of the pre-trained model, also if the
    student starts from other weights."""
    optimizer: Optimizer = "adamw"
    """AdamW, or AdamW with steps drawn back towards theta_0 by selective projection decay (spd) or
    fast trainable projection (ftp). weight-decay still applies; the recipes spd and ftp set it to
    0."""
    spd: Above0 = 1.0
    """Strength (lambda) of selective projection decay; 1 undoes the full movement of a step away
    from theta_0 in tensors that moved too far."""
    ftp_k: Share = 1.0
    """Fast trainable projection: factor on the updates that tighten a constraint; below 1 weights
    are held less."""

    @property
    def anchored(self) -> bool:
        """Whether weights are held to the pre-trained model's."""
        return self.l2_sp > 0 or self.optimizer != "adamw"

    def __post_init__(self) -> None:
        # refuse options without effect: the mistake would stay unnoticed
        for name, value, optimizer in (("spd", self.spd, "spd"), ("ftp_k", self.ftp_k, "ftp")):
            used = self.optimizer == optimizer or value == getattr(OptimConfig, name)
            _require(used, f"optim.{name}", value, f"1 where optim.optimizer is not {optimizer}")


@document(name="log")
class LogConfig:
    """Logs and checkpoints of a run; never change its result."""

    every_steps: Positive = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    checkpoint_steps: Positive = 500
    """Optimizer steps between two checkpoints; every epoch ends with one as well."""
    keep: Positive = 2
    """Checkpoints kept for resuming."""
    checkpoints: str = ""
    """Parent folder or URL (s3://, gs://, az://) for the checkpoints, which get a subfolder named
    like the run folder; empty keeps them in the run folder."""
    image_steps: Whole = 500
    """Optimizer steps between two grids of counterfactuals in TensorBoard; 0 draws none."""
    wandb: str = ""
    """Also log to this Weights & Biases project; empty for none (pip install '.[wandb]')."""


@document(name="cluster")
class ClusterConfig:
    """Coexistence with other jobs, and handling of faults; never changes the result."""

    stop_file: str = ""
    """When this file appears, the run writes a checkpoint and stops. A job script creates it when
    its time is nearly up; SIGTERM, SIGINT, SIGHUP and SIGUSR1 to a rank do the same. The exit code
    is then 75, which torchrun turns into 1."""
    timeout: Annotated[Seconds, Field(gt=0)] = 600
    """Seconds that ranks wait for a missing rank before the run stops and names it."""
    lock_wait: Seconds = 30
    """Seconds to wait for another job to release the run folder before this one is refused."""


@document(name="config")
class Config:
    """One fine-tuning run."""

    # not an option: it is the first word of the command line
    recipe: tyro.conf.Suppress[tyro.conf.Fixed[str]]
    """Name of the recipe this configuration started from."""
    data: str
    """Data root: folder or URL with the packed sets imagenet-train, imagenet-val, ..."""
    # torchrun refuses "--run", which its own parser reads as an abbreviation of --run-path
    run: Annotated[str, tyro.conf.arg(name="run-dir", aliases=("--run",))]
    """Run folder: configuration, metrics, checkpoints, results."""
    train_set: str = TRAIN_SET
    """Name of the packed set to train on, below the data root."""
    scale: Scale = "paper"
    """Defaults of the recipe: for ImageNet (paper), for a few thousand photos of your own (small:
    batch, warm-up, held-out images and checkpoint interval follow from the size of the set, as
    --dry-run prints), or for the embedded world (miniature)."""
    preset: Preset = "paper"
    """Defaults of the paper's text, or of its released code where the two differ
    (docs/paper.md)."""
    seed: Seed = 0
    """Seed of the sample order, the masks, the fills and the augmentation."""
    split_seed: Seed | None = None
    """Seed of the held-out split and of the few-shot draw; the run's seed if not given, as in the
    paper."""
    order_seed: Seed | None = None
    """Seed of the sample order; the run's seed if not given."""
    precision: PrecisionChoice = "auto"
    """auto is bf16 on a GPU that has it and fp32 elsewhere; a run keeps its first precision. tf32
    applies to all matrix products, bf16 only to the towers: CAM, losses and head stay fp32. Weights
    and optimizer are always fp32."""
    device: Device = "auto"
    recompute: bool = False
    """Keep only each layer's input and recompute the layer in the backward pass (activation
    checkpointing): a third more time for a fraction of the memory."""
    compile: Annotated[Compile, BeforeValidator(_of_flag)] = "auto"
    """Compile the operations between the matrix products of the layers and of the CAM
    (torch.compile, Triton). On a GPU, auto times the choices and takes the fastest, if the run is
    long enough. On a CPU it is off, because compiling was measured to be slower. A run keeps its
    first choice."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        # here, so that old config.json files are covered too: the name is part of the run's
        # identity
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
        wanted = "zero-shot where a CAM uses the head, or another run's head replaces it"
        _require(sees, "model.head", self.model.head, wanted)
        held = self.model.head == "zero-shot" or not self.optim.anchored
        wanted = "zero-shot where l2-sp, spd or ftp hold weights to the pre-trained model's"
        _require(held, "model.head", self.model.head, wanted)
        kept = not self.model.start or self.optim.optimizer != "ftp"
        wanted = "empty for the optimizer ftp, whose first step returns to the pre-trained weights"
        _require(kept, "model.start", self.model.start, wanted)

    def _check_contrastive(self) -> None:
        """Check the options of a run that trains the text tower and builds the head from it."""
        optim, model, batch = self.optim, self.model, self.loader.batch_size
        where = "where the loss is contrastive"
        wanted = f"all {where}: the head is built from the text tower"
        _require(optim.trains == "all", "optim.trains", optim.trains, wanted)
        _require(model.head == "zero-shot", "model.head", model.head, f"zero-shot {where}")
        wanted = f"empty {where}: a run's weights have no text tower to start from"
        _require(not model.start, "model.start", model.start, wanted)
        wanted = f"0 {where}: it does not cover the text tower"
        _require(optim.l2_sp == 0, "optim.l2_sp", optim.l2_sp, wanted)
        wanted = f"adamw {where}: spd and ftp cover only image tower and head"
        _require(optim.optimizer == "adamw", "optim.optimizer", optim.optimizer, wanted)
        wanted = f"1 {where}, because the negatives come from the full batch"
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
        """Compute how many images one rank forwards at once.

        Raises:
            ValueError: if the ranks cannot split the global batch evenly, or a fill has no donors.
        """
        parts = world_size * self.optim.accumulate
        batch = self.loader.batch_size
        if batch % parts:
            raise ValueError(
                f"loader.batch_size {batch} cannot be split into {world_size} ranks x "
                f"{self.optim.accumulate} accumulation steps; choose a multiple of {parts} "
                "(docs/training.md)"
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
        """Count the images that a fill chooses from."""
        # a local pool is one micro-batch of one rank
        pools = 1 if self.method.donors == "global" else world_size * self.optim.accumulate
        return self.loader.batch_size // pools

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON document."""
        document = dataclasses.asdict(self)
        # a list, as in JSON, so that a recorded configuration and a new one compare equal
        document["optim"]["freeze"] = list(self.optim.freeze)
        return document

    def identity(self) -> dict[str, Any]:
        """Extract the part of the configuration that decides the result.

        The locations of data and run, the logs, the number of reading processes and the way the
        same numbers are computed may change when a run resumes. The data and all weights that a run
        builds on are identified by their hashes in the checkpoint's fingerprint.
        """
        # the set is identified by its hash: a renamed or moved set is the same data
        document = _deciding(self.to_dict(), {"train_set"})
        # resolved: omitting a seed and naming the run's own seed are the same run
        document["split_seed"], document["order_seed"] = self.held_out_seed, self.sample_seed
        return document


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """Add to a recorded configuration, or its identity, the options that its rft did not have yet.

    Their defaults are the behaviour of all earlier runs. The document of a merged or imported model
    has other parts and is returned unchanged.
    """
    groups = Config(recipe="", data="", run="").identity()
    known = {name: group for name, group in groups.items() if isinstance(group, dict)}
    return recorded | {
        name: {**known[name], **recorded[name]}
        for name in known.keys() & recorded.keys()
        if isinstance(recorded[name], dict)  # third-party documents may have anything here
    }


def load_config(folder: Path) -> Config:
    """Read the configuration recorded in a run folder.

    Raises:
        ValueError: if it is missing, damaged, or written by a version with other settings; the
            message names that version.
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
    """Describe the version of rft that wrote a run folder, for a message."""
    found = None
    with contextlib.suppress(ValueError):
        found = records.find(folder / filenames.PROVENANCE, records.Provenance)
    if found is None or not found.rft:
        return f"a different version of rft (its {filenames.PROVENANCE} does not record which)"
    version, commit = found.rft, found.git
    # as lists of numbers: as strings, 0.10 would sort before 0.9
    numbers, own = ([int(n) for n in re.findall(r"\d+", v)] for v in (version, __version__))
    kind = "a newer rft" if numbers > own else "a different rft"
    return f"{kind} ({version}{f', commit {commit}' if commit else ''})"


def resolve_precision(choice: PrecisionChoice, *, gpu: bool, bf16: bool) -> tuple[Precision, str]:
    """Resolve `auto` to the precision that a run computes in and records.

    A GPU without native bf16 (compute capability below 8.0: V100, T4) has no TF32 either and only
    emulates bf16, so fp32 is used.

    `bf16` is whether the device has it natively. The precision comes with a short reason, which is
    empty if the precision was named.
    """
    if choice != "auto":
        return choice, ""
    if bf16:
        return "bf16", "auto: native on this GPU"
    return "fp32", "auto: this GPU has no native bf16" if gpu else "auto: on a CPU"


def repeat_precision(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Format the option that resumes a run in its recorded precision, for an error message.

    Empty if the recorded identity and the new one differ only in something else.
    """
    recorded = old.get("precision")
    if recorded == new["precision"] or recorded not in typing.get_args(Precision):
        return ""
    return f" (--precision {recorded}; auto depends on the device)"


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {wanted}")


# Fields that never change a result: locations, ways to do the work, logs. Models that a run builds
# on are named by their folders, but compared by their hashes.
NEUTRAL: dict[str, set[str]] = {
    "": {"data", "run", "log", "cluster", "device", "recompute", "compile"},
    "model": {"start"},
    "method": {"kd_teacher"},
    "loader": {"workers", "cache_dir", "cache_gb", "features_dir", "features_gb", "max_pixels"},
}
# Further fields in which the seeds of one recipe may differ; each seed builds on its own runs.
OF_SEED = {
    *("seed", "split_seed", "order_seed", "merged_from", "imported_from", "ensemble_of"),
    *("soup", "stock", "fitted"),
}


def _deciding(document: dict[str, Any], others: set[str]) -> dict[str, Any]:
    """Copy a config.json without its neutral fields and some others."""
    kept = {name: value for name, value in document.items() if name not in NEUTRAL[""] | others}
    for group in NEUTRAL.keys() & kept.keys():
        if isinstance(kept[group], dict):  # third-party documents may have anything here
            kept[group] = {k: v for k, v in kept[group].items() if k not in NEUTRAL[group]}
    return kept


def settings(document: dict[str, Any]) -> dict[str, Any]:
    """Reduce a run folder's config.json to the settings that all seeds of a recipe share.

    The document may be a merged or imported model's, or an older version's.
    """
    return _deciding(completed(document), OF_SEED)
