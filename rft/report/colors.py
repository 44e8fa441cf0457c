"""Colours that are legible on a light and on a dark background. Pure."""

from matplotlib.colors import to_hex, to_rgb

LIGHT, DARK = "#ffffff", "#16191d"
"""The backgrounds of the page."""
LEGIBLE = 4.5  # contrast of text with its background (WCAG 2.2, level AA)


def contrast(one: str, two: str) -> float:
    """Compute the contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((_luminance(one), _luminance(two)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def legible(color: str, ground: str) -> str:
    """Mix a colour with black or white as far as it needs to be legible on a background."""
    end = 0.0 if contrast("#000000", ground) > contrast("#ffffff", ground) else 1.0
    red, green, blue = to_rgb(color)
    for tenth in range(11):
        own, other = 1 - tenth / 10, end * tenth / 10
        mixed = to_hex((own * red + other, own * green + other, own * blue + other))
        if contrast(mixed, ground) >= LEGIBLE:
            break
    return mixed
