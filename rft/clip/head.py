"""The zero-shot head: a linear layer made of text embeddings, trainable from then on.

The released code's head (and WiSE-FT's): each class's prompts are embedded, normalised, averaged
and normalised again; the logit scale is folded into the weight and the bias starts at zero.
"""

from collections.abc import Sequence

import open_clip
import torch
from torch import nn

from rft.clip.load import PretrainedClip, TextTooLongError
from rft.clip.unpickle import first_line
from rft.text import shown


@torch.no_grad()
def zero_shot_head(
    clip: PretrainedClip, classes: Sequence[str], templates: Sequence[str]
) -> nn.Linear:
    """Return the linear head E -> K that classifies normalised image features.

    Args:
        clip: the pre-trained model, both towers, on the device that does the work: ImageNet's
            80,000 prompts take seconds on a GPU and an hour on one CPU thread.
        classes: class names in label order, K of them.
        templates: prompts in which `{c}` stands for the name (80 for ImageNet).

    Raises:
        ValueError: if there are no templates, one lacks the placeholder, a prompt is longer than
            the text tower reads (naming its class), or that tower cannot be computed or gives no
            features of the image tower's kind.
    """
    if bad := [template for template in templates if "{c}" not in template]:
        raise ValueError(f"prompt template {bad[0]!r} has no placeholder {{c}}")
    if not templates:
        raise ValueError("the data set's manifest has no prompt templates; pack it with --classes")
    # functions: texts would go through str.format, where any other brace is an error
    prompts = [lambda name, t=template: t.replace("{c}", name) for template in templates]
    device = clip.model.logit_scale.device
    try:
        weight_EK = open_clip.build_zero_shot_classifier(
            clip.model, clip.tokenize, classes, prompts, device=device
        )
    except TextTooLongError as error:
        # open_clip tokenizes several classes at once: the error knows the prompt and not its class
        name, template = next(
            (name, template)
            for name in classes
            for template in templates
            if template.replace("{c}", name) == error.text
        )
        raise ValueError(
            f"class {_quoted(name)} makes a prompt of more than {error.limit} tokens with "
            f"{_quoted(template)}, more than the text tower of {clip.architecture.clip} reads; "
            f"shorten it with --classes and pack again"
        ) from error
    # a tower that open_clip builds and then cannot compute: some of its options exclude others
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the text tower of {clip.architecture.clip} cannot be computed: {first_line(error)}"
        ) from error
    expected = clip.architecture.embed_dim, len(classes)
    if weight_EK.shape != expected:
        raise ValueError(
            f"the text tower of {clip.architecture.clip} makes a head of {tuple(weight_EK.shape)} "
            f"features and classes, its image tower needs {expected}; is its pool_type right?"
        )
    head = nn.Linear(weight_EK.shape[0], weight_EK.shape[1], device=device)
    # (K, E), as nn.Linear has it; a CLIP's scale is stored as its logarithm
    head.weight.copy_(weight_EK.T * clip.model.logit_scale.exp())
    head.bias.zero_()
    return head


def _quoted(text: str, limit: int = 60) -> str:
    """Quote a text for a message, cut where it is very long."""
    return shown(text if len(text) <= limit else f"{text[: limit - 3]}...")
