"""The training objective: cross-entropy plus distillation on counterfactual images.

L = CE(g(f(x)), y) + beta MSE(f(x_cf), f_0(x_cf))   (eq. 2; f_0 is the frozen pre-trained tower)

One module holds student and teacher so that data parallelism wraps it as a whole. A step is two
calls with a backward after each, and only one of the two graphs is ever alive:
  clean: one forward of x serves the cross-entropy and the CAM that decides the donors;
  counterfactual: student and teacher see the same refilled patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rft import rng
from rft.clip.classifier import Classifier
from rft.clip.vit import AttentionTap
from rft.config import MethodConfig
from rft.method import losses, masking, refill, relevance


@dataclass(frozen=True)
class StepAddress:
    """Names the random draws of one micro-batch (see rft/rng.py)."""

    seed: int
    step: int
    rank: int
    micro: int

    def generator(self, purpose: str) -> torch.Generator:
        """Return the generator of this micro-batch for one purpose."""
        return rng.torch_generator(self.seed, purpose, self.step, self.rank, self.micro)


class Objective(nn.Module):
    """Student, frozen teacher and the losses between them."""

    def __init__(self, student: Classifier, teacher: Classifier, method: MethodConfig) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.method = method

    @property
    def distils(self) -> bool:
        """Whether a step has a counterfactual part."""
        return self.method.distill_weight > 0

    def forward(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        address: StepAddress,
        donor_BP: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return a loss to send backward and, from the clean call, the donors.

        Args:
            images_BCHW: uint8 images.
            labels_B: class ids.
            address: where this micro-batch's randomness comes from.
            donor_BP: None for the clean call; its answer for the counterfactual call.
        """
        if donor_BP is None:
            return self._clean(images_BCHW, labels_B, address)
        return self._counterfactual(images_BCHW, donor_BP), None

    def _clean(
        self, images_BCHW: Tensor, labels_B: Tensor, address: StepAddress
    ) -> tuple[Tensor, Tensor | None]:
        patches_BPD = self.student.patches(images_BCHW)
        taps: list[AttentionTap] | None = [] if self._needs_cam else None
        logits_BK = self.student.logits(self.student.features(patches_BPD, taps=taps))
        cross_entropy = losses.classification(logits_BK, labels_B)
        if not self.distils:
            return cross_entropy, None
        relevance_BP = None
        if taps is not None:
            relevance_BP = relevance.normalise(relevance.label_relevance(logits_BK, labels_B, taps))
        mask_BP = build_mask(self.method, patches_BPD.shape[:2], relevance_BP, address)
        donor_BP = build_donors(self.method, mask_BP.to(images_BCHW.device), address)
        return cross_entropy, donor_BP

    def _counterfactual(self, images_BCHW: Tensor, donor_BP: Tensor) -> Tensor:
        keep_BP = donor_BP != refill.DROP if self._drops else None
        with torch.no_grad():
            teacher_BE = self._features(self.teacher, images_BCHW, donor_BP, keep_BP)
        student_BE = self._features(self.student, images_BCHW, donor_BP, keep_BP)
        mse = losses.feature_mse(student_BE, teacher_BE)
        # data parallelism waits for every parameter: give the unused head its zero gradient
        unused = sum(parameter.sum() for parameter in self.student.head.parameters())
        return mse + 0.0 * unused

    @staticmethod
    def _features(
        model: Classifier, images_BCHW: Tensor, donor_BP: Tensor, keep_BP: Tensor | None
    ) -> Tensor:
        patches_BPD = refill.apply_donors(model.patches(images_BCHW), donor_BP)
        return model.features(patches_BPD, keep_BP)

    @property
    def _needs_cam(self) -> bool:
        return self.distils and self.method.mask in ("object", "context")

    @property
    def _drops(self) -> bool:
        return self.method.mask != "none" and self.method.fill == "none"


def build_mask(
    method: MethodConfig,
    shape_BP: Sequence[int],
    relevance_BP: Tensor | None,
    address: StepAddress,
) -> Tensor:
    """Return the mask that `method` asks for, bool (B, P); relevance is normalised."""
    match method.mask:
        case "none":
            return torch.zeros(shape_BP, dtype=torch.bool)
        case "random":
            draw = masking.fixed_count_mask if method.fill == "none" else masking.bernoulli_mask
            return draw(shape_BP, method.rate, address.generator("mask"))
        case "object":
            assert relevance_BP is not None
            return masking.object_mask(relevance_BP, method.threshold)
        case "context":
            assert relevance_BP is not None
            return masking.context_mask(relevance_BP, method.threshold)


def build_donors(method: MethodConfig, mask_BP: Tensor, address: StepAddress) -> Tensor:
    """Return the donors that `method` asks for, int64 (B, P)."""
    match method.fill:
        case "none":
            return refill.no_fill(mask_BP)
        case "single":
            return refill.single_fill(mask_BP, address.generator("fill"))
        case "multi":
            return refill.multi_fill(mask_BP, address.generator("fill"))
