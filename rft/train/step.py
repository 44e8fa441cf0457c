"""One optimizer step's gradients: micro-batches, draws, the two backwards, clipping."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from rft import dist, rng
from rft.config import Config, MethodConfig
from rft.device import autocast, to_device
from rft.dist import World
from rft.loading.dataset import Batch
from rft.method import contrastive, counterfactual, weight_space
from rft.method.counterfactual import Draws, StepAddress
from rft.train.contrastive import Pairs
from rft.train.job import Job
from rft.train.objective import TextDraws
from rft.train.pictures import Counterfactuals

ALONE = World(rank=0, size=1, local_rank=0)
# terms that a step of the paper's methods reports, in this order
TERMS = ("ce", "mse", "kd", "replaced")


def terms_of(method: MethodConfig) -> tuple[str, ...]:
    """List the terms that a step reports, in order; metrics.jsonl has a field for each."""
    fits = ("contrastive", *TERMS[1:]) if method.loss == "contrastive" else TERMS
    later = {
        "context": method.context_weight,
        "lipsum": method.lipsum_weight,
        "head": method.head_weight,
    }
    return (*fits, *(name for name, weight in later.items() if weight > 0))


def accumulate_gradients(
    job: Job,
    module: nn.Module,
    batch: Batch,
    step: int,
    shown: list[Counterfactuals] | None = None,
) -> tuple[Tensor, Tensor]:
    """Accumulate the batch's averaged, clipped gradient, including L2-SP's, in the parameters.

    Each micro-batch runs one backward for the clean losses and one for the counterfactual, so only
    one graph is alive at a time. Gradients are exchanged only in the last backward, or, with
    clipping after every micro-batch, in the last one of each micro-batch. Each micro-batch's
    counterfactuals are appended to `shown`, if given.

    Returns:
        The terms (cross-entropy, MSE, logit distillation, share of patches replaced and more: see
        `terms_of`), and the gradient's norm before the (last) clipping.
    """
    optim, names = job.config.optim, terms_of(job.config.method)
    # each loss is divided by this, so that the micro-batches add up to the batch's mean
    parts = optim.accumulate
    # summed on the device: reading a value here would make the host wait for the step
    terms = {name: torch.zeros((), device=job.device) for name in names}
    grad_norm = torch.zeros((), device=job.device)
    pool_ZCHW = donor_pool(job.config.method, job.world, batch.images_BCHW)
    texts = draw_texts(job, module, batch, step)
    patches = (job.student.architecture.image_size // job.student.patch_side) ** 2
    # equal parts: `Config.micro_batch` refuses a batch that cannot be split evenly
    micros = zip(batch.images_BCHW.chunk(parts), batch.labels_B.chunk(parts), strict=True)
    known = {name: rows_BE.chunk(parts) for name, rows_BE in batch.features.items()}
    for micro, (images_BCHW, labels_B) in enumerate(micros):
        # clipping per micro-batch needs the averaged gradient; averaging it again has no effect
        ends = micro == parts - 1 or optim.clip == "micro-step"
        draws = draw_micro_batch(
            job.config, job.world, step=step, micro=micro, images=len(images_BCHW), patches=patches
        )
        if draws is not None:
            draws = draws.copied(partial(to_device, device=job.device))
        # If a counterfactual follows, its backward exchanges the gradients of both. The context
        # must include the forward, in which data parallelism decides whether the backward
        # exchanges.
        with dist.skip_sync(module, draws is not None or not ends):
            # not around the backward, which uses its forward's precision by itself
            with autocast(job.device, job.config.precision):
                rows = {name: chunks[micro] for name, chunks in known.items()}
                clean = module(images_BCHW, labels_B, draws, known=rows, texts=texts)
            with record_function("clean backward"):
                (clean.loss / parts).backward()
        found = dict(clean.terms)
        if draws is not None:
            pool = images_BCHW if pool_ZCHW is None else pool_ZCHW
            with dist.skip_sync(module, not ends):
                with autocast(job.device, job.config.precision):
                    distilled = module(pool, labels_B, draws, clean.donor_BP)
                with record_function("counterfactual backward"):
                    (distilled.loss / parts).backward()
            # the clean terms of these names are 0, because features are distilled on the
            # counterfactuals
            found |= distilled.terms
            found["replaced"] = (clean.donor_BP != draws.own_B1).float().mean()
            if shown is not None:
                shown.append(Counterfactuals(pool, clean.donor_BP, draws.own_B1))
        for name in terms.keys() & found.keys():
            terms[name] += found[name].detach() / parts
        if ends:
            grad_norm = finish_gradient(job, 1 / parts if optim.clip == "micro-step" else 1.0)
    return torch.stack([terms[name] for name in names]), grad_norm


def finish_gradient(job: Job, share: float) -> Tensor:
    """Add L2-SP's gradient, then clip; return the norm before clipping.

    `share` is the part of the step's losses since the last clipping: L2-SP is a loss like the
    others, and is clipped with them.
    """
    optim = job.config.optim
    if optim.l2_sp > 0:
        with record_function("l2-sp"):
            parameters, anchors = job.objective.anchored()
            weight_space.add_l2_sp(parameters, anchors, optim.l2_sp * share)
    with record_function("clip"):
        # only trained parameters have gradients: the student's, and a text tower's
        return nn.utils.clip_grad_norm_(job.objective.parameters(), optim.clip_norm)


def donor_pool(method: MethodConfig, world: World, images_BCHW: Tensor) -> Tensor | None:
    """Gather the global batch if fills choose from it; None if they use the micro-batch."""
    if not (method.masks and method.donors == "global"):
        return None
    with record_function("gather donors"):
        return dist.gather_rows(world, images_BCHW)


def draw_texts(job: Job, module: nn.Module, batch: Batch, step: int) -> TextDraws:
    """Draw the texts of a step; empty for most methods.

    Random texts are the same on all ranks, and an image gets the same prompt on any rank: neither
    depends on the number of ranks.
    """
    objective, seed = job.objective, job.config.seed
    random_ME = pairs = None
    if objective.random_texts is not None:
        tokens_MT = to_device(objective.random_texts.draw(seed, step), job.device)
        with record_function("random texts"), autocast(job.device, job.config.precision):
            random_ME = objective.random_texts(tokens_MT)
    if objective.contrast is not None:
        key = rng.derive(seed, "template", step)
        template_B = contrastive.draw_templates(batch.samples_B, objective.contrast.templates, key)
        # a blank batch has its sample numbers on the device already
        if template_B.device.type == "cpu":
            template_B = to_device(template_B, job.device)
        # a rank that tries kernels on its own must not wait for the others
        world = job.world if dist.is_parallel(module) else ALONE
        gather = partial(dist.gather_rows_with_gradient, world)
        pairs = Pairs(template_B, gather, world.rank * len(template_B))
    return TextDraws(random_ME, pairs)


def draw_micro_batch(
    config: Config, world: World, *, step: int, micro: int, images: int, patches: int
) -> Draws | None:
    """Make the random draws of micro-batch `micro` of this rank's `step`; None without masks.

    With a global pool all ranks draw the same numbers for the full batch, so that the result does
    not depend on the number of ranks or micro-batches.
    """
    if not config.method.masks:
        return None
    pool = config.donor_pool(world.size)
    own, rank, part = range(images), world.rank, micro
    if config.method.donors == "global":
        first = (world.rank * config.optim.accumulate + micro) * images
        # a rank's images are consecutive in the pool, in the order of `gather_rows`
        own, rank, part = range(first, first + images), 0, 0
    if config.method.same_draws:
        rank = 0
    address = StepAddress(config.seed, step, rank, part)
    return counterfactual.draw(config.method, own, patches, pool, address)


def settle_buckets(job: Job, module: nn.Module) -> None:
    """Run one step's backward on blank images and discard its gradients.

    Data parallelism regroups its gradient buckets after the first backward, which changes the order
    of sums on three or more ranks. A resumed run must therefore regroup before its first step, to
    match an uninterrupted run.
    """
    if job.world.alone or job.total_steps == 0:
        return
    # no real step uses the draws of step -1
    accumulate_gradients(job, module, blank_batch(job), step=-1)
    # zeroed as in the training loop
    job.objective.zero_grad(set_to_none=False)


def blank_batch(job: Job) -> Batch:
    """Make a batch of black images of class 0, of this rank's size, on its device."""
    count = job.config.micro_batch(job.world.size) * job.config.optim.accumulate
    size = job.student.architecture.image_size
    images_BCHW = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=job.device)
    labels_B = torch.zeros(count, dtype=torch.int64, device=job.device)
    # steps on blank images do not depend on sample numbers, so the labels stand in
    return Batch(images_BCHW, labels_B, labels_B)
