"""The method as in the paper and the released code: one image at a time, nothing shared.

Slow and obvious on purpose; the fast path must equal it. Attention probabilities are stored for
every layer, the relevance matrix R is built in full, and pixels are refilled before the tower sees
them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_block(block, x_LD: Tensor, keep_L: Tensor | None, maps: list[Tensor]) -> Tensor:
    heads = block.attn.num_heads
    y = block.ln_1(x_LD)
    q, k, v = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    probabilities = []
    width = q.shape[-1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / width**0.5
        if keep_L is not None:
            scores = scores.masked_fill(~keep_L, -torch.inf)
        probabilities.append(scores.softmax(dim=-1))
    stacked = torch.stack(probabilities)
    maps.append(stacked)
    outputs = [stacked[h] @ v[:, h * width : (h + 1) * width] for h in range(heads)]
    x_LD = x_LD + block.ls_1(block.attn.out_proj(torch.cat(outputs, dim=-1)))
    return x_LD + block.ls_2(block.mlp(block.ln_2(x_LD)))


def features(
    visual, image_CHW: Tensor, keep_P: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Features (E,) of one normalised image, and every layer's attention (N, L, L)."""
    patches = visual.conv1(image_CHW[None])[0].flatten(1).T
    x_LD = torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding
    x_LD = visual.ln_pre(x_LD)
    keep_L = None if keep_P is None else torch.cat([torch.ones(1, dtype=torch.bool), keep_P])
    maps: list[Tensor] = []
    for block in visual.transformer.resblocks:
        x_LD = attention_block(block, x_LD, keep_L, maps)
    return visual.ln_post(x_LD)[0] @ visual.proj, maps


def logits(model, feature_E: Tensor) -> Tensor:
    return model.head(feature_E / feature_E.norm())


def relevance(model, image_CHW: Tensor, label: int) -> Tensor:
    """Chefer's relevance of each patch (P,), with R in full, layers first to last."""
    feature, maps = features(model.visual, image_CHW)
    gradients = torch.autograd.grad(logits(model, feature)[label], maps)
    tokens = maps[0].shape[-1]
    matrix = torch.eye(tokens, dtype=image_CHW.dtype)
    for attention, gradient in zip(maps, gradients, strict=True):
        matrix = matrix + (gradient * attention).clamp(min=0).mean(dim=0) @ matrix
    return matrix[0, 1:].detach()


def refill_pixels(images: Tensor, donor_BP: Tensor, patch: int, first: int = 0) -> Tensor:
    """The counterfactuals of images first, first + 1, ..., pixel by pixel.

    Dropped patches keep their pixels.
    """
    out = images[first : first + len(donor_BP)].clone()
    grid = images.shape[-1] // patch
    for n in range(len(out)):
        for p in range(grid * grid):
            row, column = divmod(p, grid)
            rows = slice(row * patch, (row + 1) * patch)
            columns = slice(column * patch, (column + 1) * patch)
            source = donor_BP[n, p].item()
            if source >= 0:
                out[n, :, rows, columns] = images[source, :, rows, columns]
    return out


def grad_cam(model, image_CHW: Tensor, label: int) -> Tensor:
    """GradCAM (P,) over the class token's attention in the last layer, head by head."""
    feature, maps = features(model.visual, image_CHW)
    (gradient,) = torch.autograd.grad(logits(model, feature)[label], maps[-1:])
    heads = [gradient[h, 0, 1:].mean() * maps[-1][h, 0, 1:].detach() for h in range(len(gradient))]
    return (sum(heads) / len(heads)).clamp(min=0)


def kd(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 sum_k p_k log(p_k / q_k), p the teacher's and q the student's, mean over the images."""
    p = (teacher_BK / temperature).softmax(dim=1)
    q = (student_BK / temperature).softmax(dim=1)
    return temperature**2 * (p * (p / q).log()).sum(dim=1).mean()


def normalise_images(model, images_u8: Tensor) -> Tensor:
    mean = torch.tensor(model.architecture.mean, dtype=model.visual.proj.dtype)[:, None, None]
    std = torch.tensor(model.architecture.std, dtype=model.visual.proj.dtype)[:, None, None]
    return (images_u8.to(mean.dtype) / 255 - mean) / std


def step_loss(
    student,
    teacher,
    images_u8: Tensor,
    labels: Tensor,
    donor_BP,
    beta: float,
    ensemble=None,
    *,
    gamma: float = 1,
    temperature: float = 10,
    head_weight: float = 0,
) -> Tensor:
    """CE on the clean images plus beta x MSE on the counterfactual ones, image by image.

    With a second teacher, plus gamma x its logits' distillation; with a head weight, plus that x
    the distillation of the teacher's class probabilities on the counterfactuals.
    """
    images = normalise_images(student, images_u8)
    patch = student.visual.patch_size[0]
    counterfactual = refill_pixels(images, donor_BP, patch)
    ce, mse, distilled, head = [], [], [], []
    for n in range(len(images)):
        clean, _ = features(student.visual, images[n])
        ce.append(-logits(student, clean).log_softmax(dim=-1)[labels[n]])
        if ensemble is not None:
            taught = logits(ensemble, features(ensemble.visual, images[n])[0]).detach()
            distilled.append(kd(logits(student, clean)[None], taught[None], temperature))
        keep = donor_BP[n] >= 0
        drops = None if bool(keep.all()) else keep
        mine, _ = features(student.visual, counterfactual[n], drops)
        with torch.no_grad():
            theirs, _ = features(teacher.visual, counterfactual[n], drops)
        mse.append(((mine - theirs) ** 2).mean())
        head.append(kd(logits(student, mine)[None], logits(teacher, theirs)[None].detach(), 1))
    taught = torch.stack(distilled).mean() if distilled else 0
    distillation = beta * torch.stack(mse).mean() + head_weight * torch.stack(head).mean()
    return torch.stack(ce).mean() + gamma * taught + distillation


def unlike_donor(model, images: Tensor, label: int, own: int, rank: int) -> int:
    """The pool's image that comes at `rank` from the one least like the label, without `own`."""
    found = []
    for n in range(len(images)):
        feature, _ = features(model.visual, images[n])
        found.append((float(logits(model, feature).softmax(dim=0)[label]), n))
    others = sorted(pair for pair in found if pair[1] != own)
    return others[rank][1]
