"""Words about images of the miniature world: captions, prompts and their vocabulary.

Captions name the object almost always and the context seldom, as captions of photographs do; what
they leave out is still in the image, so the pre-trained model knows contexts but is not tied to
them.
"""

import numpy as np

from rft.demo.objects import CLASSES, DIGITS, SHAPES
from rft.demo.render import PALETTES, PATTERNS, pattern_and_palette
from rft.demo.scenes import PLAIN, Scene

TEMPLATES = (
    "a photo of a {c}.",
    "a photo of the {c}.",
    "a picture of a {c}.",
    "an image of a {c}.",
    "a {c}.",
    "a rotated {c}.",
    "a cartoon of a {c}.",
    "a painting of a {c}.",
    "an embroidery of a {c}.",
    "a sketch of a {c}.",
)
CONTEXT_LENGTH = 16  # tokens
# words are whole tokens: all that captions and TEMPLATES use must be in the vocabulary
_MEDIA = ("photo", "cartoon", "painting", "embroidery", "sketch", "picture", "image")
_OTHER = ("a", "an", "the", "of", "on", "with", "behind", "plain", "ground", "rotated", "thing")
# A word's index is its token id; the end must have the largest (rft.clip.load.WordTokenizer).
VOCABULARY = (
    *("<pad>", "<start>"),
    *sorted({"digit", *DIGITS, *SHAPES, *PATTERNS, *PALETTES, *_MEDIA, *_OTHER}),
    "<end>",
)
TURNED = 20  # degrees from which on an object may be called rotated; an upright one leans up to 12


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of the scene, drawn from many that would be true of it."""
    # in this order: other draws are other captions, and the shipped CLIP was trained on these
    name = CLASSES[scene.class_id] if rng.uniform() < 0.95 else "thing"
    if abs(scene.angle) > TURNED and rng.uniform() < 0.5:
        name = f"rotated {name}"
    article = "the" if rng.uniform() < 0.3 else "a"
    words = f"{article} {name}"
    if rng.uniform() < 0.9:
        words = f"{_with_article(scene.style)} of {words}"
    elif rng.uniform() < 0.5:
        words = f"{_with_article(str(rng.choice(['picture', 'image'])))} of {words}"
    if rng.uniform() < 0.2:
        words = f"{words} {_describe(scene.context, rng)}"
    return words


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _describe(context: int, rng: np.random.Generator) -> str:
    if context == PLAIN:
        return "on a plain ground"
    pattern, palette = pattern_and_palette(context)
    phrase = "on {}" if rng.uniform() < 0.5 else "with {} behind"
    return phrase.format(f"{palette} {pattern}")
