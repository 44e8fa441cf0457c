"""Encodings: pixels are CLIP's own transform bit for bit, original bytes stay untouched."""

import io
from typing import get_args

import numpy as np
import open_clip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rft.data.encode import (
    Kind,
    clip_pixels,
    clip_square,
    encode,
    encoding_parameters,
    expected_bytes,
    jpeg_skeleton,
    load_image,
    to_jpeg,
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


@pytest.mark.slow
@settings(max_examples=150)
@given(
    st.integers(1, 130),
    st.integers(1, 130),
    st.sampled_from([1, 7, 32, 33, 64]),
    st.sampled_from(["RGB", "L", "CMYK"]),
)
@example(1, 1, 64, "RGB")
@example(1500, 3, 32, "L")
@example(3, 1500, 33, "CMYK")
def test_pixels_equal_torchvision(width: int, height: int, size: int, mode: str) -> None:
    """Over odd sizes, specks and panoramas, from the bytes of a file, as an image folder reads."""
    data = to_bytes(random_image(width, height, mode), "JPEG")
    image = Image.open(io.BytesIO(data)).convert("RGB")
    reference = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])(image)
    pixels_CHW = clip_pixels(load_image(data), size)
    assert pixels_CHW.flags.c_contiguous
    np.testing.assert_array_equal(pixels_CHW, np.asarray(reference).transpose(2, 0, 1))
    stored = encode(data, "x", encoding_parameters("pixels", size, 0)).payload
    np.testing.assert_array_equal(np.load(io.BytesIO(stored)), pixels_CHW)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "shape", [(500, 333), (333, 500), (225, 224), (224, 224), (100, 71), (9, 1), (2000, 40)]
)
def test_pixels_equal_open_clip(shape: tuple[int, int], mode: str) -> None:
    image = load_image(to_bytes(random_image(*shape, mode), "JPEG"))
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
    assert encoded.suffix == suffix
    assert encoded.header == (format_name, mode, 50, 41)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_pixels_of_a_file(mode: str) -> None:
    data = to_bytes(random_image(50, 41, mode), "JPEG")
    parameters = encoding_parameters("pixels", 32, 2)
    encoded = encode(data, "x", parameters)
    expected = clip_pixels(Image.open(io.BytesIO(data)).convert("RGB"), 32, 2)
    np.testing.assert_array_equal(np.load(io.BytesIO(encoded.payload)), expected)
    assert (encoded.suffix, encoded.header) == ("npy", ("JPEG", mode, 50, 41))
    assert len(encoded.payload) == expected_bytes(parameters, len(data))
    assert encoded.payload.endswith(expected.tobytes())  # readers take the end of the payload


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from(["RGB", "L", "CMYK"]))
def test_jpeg_is_the_square_that_clip_sees(width: int, height: int, mode: str) -> None:
    data = to_bytes(random_image(width, height, mode), "JPEG")
    encoded = encode(data, "x", encoding_parameters("jpeg", 32, 0, quality=80))
    square = clip_square(Image.open(io.BytesIO(data)).convert("RGB"), 32)
    reference = to_bytes(square, "JPEG", quality=80, subsampling=0)
    assert encoded.payload == reference
    assert encoded.suffix == "jpg"
    assert encoded.header == ("JPEG", mode, width, height)  # the source's
    stored = load_image(encoded.payload)
    np.testing.assert_array_equal(clip_pixels(stored, 32), np.asarray(stored).transpose(2, 0, 1))


def test_jpeg_keeps_colour_and_little_else() -> None:
    """Nothing of the source's metadata, all of its colour resolution, nearly its pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    data = to_bytes(image, "JPEG", quality=100, subsampling=0, comment=b"shot by", dpi=(300, 300))
    stored = load_image(encode(data, "x", encoding_parameters("jpeg", 64, 0)).payload)
    assert set(stored.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    exact = np.asarray(load_image(data)).astype(int)
    halved = load_image(to_bytes(load_image(data), "JPEG", quality=95, subsampling=2))
    error, error_of_halved = (
        np.abs(np.asarray(image) - exact).mean() for image in (stored, halved)
    )
    assert error < 3 < 5 < error_of_halved
    assert to_jpeg(stored, 50) == to_jpeg(stored, 50)


def test_parameters() -> None:
    assert encoding_parameters("original", 224, 2) == {"kind": "original", "crop_border": 2}
    pixels = encoding_parameters("pixels", 224, 0)
    assert pixels.pop("version")
    assert pixels == {
        "kind": "pixels",
        "size": 224,
        "resample": "bicubic",
        "library": "Pillow",
        "crop_border": 0,
    }
    jpeg = encoding_parameters("jpeg", 224, 0, quality=90)
    assert jpeg.pop("version")
    assert jpeg == {**pixels, "kind": "jpeg", "quality": 90, "subsampling": "4:4:4"}
    assert expected_bytes(encoding_parameters("original", 224, 0), 77) == 77


def test_pillow_simd_calls_itself_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.__version__", "9.5.0.post2")
    parameters = encoding_parameters("pixels", 224, 0)
    assert (parameters["library"], parameters["version"]) == ("Pillow-SIMD", "9.5.0.post2")


# --- awkward files, as they occur in the published sets -----------------------------------------


def as_pillow_converts(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def check_every_encoding(data: bytes, suffix: str) -> None:
    """Each encoding stores what Pillow makes of the file, and `original` its true type."""
    square = Image.fromarray(as_pillow_converts(data))
    reference = Compose([Resize(24, InterpolationMode.BICUBIC), CenterCrop(24)])(square)
    original = encode(data, "x.JPEG", encoding_parameters("original", 24, 0))
    assert (original.payload, original.suffix) == (data, suffix)
    np.testing.assert_array_equal(np.asarray(load_image(original.payload)), square)
    pixels = encode(data, "x.JPEG", encoding_parameters("pixels", 24, 0)).payload
    np.testing.assert_array_equal(
        np.load(io.BytesIO(pixels)), np.asarray(reference).transpose(2, 0, 1)
    )
    jpeg = encode(data, "x.JPEG", encoding_parameters("jpeg", 24, 0)).payload
    assert jpeg == to_bytes(reference, "JPEG", quality=95, subsampling=0)


def test_png_named_jpeg() -> None:
    """ImageNet's n02105855_2933.JPEG."""
    check_every_encoding(to_bytes(random_image(50, 41), "PNG"), "png")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_and_cmyk_jpegs(mode: str, progressive: bool) -> None:
    data = to_bytes(random_image(50, 41, mode), "JPEG", progressive=progressive)
    assert Image.open(io.BytesIO(data)).mode == mode
    check_every_encoding(data, "jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exif_that_does_not_parse() -> None:
    """A block whose directory points outside of it."""
    exif = (
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\xff\xff\xff\xff\x7f\xff\xff\xff" * 3
    )
    data = to_bytes(random_image(50, 41), "JPEG", exif=exif)
    assert exif in data
    check_every_encoding(data, "jpg")


def test_16_bit_png() -> None:
    grey = np.random.default_rng(0).integers(0, 2**16, (41, 50), dtype=np.uint16)
    data = to_bytes(Image.fromarray(grey), "PNG")
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    check_every_encoding(data, "png")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    "transparency", [3, bytes(range(0, 200, 2))], ids=["one colour", "a level for each colour"]
)
def test_palette_png_with_transparency(transparency: int | bytes) -> None:
    palette = random_image(50, 41).quantize(100)
    data = to_bytes(palette, "PNG", transparency=transparency)
    opened = Image.open(io.BytesIO(data))
    assert (opened.mode, "transparency" in opened.info) == ("P", True)
    check_every_encoding(data, "png")


