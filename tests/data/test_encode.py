"""Encodings: pixels are CLIP's own transform bit for bit, original bytes stay untouched."""

import io
from typing import Literal

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rft.data.encode import (
    clip_pixels,
    encode,
    encoding_parameters,
    load_image,
    payload_bytes,
    to_npy,
)


def random_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng([width, height])
    small = rng.integers(0, 256, (1 + height // 5, 1 + width // 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height)).convert(mode)


def to_bytes(image: Image.Image, format_name: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.sampled_from([1, 7, 32, 33, 64]))
def test_pixels_equal_torchvision(width: int, height: int, size: int) -> None:
    image = random_image(width, height)
    reference = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])(image)
    pixels_CHW = clip_pixels(image, size)
    assert pixels_CHW.flags.c_contiguous
    np.testing.assert_array_equal(pixels_CHW, np.asarray(reference).transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(500, 333), (333, 500), (225, 224), (224, 224), (100, 71)])
def test_pixels_equal_open_clip(shape: tuple[int, int]) -> None:
    image = random_image(*shape)
    transform = open_clip.image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    assert callable(transform)
    reference = (np.asarray(transform(image)) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(clip_pixels(image, 224), reference)


def test_border_is_cropped_before_the_resize() -> None:
    image = random_image(80, 60)
    framed = Image.new("RGB", (84, 64), "red")
    framed.paste(image, (2, 2))
    np.testing.assert_array_equal(clip_pixels(framed, 32, border=2), clip_pixels(image, 32))
    with pytest.raises(ValueError, match="all border"):
        clip_pixels(random_image(4, 50), 32, border=2)


@pytest.mark.parametrize(
    ("format_name", "mode", "suffix"),
    [
        ("JPEG", "RGB", "jpg"),
        ("JPEG", "CMYK", "jpg"),
        ("JPEG", "L", "jpg"),
        ("PNG", "P", "png"),
        ("PNG", "RGBA", "png"),
        ("WEBP", "RGB", "webp"),
    ],
)
def test_original_keeps_the_bytes_and_knows_the_type(
    format_name: str, mode: str, suffix: str
) -> None:
    data = to_bytes(random_image(50, 41, mode), format_name)
    encoded = encode(data, "wrong-suffix.JPEG", encoding_parameters("original", 0, 0))
    assert encoded.payload is data
    assert (encoded.suffix, encoded.format, encoded.mode) == (suffix, format_name, mode)
    assert (encoded.width, encoded.height) == (50, 41)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_pixels_of_a_file(mode: str) -> None:
    data = to_bytes(random_image(50, 41, mode), "JPEG")
    parameters = encoding_parameters("pixels", 32, 2)
    encoded = encode(data, "x", parameters)
    expected = clip_pixels(Image.open(io.BytesIO(data)).convert("RGB"), 32, 2)
    np.testing.assert_array_equal(np.load(io.BytesIO(encoded.payload)), expected)
    assert (encoded.suffix, encoded.mode, encoded.width) == ("npy", mode, 50)
    assert len(encoded.payload) == payload_bytes(parameters)
    assert encoded.payload.endswith(expected.tobytes())  # readers take the end of the payload


def test_parameters() -> None:
    assert encoding_parameters("original", 224, 2) == {"kind": "original", "crop_border": 2}
    pixels = encoding_parameters("pixels", 224, 0)
    assert {name: pixels[name] for name in pixels if name != "pillow"} == {
        "kind": "pixels",
        "size": 224,
        "resample": "bicubic",
        "crop_border": 0,
    }
    assert payload_bytes(encoding_parameters("original", 224, 0)) is None


@pytest.mark.parametrize("kind", ["original", "pixels"])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_unreadable_images_are_named(kind: Literal["original", "pixels"], format_name: str) -> None:
    whole = to_bytes(random_image(120, 90), format_name)
    parameters = encoding_parameters(kind, 32, 0)
    encode(whole, "n01/x.JPEG", parameters)
    damaged = [b"", b"text", whole[:20], whole[: len(whole) // 2], whole[: len(whole) * 9 // 10]]
    for data in damaged:
        with pytest.raises(ValueError, match=r"^n01/x\.JPEG "):
            encode(data, "n01/x.JPEG", parameters)
        with pytest.raises(ValueError, match=r"^n01/x\.JPEG "):
            load_image(data, "n01/x.JPEG")


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="no readable JPEG, PNG or WebP"):
        load_image(to_bytes(random_image(20, 20), "BMP"))


def test_a_side_that_is_all_border_is_named() -> None:
    data = to_bytes(random_image(4, 50), "PNG")
    for kind in ("original", "pixels"):
        with pytest.raises(ValueError, match=r"^x is 4 x 50 pixels"):
            encode(data, "x", encoding_parameters(kind, 32, 2))


def test_npy_is_plain() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    np.testing.assert_array_equal(np.load(io.BytesIO(to_npy(array)), allow_pickle=False), array)
