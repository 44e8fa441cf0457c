"""The training objective: cross-entropy plus distillation on counterfactual images.

L = CE(g(f(x)), y) + gamma KD(g(f(x)), g_e(f_e(x))) + beta MSE(f(x_cf), f_0(x_cf))   (eq. 2 and 3)

`head_weight`, rft's own, adds KL(g_0(f_0(x_cf)) || g(f(x_cf))) of the class probabilities.

f_0 is the frozen pre-trained tower; the ensemble (f_e, g_e) is WiSE-KD's second teacher, if used.
One module holds all models, so that data parallelism can wrap it. A step is two calls with a
backward after each, and only one of the two graphs is alive at a time; without masks, where x_cf =
x, the first call is enough:
  clean: one forward of x serves the cross-entropy and the CAM that decides the donors;
  counterfactual: student and teacher see the same refilled patches.
All random numbers are drawn before the first call, on the CPU, so that nothing waits for a GPU.

Methods published later add terms to the clean call, or replace the cross-entropy
(rft/train/texts.py, rft/train/contrastive.py). With a moving teacher f_0 is a running average of
the student.
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
from rft.train.contrastive import Pairs
from rft.train.kernels import Kernels
from rft.train.texts import Texts

NONE: Mapping[str, Tensor] = MappingProxyType({})


class Clean(NamedTuple):
    """Result of the clean call."""

    loss: Tensor
    """The step's weighted loss without the counterfactual part; run backward on it."""
    terms: Mapping[str, Tensor]
    """Its unweighted terms, by the names of `losses.total`. `kd` is 0 without a second teacher,
    `mse` if features are not distilled on the clean images."""
    donor_BP: Tensor | None
    """The counterfactuals' index map; None if there is no counterfactual part."""


class Counterfactual(NamedTuple):
    """Result of the counterfactual call."""

    loss: Tensor
    """Weighted; run backward on it."""
    terms: Mapping[str, Tensor]
    """Its unweighted terms, by the names of `losses.distillation`."""