def test_jpeg_with_more_pictures_behind_it() -> None:
    stream = io.BytesIO()
    first, second = random_image(50, 41), random_image(30, 30)
    first.save(stream, "MPO", save_all=True, append_images=[second])
    check_every_encoding(stream.getvalue(), "jpg")
    assert (
        encode(stream.getvalue(), "x", encoding_parameters("original", 0, 0)).header.format == "MPO"
    )


# --- what cannot be decoded is refused ----------------------------------------------------------


def decodes(data: bytes) -> bool:
    """Whether Pillow decodes all of a file at full size."""
    try:
        load_image(data)
    except ValueError:
        return False
    return True


def is_accepted(data: bytes) -> bool:
    try:
        encode(data, "x", encoding_parameters("original", 0, 0))
    except ValueError:
        return False
    return True


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    mode = draw(st.sampled_from(["RGB", "L", "CMYK"]))
    image = random_image(draw(st.integers(8, 90)), draw(st.integers(8, 90)), mode)
    options = {
        "quality": draw(st.sampled_from([30, 75, 95])),
        "progressive": draw(st.booleans()),
        "restart_marker_blocks": draw(st.sampled_from([0, 0, 0, 2])),
    }
    return to_bytes(image, "JPEG", **options)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return a JPEG that was cut, overwritten, or lost or gained some bytes in the middle."""
    data = draw(jpegs())
    place = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["cut", "cut and ended", "changed", "shorter", "longer"])):
        case "cut":
            return data[:place]
        case "cut and ended":
            return data[:place] + b"\xff\xd9"
        case "changed":
            # half of the changes where they hurt, in the segments
            place = place % 700 if draw(st.booleans()) else place
            return data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        case "shorter":
            return data[:place] + data[place + draw(st.integers(1, 200)) :]
        case _:
            inserted = b"\xff" + draw(st.binary(min_size=1, max_size=20))
            return data[:place] + inserted + data[place:]


@settings(max_examples=60)
@given(jpegs())
def test_whole_jpegs_are_known_without_their_data(data: bytes) -> None:
    assert is_accepted(data)
    skeleton = jpeg_skeleton(data)
    if b"\xff\xdd\x00\x04" in data:  # a restart interval
        assert skeleton is None
    else:
        assert skeleton is not None
        assert len(skeleton) < len(data)
        assert jpeg_skeleton(skeleton) == skeleton


@pytest.mark.slow
@settings(max_examples=400)
@given(damaged())
def test_a_jpeg_is_accepted_exactly_when_all_of_it_decodes(data: bytes) -> None:
    assert is_accepted(data) == decodes(data)


@settings(max_examples=100)
@given(jpegs(), st.data())
def test_every_truncated_jpeg_is_refused(data: bytes, choices: st.DataObject) -> None:
    """Wherever the cut, unless the pixels are whole and only the end marker is gone."""
    cut = data[: choices.draw(st.integers(0, len(data) - 1))]
    if is_accepted(cut):
        assert decodes(cut)
        np.testing.assert_array_equal(load_image(cut), load_image(data))


@pytest.mark.parametrize("kind", ["original", "jpeg", "pixels"])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_unreadable_images_are_named(kind: Kind, format_name: str) -> None:
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
    for kind in get_args(Kind):
        with pytest.raises(ValueError, match=r"^x is 4 x 50 pixels"):
            encode(data, "x", encoding_parameters(kind, 32, 2))


def test_npy_is_plain() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    np.testing.assert_array_equal(np.load(io.BytesIO(to_npy(array)), allow_pickle=False), array)
