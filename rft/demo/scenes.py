"""What is in an image of the miniature world, drawn before any pixel is.

A `Setting` is a distribution of scenes: which styles and contexts, how large and how turned the
object is, how it was photographed. Fine-tuning's settings tie each class to one context with
probability rho; that is the shortcut a robust model must not take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rft.demo.objects import CLASSES, Bank, Silhouettes

VERSION = 2  # of the world; a new one whenever any image changes, with newly trained weights

PLAIN = -1  # the context that is none
NUM_CONTEXTS = 24  # each pattern in two of the four palettes (rft/demo/render.py)
# Context c is the usual one of class c; those above are met in no fine-tuning image.
CLASS_CONTEXTS = range(len(CLASSES))
NOVEL_CONTEXTS = range(len(CLASSES), NUM_CONTEXTS)
RHO = 0.95
WIDE_ANGLE = 60.0

Style = Literal["photo", "cartoon", "painting", "embroidery", "sketch"]
ContextRule = Literal["usual", "wrong", "novel", "any"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A distribution of scenes.

    Ranges are uniform. `contexts` is "usual" (the class's own with probability `rho`, else any
    class's), "wrong" (always another class's), "novel" (none of the classes') or "any" (of all,
    or none). `wide_rotation` is the share of objects turned by up to 60 degrees.
    """

    bank: Bank
    styles: Mapping[Style, float]
    contexts: ContextRule
    rho: float = RHO
    angle: float = 12
    wide_rotation: float = 0
    size: tuple[float, float] = (35, 49)
    brightness: tuple[float, float] = (0.85, 1.15)
    noise: float = 0.04


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One image to be rendered: an object (`silhouette`) of a class on a context, in a style.

    Angles are degrees, sizes and shifts pixels; `noise` is a standard deviation.
    """

    class_id: int
    silhouette: np.ndarray
    context: int
    style: Style
    angle: float
    size: float
    shift: tuple[float, float]
    brightness: float
    noise: float


def draw_scene(
    setting: Setting, class_id: int, silhouettes: Silhouettes, rng: np.random.Generator
) -> Scene:
    """Draw one scene with an object of the class `class_id`."""
    # the draws below come in this order: another order would be another world (VERSION)
    instances = silhouettes[class_id]
    wide = rng.uniform() < setting.wide_rotation
    angle = WIDE_ANGLE if wide else setting.angle
    shift_x, shift_y = rng.uniform(-3, 3, size=2)
    silhouette = instances[rng.integers(len(instances))]
    context = draw_context(setting, class_id, rng)
    styles, shares = list(setting.styles), list(setting.styles.values())
    return Scene(
        class_id=class_id,
        silhouette=silhouette,
        context=context,
        style=styles[rng.choice(len(styles), p=shares)],
        angle=rng.uniform(-angle, angle),
        size=rng.uniform(*setting.size),
        shift=(shift_x, shift_y),
        brightness=rng.uniform(*setting.brightness),
        noise=setting.noise,
    )


def draw_context(setting: Setting, class_id: int, rng: np.random.Generator) -> int:
    """Draw a context for an object of the class `class_id`."""
    match setting.contexts:
        case "usual" if rng.uniform() < setting.rho:
            return class_id
        case "usual":
            # the class's own included, so it is met a little more often than rho
            return int(rng.choice(CLASS_CONTEXTS))
        case "wrong":
            return int(rng.choice([c for c in CLASS_CONTEXTS if c != class_id]))
        case "novel":
            return int(rng.choice(NOVEL_CONTEXTS))
        case "any":
            return int(rng.integers(PLAIN, NUM_CONTEXTS))