class TextDraws(NamedTuple):
    """The texts of a step, for methods that need them."""

    random_ME: Tensor | None = None
    """Features of Lipsum-FT's random texts, times the logit scale."""
    pairs: Pairs | None = None
    """FLYP's prompts."""


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
        texts: Texts = Texts(),  # noqa: B008 (a constant)
        recompute: bool = False,
        kernels: Kernels = Kernels(),  # noqa: B008 (a constant)
    ) -> None:
        """Join the models; `pretrained` is the teacher in fp32, if the teacher itself is in bf16.

        Only methods that hold weights to the pre-trained ones need it.
        """
        super().__init__()
        assert (ensemble is not None) == (method.kd_weight > 0), "kd_weight and a second teacher"
        needed = (method.context_weight > 0, method.lipsum_weight > 0, method.loss == "contrastive")
        assert tuple(one is not None for one in texts[:3]) == needed, "the method's texts"
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.ensemble = None if ensemble is None else ensemble.eval().requires_grad_(False)
        self.pretrained = None if pretrained is None else pretrained.eval().requires_grad_(False)
        self.contexts_ME: Tensor | None
        self.register_buffer("contexts_ME", texts.contexts_ME, persistent=False)
        self.random_texts = texts.random
        # after the student, so that its parameters keep their numbers in the optimizer
        self.contrast = texts.contrast
        self.method = method
        self.recompute = recompute
        self.kernels = kernels

    def anchored(self) -> tuple[list[Tensor], list[Tensor]]:
        """Pair the trained weights with the pre-trained ones (theta_0), in the same order."""
        pretrained = self.pretrained or self.teacher
        pairs = zip(self.student.parameters(), pretrained.parameters(), strict=True)
        learning = [(own, anchor.detach()) for own, anchor in pairs if own.requires_grad]
        # the difference to rounded weights would be mostly their rounding error
        assert all(own.dtype == anchor.dtype for own, anchor in learning), "theta_0 was lowered"
        return [own for own, _ in learning], [anchor for _, anchor in learning]

    @property
    def frozen(self) -> dict[str, Classifier]:
        """The frozen towers that see clean images, by the name of their model here."""
        towers = {}
        if not any(parameter.requires_grad for parameter in self.student.visual.parameters()):
            towers["student"] = self.student
        if self.method.compares:
            towers["teacher"] = self.teacher
        if self.ensemble is not None:
            towers["ensemble"] = self.ensemble
        return towers

    @torch.no_grad()
    def frozen_features(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Compute the features (B, E) of the frozen towers, for `known` of `forward`."""
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
        texts: TextDraws = TextDraws(),  # noqa: B008 (a constant)
    ) -> Clean | Counterfactual:
        """Compute the clean losses and the donors, or the losses on the counterfactuals.

        Args:
            images_BCHW: uint8; this micro-batch for the clean call, its donor pool for the
                counterfactual call.
            labels_B: class ids.
            draws: this micro-batch's random draws; None without a counterfactual part.
            donor_BP: None for the clean call, whose result has it for the counterfactual call.
            known: for the clean call, the features of all frozen towers or of none. If the
                student's are among them, the images are not used.
            texts: for the clean call, the step's texts.
        """
        if donor_BP is None:
            return self._clean(images_BCHW, labels_B, draws, known, texts)
        assert draws is not None, "a counterfactual was decided without draws"
        return self._counterfactual(images_BCHW, draws, donor_BP)

    def _clean(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        draws: Draws | None,
        known: Mapping[str, Tensor],
        texts: TextDraws,
    ) -> Clean:
        # a list collects each layer's attention; without a CAM none is kept
        method = self.method
        looks = method.needs_cam and method.cam_model == "student"
        taps: list[AttentionTap] | None = [] if looks else None
        pieces, terms = self.kernels.pieces, {}
        with record_function("clean forward"):
            if "student" in known:
                patches_BPV, features_BE = images_BCHW, known["student"]
            else:
                patches_BPV = self.student.patches(images_BCHW, pieces)
                features_BE = self.student.features(
                    patches_BPV, taps=taps, recompute=self.recompute, pieces=pieces
                )
            logits_BK = None
            if self.contrast is None:
                logits_BK = self.student.logits(features_BE)
                terms["ce"] = losses.classification(logits_BK, labels_B)
            else:
                assert texts.pairs is not None, "no prompts were drawn"
                terms["contrastive"] = self.contrast(features_BE, labels_B, texts.pairs)
        # tensors, so that an absent term is added and summed over ranks like any other
        terms["kd"] = terms["mse"] = features_BE.new_zeros((), dtype=torch.float32)
        if method.head_weight > 0:
            terms["head"] = terms["mse"]
        if self.ensemble is not None:
            assert logits_BK is not None, "logits are distilled that are not trained"
            with record_function("second teacher"), torch.no_grad():
                taught_BK = self.ensemble.logits(self._known(known, "ensemble", patches_BPV))
            terms["kd"] = losses.knowledge_distillation(logits_BK, taught_BK, method.kd_temperature)
        teacher_BE = None
        if method.compares or (method.distill_weight > 0 and not method.masks):
            with record_function("teacher forward"), torch.no_grad():
                teacher_BE = self._known(known, "teacher", patches_BPV)
            terms |= self._comparisons(features_BE, logits_BK, teacher_BE, texts)
        loss = losses.total(method, terms)
        donor_BP = None
        if draws is not None:
            if method.needs_cam and method.cam_model == "teacher":
                taps = []
                logits_BK, teacher_BE = self._teacher_graph(patches_BPV, taps)
            relevance_BP = None
            if taps is not None:
                assert logits_BK is not None, "a CAM looks through a head that is not trained"
                with record_function("cam"):
                    # before any backward, because it uses the graph that the loss needs
                    relevance_BP = counterfactual.cam(
                        method.cam, logits_BK, labels_B, taps, self.kernels.through
                    )
            likeness_BZ = self._likeness(teacher_BE, labels_B)
            donor_BP = counterfactual.donors(method, draws, relevance_BP, likeness_BZ)
        return Clean(loss, terms, donor_BP)

    def _teacher_graph(
        self, patches_BPV: Tensor, taps: list[AttentionTap]
    ) -> tuple[Tensor, Tensor]:
        """Compute the teacher's logits (B, K), in a graph with taps on its layers, and features."""
        with record_function("teacher forward"):
            # its weights are frozen, so the graph must start at the pixels
            patches_BPV = patches_BPV.detach().requires_grad_()
            features_BE = self.teacher.features(
                patches_BPV, taps=taps, recompute=self.recompute, pieces=self.kernels.pieces
            )
            return self.teacher.logits(features_BE), features_BE.detach()

    def _likeness(self, teacher_BE: Tensor | None, labels_B: Tensor) -> Tensor | None:
        """Likeness of each image to the label of each other (B, B); None if no donor needs it."""
        if self.method.donor_choice == "any":
            return None
        assert teacher_BE is not None, "donors are chosen by the teacher, which saw no clean image"
        with torch.no_grad():
            return refill.likeness(self.teacher.logits(teacher_BE), labels_B)

    def _comparisons(
        self,
        features_BE: Tensor,
        logits_BK: Tensor | None,
        teacher_BE: Tensor,
        texts: TextDraws,
    ) -> dict[str, Tensor]:
        """Compute the terms that compare the clean images' features with the teacher's."""
        method, found = self.method, {}
        if method.distill_weight > 0 and not method.masks:
            found |= self._distillation(features_BE, logits_BK, teacher_BE)
        if self.contexts_ME is not None:
            found["context"] = losses.context_divergence(features_BE, teacher_BE, self.contexts_ME)
        if self.random_texts is not None:
            assert texts.random_ME is not None, "no random texts were drawn"
            found["lipsum"] = losses.random_text_distance(features_BE, teacher_BE, texts.random_ME)
        return found

    def _distillation(
        self, student_BE: Tensor, student_BK: Tensor | None, teacher_BE: Tensor
    ) -> dict[str, Tensor]:
        """Compute the features' MSE and the head's KL; missing student logits are computed."""
        found = {"mse": losses.feature_mse(student_BE, teacher_BE)}
        if self.method.head_weight > 0:
            with torch.no_grad():
                teacher_BK = self.teacher.logits(teacher_BE)
            if student_BK is None:
                student_BK = self.student.logits(student_BE)
            found["head"] = losses.knowledge_distillation(student_BK, teacher_BK, temperature=1)
        return found

    def _known(self, known: Mapping[str, Tensor], name: str, patches_BPV: Tensor) -> Tensor:
        if name in known:
            return known[name]
        return getattr(self, name).features(patches_BPV, pieces=self.kernels.pieces)

    def _counterfactual(self, pool_ZCHW: Tensor, draws: Draws, donor_BP: Tensor) -> Counterfactual:
        pool_ZPV = vit.cut_patches(pool_ZCHW, self.student.patch_side)
        # both towers take the same normalised pixels
        filled_BPV = refill.apply_donors(pool_ZPV, donor_BP, draws.own_B1)
        patches_BPV = self.student.normalise(filled_BPV, self.kernels.pieces)
        options: dict[str, Any] = {"pieces": self.kernels.pieces}
        if self.method.drops:
            # a CAM or a Bernoulli mask keeps different numbers of patches in different images
            keep_BP, ragged = donor_BP != refill.DROP, draws.kept is None
            most = self._most_kept(draws, keep_BP)
            options |= {"keep_BP": keep_BP, "most": most, "ragged": ragged}
            if ragged and most is not None:
                # eager, because the length changes per batch and each would be compiled
                options["pieces"] = vit.EAGER
        with record_function("teacher forward"), torch.no_grad():
            teacher_BE = self.teacher.features(patches_BPV, **options)
        with record_function("counterfactual forward"):
            student_BE = self.student.features(patches_BPV, recompute=self.recompute, **options)
            terms = self._distillation(student_BE, None, teacher_BE)
        # data parallelism waits for every parameter: give the unused ones a zero gradient
        idle = [*([] if "head" in terms else [self.student.head]), *filter(None, [self.contrast])]
        unused = sum(one.sum() for module in idle for one in module.parameters())
        return Counterfactual(losses.distillation(self.method, terms) + 0.0 * unused, terms)

    def _most_kept(self, draws: Draws, keep_BP: Tensor) -> int | None:
        match self.method.no_fill:
            case "key-mask":
                return None
            case "token-drop" if draws.kept is None:
                # a tensor's length must be known to the host, so this waits for the GPU
                return int(keep_BP.sum(dim=1).amax())
            case "auto" | "token-drop":
                return draws.kept
