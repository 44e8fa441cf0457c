"""The training objective: cross-entropy plus distillation on counterfactual images.

L = CE(g(f(x)), y) + gamma KD(g(f(x)), g_e(f_e(x))) + beta MSE(f(x_cf), f_0(x_cf))   (eq. 2 and 3)

`head_weight`, of rft's own, adds KL(g_0(f_0(x_cf)) || g(f(x_cf))) of the class probabilities.

f_0 is the frozen pre-trained tower; the ensemble (f_e, g_e) is WiSE-KD's second teacher, if there
is one. One module holds all models so that data parallelism wraps it as a whole. A step is two
calls with a backward after each, and only one of the two graphs is ever alive; without masks, where
x_cf = x, the first is enough:
  clean: one forward of x serves the cross-entropy and the CAM that decides the donors;
  counterfactual: student and teacher see the same refilled patches.
What chance decides is drawn before the first call, on the CPU, so that nothing waits for a GPU.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from rft.clip import vit
from rft.clip.classifier import Classifier
from rft.clip.vit import AttentionTap
from rft.config import MethodConfig
from rft.method import counterfactual, losses, refill
from rft.method.counterfactual import Draws
from rft.train.kernels import Kernels

NONE: Mapping[str, Tensor] = MappingProxyType({})


class Clean(NamedTuple):
    """What the clean call returns."""

    loss: Tensor
    """All of the step's loss but the counterfactual part, weighted; to be sent backward."""
    cross_entropy: Tensor
    logit_distillation: Tensor
    """0 without a second teacher."""
    mse: Tensor
    """Of the features on the clean images; 0 if they are not what is distilled on."""
    head: Tensor
    """The head's distillation on the clean images, as `mse`."""
    donor_BP: Tensor | None
    """The counterfactuals' index map; None if there is no counterfactual part."""


class Counterfactual(NamedTuple):
    """What the counterfactual call returns."""

    loss: Tensor
    """Weighted; to be sent backward."""
    mse: Tensor
    """Of the features."""
    head: Tensor
    """The head's distillation; 0 where it has no weight."""


