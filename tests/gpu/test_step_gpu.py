"""Properties that only a GPU can show: no step waits for it, and bf16 does not change masks."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks import step as benchmark
from rft import recipes
from rft.method import masking, relevance
from rft.train.kernels import Choice, load
from rft.train.meter import Meter
from rft.train.objective import Objective
from rft.train.optim import build_optimizer, set_schedule
from rft.train.step import accumulate_gradients
from tests.conftest import build_model, build_texts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


# not with --method.no-fill token-drop on CAM masks, which determine the length of a tensor
@pytest.mark.parametrize("name", recipes.TRAINED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_gpu(name, precision, images_BCHW, labels_B):
    device = torch.device("cuda", 0)
    arguments = benchmark.Arguments(batch_size=6)
    student = build_model(0)
    recipe = recipes.build(name)
    student.visual.requires_grad_(recipe.optim.trains == "all")
    job = benchmark.build_job(arguments, device, precision, student)
    ensemble = build_model(2) if recipe.method.kd_weight else None
    student.head.requires_grad_(recipe.method.loss == "cross-entropy")
    # the teacher may be bf16, and then differs from theta_0
    pretrained = copy.deepcopy(student) if recipe.optim.anchored else None
    models, texts = (student, job.objective.teacher), build_texts(recipe.method)
    objective = Objective(
        *models, recipe.method, ensemble=ensemble, pretrained=pretrained, texts=texts
    )
    config = replace(job.config, method=recipe.method, optim=recipe.optim)
    job = replace(job, config=config, objective=objective.to(device))
    optimizer = build_optimizer(job.objective, job.config.optim)
    meter = Meter(job.config, job.world, device, steps_per_epoch=1)
    batch = benchmark.Batch(images_BCHW.to(device), labels_B.to(device), labels_B)
    for checked in (False, True):  # the first step may set things up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            set_schedule(optimizer, 0, 10, job.config.optim)
            meter.add(*accumulate_gradients(job, job.objective, batch, step=0), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


COMPILED = (
    Choice(layers="compiled", cam="compiled"),
    Choice(layers="compiled", cam="triton"),
)


@pytest.mark.parametrize("choice", COMPILED, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_is_the_eager_one_and_waits_for_nothing(choice, precision):
    device = torch.device("cuda", 0)
    arguments = benchmark.Arguments(batch_size=8)
    student = benchmark.build_classifier("ViT-B-32", 1000)
    job = benchmark.build_job(arguments, device, precision, student)
    batch = benchmark.random_batch(arguments, device, 224)

    def gradients(choice: Choice) -> torch.Tensor:
        job.objective.kernels = load(choice)
        job.student.zero_grad()
        accumulate_gradients(job, job.objective, batch, step=0)
        return torch.cat([p.grad.flatten() for p in job.student.parameters()])

    eager, ours = gradients(Choice()), gradients(choice)
    # bf16 rounds each tensor that a compiler no longer materialises
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    assert (ours - eager).norm() < tolerance * eager.norm()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(choice)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [50, 197, 577])
@pytest.mark.parametrize("cam", ["compiled", "triton"])
def test_the_cams_kernels_equal_the_maps(cam, tokens, dtype):
    draws = torch.Generator().manual_seed(0)
    query, key, value, gradient = (
        torch.randn(4, 12, tokens, 64, generator=draws).to("cuda", dtype) for _ in range(4)
    )
    row_BL = torch.rand(4, tokens, generator=draws).cuda()
    maps = relevance.through_maps(row_BL, (query, key, value), gradient)
    through = load(Choice(cam=cam)).through
    ours = through(row_BL, (query, key, value), gradient)
    assert (ours - maps).abs().max() < 1e-5 * maps.abs().max()
    # the same bits each time: a mask must not depend on a GPU's order of additions
    assert torch.equal(ours, through(row_BL, (query, key, value), gradient))


def test_masks_in_bf16_agree_with_fp32_for_vit_b_32():
    model = benchmark.build_classifier("ViT-B-32", 1000).cuda()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 224, 224), generator=generator, dtype=torch.uint8).cuda()
    labels = torch.randint(1000, (64,), generator=generator).cuda()
    masks = []
    for bf16 in (False, True):
        taps: list = []
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            logits = model.logits(model.features(model.patches(images), taps=taps))
            cam = relevance.normalise(relevance.label_relevance(logits, labels, taps))
        masks.append(masking.object_mask(cam, 0.3))
    assert (masks[0] == masks[1]).float().mean() >= 0.99
