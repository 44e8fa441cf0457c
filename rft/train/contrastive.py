"""FLYP: fine-tuning of image and text tower by CLIP's pre-training loss.

Each image is paired with a prompt of its class, from a template drawn anew in each step. The
negatives come from the global batch on any number of ranks. The loss does not use the head; the
head is built from the text tower at the end of each epoch, so that a run's weights have the same
form as those of other recipes.

Shapes: B images of this rank, K classes, M templates, T tokens, E embedding.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rft import dist
from rft.clip.text import TextTower, head_weight
from rft.dist import World
from rft.method.contrastive import info_nce


class Pairs(NamedTuple):
    """The prompts of a step, and the exchange of features between ranks."""

    template_B: Tensor
    """Template of each image's prompt, int64."""
    gather: Callable[[Tensor], Tensor]
    """Concatenates the rows of all ranks in rank order; gradients flow back to their rank."""
    first: int
    """This rank's first row among them."""


class Contrast(nn.Module):
    """The trained text tower, and the prompts of every class."""

    prompts_KMT: Tensor

    def __init__(self, tower: TextTower, prompts_KMT: Tensor) -> None:
        super().__init__()
        self.tower = tower
        # on the device, so that looking up prompts by labels needs no synchronisation
        self.register_buffer("prompts_KMT", prompts_KMT, persistent=False)

    @property
    def templates(self) -> int:
        """Number of prompts per class."""
        return self.prompts_KMT.shape[1]

    def forward(self, features_BE: Tensor, labels_B: Tensor, pairs: Pairs) -> Tensor:
        """Compute this rank's part of the loss; `features_BE` are the image tower's."""
        texts_BE = self.tower(self.prompts_KMT[labels_B, pairs.template_B])
        images_BE = F.normalize(features_BE.float(), dim=-1)
        # images and texts in one exchange
        all_GE = pairs.gather(torch.cat([images_BE, texts_BE], dim=1))
        all_images_GE, all_texts_GE = all_GE.chunk(2, dim=1)
        return info_nce(
            images_BE, texts_BE, all_images_GE, all_texts_GE, self.tower.scale, pairs.first
        )

    @torch.no_grad()
    def rebuild(self, head: nn.Linear, world: World) -> None:
        """Build the zero-shot head from the current text tower; each rank embeds some classes."""
        classes = len(self.prompts_KMT)
        each = -(-classes // world.size)
        # the last ranks repeat the last class, because ranks exchange equal shapes
        numbers = torch.arange(world.rank * each, (world.rank + 1) * each).clamp(max=classes - 1)
        own_KE = head_weight(self.tower, self.prompts_KMT[numbers.to(self.prompts_KMT.device)])
        head.weight.copy_(dist.gather_rows(world, own_KE)[:classes])