class Objective(nn.Module):
    """Student, frozen teachers and the losses between them."""

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier,
        method: MethodConfig,
        *,
        ensemble: Classifier | None = None,
        pretrained: Classifier | None = None,
        recompute: bool = False,
        kernels: Kernels = Kernels(),  # noqa: B008 (a constant)
    ) -> None:
        """Join the models; `pretrained` is the teacher in fp32 where the teacher itself is lower.

        Only methods that hold weights to the pre-trained ones need it.
        """
        super().__init__()
        assert (ensemble is not None) == (method.kd_weight > 0), "kd_weight and a second teacher"
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.ensemble = None if ensemble is None else ensemble.eval().requires_grad_(False)
        self.pretrained = None if pretrained is None else pretrained.eval().requires_grad_(False)
        self.method = method
        self.recompute = recompute
        self.kernels = kernels

    def anchored(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights that learn and, in the same order, the pre-trained ones (theta_0)."""
        pretrained = self.pretrained or self.teacher
        pairs = zip(self.student.parameters(), pretrained.parameters(), strict=True)
        learning = [(own, anchor.detach()) for own, anchor in pairs if own.requires_grad]
        # a difference to rounded weights would be that of their rounding
        assert all(own.dtype == anchor.dtype for own, anchor in learning), "theta_0 was lowered"
        return [own for own, _ in learning], [anchor for _, anchor in learning]

    @property
    def sees_clean(self) -> bool:
        """Whether the clean images' features of the teacher are wanted."""
        method = self.method
        plain = method.distill_weight > 0 and not method.masks
        # a CAM of the teacher has a forward of its own, whose features serve the choice as well
        return plain or (method.donor_choice == "unlike" and method.cam_model == "student")

    @property
    def frozen(self) -> dict[str, Classifier]:
        """The towers that do not learn and see clean images, by the name of their model here."""
        towers = {}
        if not any(parameter.requires_grad for parameter in self.student.visual.parameters()):
            towers["student"] = self.student
        if self.sees_clean:
            towers["teacher"] = self.teacher
        if self.ensemble is not None:
            towers["ensemble"] = self.ensemble
        return towers

    @torch.no_grad()
    def frozen_features(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the features (B, E) of the frozen towers, for `forward` to be called with."""
        pieces = self.kernels.pieces
        patches_BPV = self.student.patches(images_BCHW, pieces)
        towers = self.frozen.items()
        return {name: model.features(patches_BPV, pieces=pieces) for name, model in towers}

    def forward(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        draws: Draws | None,
        donor_BP: Tensor | None = None,
        known: Mapping[str, Tensor] = NONE,
    ) -> Clean | Counterfactual:
        """Return the clean losses and the donors, or the losses on the counterfactuals.

        Args:
            images_BCHW: uint8; this micro-batch for the clean call, and for the counterfactual call
                the donor pool that it belongs to.
            labels_B: class ids.
            draws: this micro-batch's; None if there is no counterfactual part.
            donor_BP: None for the clean call; its answer for the counterfactual call.
            known: for the clean call, the features of all frozen towers or of none. With the
                student's among them the images are not looked at.
        """
        if donor_BP is None:
            return self._clean(images_BCHW, labels_B, draws, known)
        assert draws is not None, "a counterfactual was decided without draws"
        return self._counterfactual(images_BCHW, draws, donor_BP)

    def _clean(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        draws: Draws | None,
        known: Mapping[str, Tensor],
    ) -> Clean:
        # a list collects each layer's attention; without a CAM none is kept
        method = self.method
        looks = method.needs_cam and method.cam_model == "student"
        taps: list[AttentionTap] | None = [] if looks else None
        pieces = self.kernels.pieces
        with record_function("clean forward"):
            if "student" in known:
                patches_BPV, features_BE = images_BCHW, known["student"]
            else:
                patches_BPV = self.student.patches(images_BCHW, pieces)
                features_BE = self.student.features(
                    patches_BPV, taps=taps, recompute=self.recompute, pieces=pieces
                )
            logits_BK = self.student.logits(features_BE)
            cross_entropy = losses.classification(logits_BK, labels_B)
        # tensors, so that an absent term adds and is summed over ranks as any other
        logit_distillation = mse = head = torch.zeros_like(cross_entropy)
        if self.ensemble is not None:
            with record_function("second teacher"), torch.no_grad():
                taught_BK = self.ensemble.logits(self._known(known, "ensemble", patches_BPV))
            logit_distillation = losses.knowledge_distillation(
                logits_BK, taught_BK, method.kd_temperature
            )
        teacher_BE = None
        if self.sees_clean:
            with record_function("teacher forward"), torch.no_grad():
                teacher_BE = self._known(known, "teacher", patches_BPV)
            if not method.masks:
                mse, head = self._distillation(features_BE, logits_BK, teacher_BE)
        loss = losses.total(method, cross_entropy, logit_distillation, mse, head)
        donor_BP = None
        if draws is not None:
            if method.needs_cam and method.cam_model == "teacher":
                taps = []
                logits_BK, teacher_BE = self._teacher_graph(patches_BPV, taps)
            relevance_BP = None
            if taps is not None:
                with record_function("cam"):
                    # before any backward: it looks into the graph that the loss goes back through
                    relevance_BP = counterfactual.cam(
                        method.cam, logits_BK, labels_B, taps, self.kernels.through
                    )
            likeness_BZ = self._likeness(teacher_BE, labels_B)
            donor_BP = counterfactual.donors(method, draws, relevance_BP, likeness_BZ)
        return Clean(loss, cross_entropy, logit_distillation, mse, head, donor_BP)

    def _teacher_graph(
        self, patches_BPV: Tensor, taps: list[AttentionTap]
    ) -> tuple[Tensor, Tensor]:
        """Make the teacher's logits (B, K), in a graph with a tap on each layer, and features."""
        with record_function("teacher forward"):
            # its weights are frozen, so the graph starts at the pixels
            patches_BPV = patches_BPV.detach().requires_grad_()
            features_BE = self.teacher.features(
                patches_BPV, taps=taps, recompute=self.recompute, pieces=self.kernels.pieces
            )
            return self.teacher.logits(features_BE), features_BE.detach()

    def _likeness(self, teacher_BE: Tensor | None, labels_B: Tensor) -> Tensor | None:
        """How much the images look like each one's label (B, B); None where no donor needs it."""
        if self.method.donor_choice == "any":
            return None
        assert teacher_BE is not None, "donors are chosen by the teacher, which saw no clean image"
        with torch.no_grad():
            return refill.likeness(self.teacher.logits(teacher_BE), labels_B)

    def _distillation(
        self, student_BE: Tensor, student_BK: Tensor | None, teacher_BE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the features' MSE and the head's KL; without logits the student makes them."""
        mse = losses.feature_mse(student_BE, teacher_BE)
        if self.method.head_weight == 0:
            return mse, torch.zeros_like(mse)
        with torch.no_grad():
            teacher_BK = self.teacher.logits(teacher_BE)
        if student_BK is None:
            student_BK = self.student.logits(student_BE)
        return mse, losses.knowledge_distillation(student_BK, teacher_BK, temperature=1)

    def _known(self, known: Mapping[str, Tensor], name: str, patches_BPV: Tensor) -> Tensor:
        if name in known:
            return known[name]
        return getattr(self, name).features(patches_BPV, pieces=self.kernels.pieces)

    def _counterfactual(self, pool_ZCHW: Tensor, draws: Draws, donor_BP: Tensor) -> Counterfactual:
        pool_ZPV = vit.cut_patches(pool_ZCHW, self.student.patch_side)
        # both towers want the same numbers
        filled_BPV = refill.apply_donors(pool_ZPV, donor_BP, draws.own_B1)
        patches_BPV = self.student.normalise(filled_BPV, self.kernels.pieces)
        options: dict[str, Any] = {"pieces": self.kernels.pieces}
        if self.method.drops:
            # a CAM or a Bernoulli mask keeps different numbers of patches in different images
            keep_BP, ragged = donor_BP != refill.DROP, draws.kept is None
            most = self._most_kept(draws, keep_BP)
            options |= {"keep_BP": keep_BP, "most": most, "ragged": ragged}
            if ragged and most is not None:
                # a length for each batch, and a compiler would compile for each of them
                options["pieces"] = vit.EAGER
        with record_function("teacher forward"), torch.no_grad():
            teacher_BE = self.teacher.features(patches_BPV, **options)
        with record_function("counterfactual forward"):
            student_BE = self.student.features(patches_BPV, recompute=self.recompute, **options)
            mse, head = self._distillation(student_BE, None, teacher_BE)
        if self.method.head_weight == 0:
            # data parallelism waits for every parameter: give the unused head its zero gradient
            mse = mse + 0.0 * sum(parameter.sum() for parameter in self.student.head.parameters())
        return Counterfactual(losses.distillation(self.method, mse, head), mse, head)

    def _most_kept(self, draws: Draws, keep_BP: Tensor) -> int | None:
        match self.method.no_fill:
            case "key-mask":
                return None
            case "token-drop" if draws.kept is None:
                # the length of a tensor must be known here: this one waits for the GPU
                return int(keep_BP.sum(dim=1).amax())
            case "auto" | "token-drop":
                return draws.kept
