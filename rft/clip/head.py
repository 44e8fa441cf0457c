"""The zero-shot head: a trainable linear layer, initialised with text embeddings.

It is the head of the released code and of WiSE-FT: each class's prompts are embedded, normalised,
averaged and normalised again; the logit scale is folded into the weight, and the bias starts at
zero.
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
    """Build the linear head E -> K that classifies normalised image features.

    Args:
        clip: the pre-trained model with both towers, on the compute device: ImageNet's 80,000
            prompts take seconds on a GPU and an hour on one CPU thread.
        classes: class names in label order, K of them.
        templates: prompts in which `{c}` stands for the name (80 for ImageNet).

    Raises:
        ValueError: if there are no templates, a template lacks the placeholder, a prompt is too
            long for the text tower (naming its class), or that tower cannot be computed or does not
            match the image tower's features.
    """
    if bad := [template for template in templates if "{c}" not in template]:
        raise ValueError(f"prompt template {bad[0]!r} has no placeholder {{c}}")
    if not templates:
        raise ValueError(
            "the data set's manifest has no prompt templates; pack or index it again with --classes"
        )
    # functions, because open_clip calls str.format on strings, where any other brace is an error
    prompts = [lambda name, t=template: t.replace("{c}", name) for template in templates]
    device = clip.model.logit_scale.device
    try:
        weight_EK = open_clip.build_zero_shot_classifier(
            clip.model, clip.tokenize, classes, prompts, device=device
        )
    except TextTooLongError as error:
        # open_clip tokenizes several classes at once, so the error has the prompt but not its class
        name, template = next(
            (name, template)
            for name in classes
            for template in templates
            if template.replace("{c}", name) == error.text
        )
        raise ValueError(
            f"class {_quoted(name)} gives a prompt of more than {error.limit} tokens with "
            f"{_quoted(template)}, too long for the text tower of {clip.architecture.clip}; "
            "shorten it in --classes, and pack or index the set again"
        ) from error
    # open_clip can build towers that it cannot compute, because some options exclude others
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the text tower of {clip.architecture.clip} cannot be computed: {first_line(error)}"
        ) from error
    expected = clip.architecture.embed_dim, len(classes)
    if weight_EK.shape != expected:
        raise ValueError(
            f"the text tower of {clip.architecture.clip} gives a head of {tuple(weight_EK.shape)} "
            f"features and classes, but its image tower needs {expected}; is its pool_type right?"
        )
    head = nn.Linear(weight_EK.shape[0], weight_EK.shape[1], device=device)
    # (K, E), as in nn.Linear; CLIP stores the logarithm of its scale
    head.weight.copy_(weight_EK.T * clip.model.logit_scale.exp())
    head.bias.zero_()
    return head


def _quoted(text: str, limit: int = 60) -> str:
    """Quote a text for a message, and cut it if it is very long."""
    return shown(text if len(text) <= limit else f"{text[: limit - 3]}...")
