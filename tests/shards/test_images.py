"""Encodings: pixels equal CLIP's own transform bit for bit, original bytes stay untouched."""

import contextlib
import io
import os
import re
import tracemalloc
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import open_clip
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rft.packing.encode import encode, expected_bytes, identify, jpeg_skeleton, to_jpeg
from rft.shards.images import (
    MOST_ELONGATED,
    Kind,
    Treatment,
    clip_pixels,
    clip_square,
    encoding_parameters,
    load_image,
    photo_of,
    to_npy,
)
from tests.pictures import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, chunk, empty_png, png_row


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
@example(1500, 15, 32, "L")
@example(15, 1500, 33, "CMYK")
def test_pixels_equal_torchvision(width: int, height: int, size: int, mode: str) -> None:
    """Over odd sizes, specks and panoramas, from the bytes of a file, like an image folder."""
    assume(max(width, height) <= MOST_ELONGATED * min(width, height))
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


@pytest.mark.parametrize("black", [False, True])
def test_cmyk_converted_before_the_crop_is_not_open_clips(black: bool) -> None:
    """As in docs/paper.md: black ink multiplies the others, and the resize mixes."""
    inks = [random_image(500, 333 + n, "L").crop((0, 0, 500, 333)) for n in range(4)]
    if not black:
        inks[3].paste(0, (0, 0, 500, 333))
    data = to_bytes(Image.merge("CMYK", inks), "JPEG")
    transform = open_clip.image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    assert callable(transform)
    after = (np.asarray(transform(Image.open(io.BytesIO(data)))) * 255).round().astype(int)
    difference = abs(clip_pixels(load_image(data), 224) - after).max()
    assert difference > 1 if black else difference == 1


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
    assert encoded.payload.endswith(expected.tobytes())  # readers may find the end of the payload


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
    """No metadata of the source, its full colour resolution, nearly its pixels."""
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
    original = {"kind": "original", "crop_border": 2}
    assert encoding_parameters("original", 224, 2) == original
    photos = {"orientation": "exif", "alpha": "white"}
    assert encoding_parameters("original", 224, 2, photos=True) == {**original, "photos": photos}
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
    """Each encoding stores Pillow's decoding of the file, and `original` its true type."""
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


def test_16_bit_grey_is_its_high_byte() -> None:
    """A full ramp has 256 levels, each 256 times; torchvision's conversion leaves 2."""
    ramp_HW = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    expected_HW = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256, axis=1)
    data = to_bytes(Image.fromarray(ramp_HW), "PNG")
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    for photos in (False, True):
        shown_HWC = np.asarray(load_image(data, "x", Treatment(photo=photos)))
        np.testing.assert_array_equal(shown_HWC, np.dstack([expected_HW] * 3))
        assert shown_HWC.mean() == 127.5
        pixels = encode(data, "x", encoding_parameters("pixels", 256, 0, photos=photos)).payload
        np.testing.assert_array_equal(np.load(io.BytesIO(pixels)), np.stack([expected_HW] * 3))
        original = encode(data, "x", encoding_parameters("original", 0, 0, photos=photos))
        assert original.header.mode.startswith("I")


SAMPLES = [0, 0x00FF, 0x0100, 0x80FF, 0xFEFF, 0xFFFF]
HIGH_BYTES = [0, 0, 1, 0x80, 0xFE, 0xFF]
PLTE = chunk(b"PLTE", bytes([9, 9, 9, 255, 0, 0]))
# file, and the pixels by hand: a level of n bits is spread over 0 to 255, one of 16 loses a byte
DEPTHS = {
    "grey, 1 bit": (png_row([0, 1, 1], 1, GREY), [[0] * 3, [255] * 3, [255] * 3]),
    "grey, 2 bits": (png_row([0, 1, 2, 3], 2, GREY), [[n] * 3 for n in (0, 85, 170, 255)]),
    "grey, 4 bits": (png_row([0, 1, 15], 4, GREY), [[n] * 3 for n in (0, 17, 255)]),
    "palette, 1 bit": (png_row([1, 0], 1, PALETTE, PLTE), [[255, 0, 0], [9, 9, 9]]),
    "palette, 4 bits": (png_row([1, 0, 1], 4, PALETTE, PLTE), [[255, 0, 0], [9] * 3, [255, 0, 0]]),
    "grey, 16 bits": (png_row(SAMPLES, 16, GREY), [[n] * 3 for n in HIGH_BYTES]),
    "colour, 16 bits": (png_row(SAMPLES, 16, RGB), [HIGH_BYTES[:3], HIGH_BYTES[3:]]),
    "grey and alpha, 16 bits": (
        png_row([0x80FF, 0xFFFF, 0x00FF, 0xFFFF], 16, GREY_ALPHA),
        [[0x80] * 3, [0] * 3],
    ),
    "colour and alpha, 16 bits": (
        png_row([*SAMPLES[:3], 0xFFFF, *SAMPLES[3:], 0xFFFF], 16, RGBA),
        [HIGH_BYTES[:3], HIGH_BYTES[3:]],
    ),
}


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("photo", [False, True])
def test_every_depth(name: str, photo: bool) -> None:
    data, expected = DEPTHS[name]
    assert np.asarray(load_image(data, "x", Treatment(photo=photo)))[0].tolist() == expected


@pytest.mark.parametrize("name", DEPTHS)
def test_an_opened_image_is_treated_as_its_file(name: str) -> None:
    data, expected = DEPTHS[name]
    assert np.asarray(photo_of(Image.open(io.BytesIO(data))))[0].tolist() == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_photo_is_turned_and_composed_as_its_file(kind: str, orientation: int) -> None:
    image = random_image(20, 30)
    if kind != "JPEG":
        image.putalpha(image.getchannel("R"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = to_bytes(image, kind, exif=exif)
    expected = np.asarray(load_image(data, "x", Treatment(photo=True)))
    opened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(photo_of(opened)), expected)
    # a copy has no format, but keeps its metadata
    np.testing.assert_array_equal(np.asarray(photo_of(opened.copy())), expected)


def test_an_opened_image_of_an_unknown_depth_is_refused_where_it_matters() -> None:
    data = png_row([0, 1, 2, 3], 2, GREY, chunk(b"tRNS", bytes([0, 3])))
    with pytest.raises(ValueError, match="one of its colours is transparent; pass the path"):
        photo_of(Image.open(io.BytesIO(data)), "a photo")
    with pytest.raises(ValueError, match="a photo cannot be read: unsupported pixel mode HSV"):
        photo_of(Image.new("HSV", (4, 4)), "a photo")
    with pytest.raises(ValueError, match="a photo is 5000 x 2 pixels"):
        photo_of(Image.new("RGB", (5000, 2)), "a photo")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    ("format_name", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_eight_bits_are_those_of_torchvision(tmp_path: Path, format_name: str, mode: str) -> None:
    """Benchmarks stay as their loader reads them: not rotated, hidden colours visible."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (37, 50, 4), dtype=np.uint8))
    image = image.convert("RGB").convert(mode) if mode in ("CMYK", "P") else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    path = tmp_path / "x"
    path.write_bytes(to_bytes(image, format_name, exif=exif, **options))
    expected = np.asarray(pil_loader(path))
    encoded = encode(path.read_bytes(), "x", encoding_parameters("original", 0, 0))
    assert (encoded.header.width, encoded.header.height) == (50, 37)
    np.testing.assert_array_equal(np.asarray(load_image(encoded.payload)), expected)
    pixels = encode(path.read_bytes(), "x", encoding_parameters("pixels", 16, 0)).payload
    np.testing.assert_array_equal(
        np.load(io.BytesIO(pixels)), clip_pixels(Image.fromarray(expected), 16)
    )


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
    """Whether Pillow decodes the complete file at full size."""
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
    """Return a JPEG that was truncated, overwritten, or lost or gained some bytes in the middle."""
    data = draw(jpegs())
    place = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["cut", "cut and ended", "changed", "shorter", "longer"])):
        case "cut":
            return data[:place]
        case "cut and ended":
            return data[:place] + b"\xff\xd9"
        case "changed":
            # half of the changes in the segments, where they do most damage
            place = place % 700 if draw(st.booleans()) else place
            return data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        case "shorter":
            return data[:place] + data[place + draw(st.integers(1, 200)) :]
        case _:
            inserted = b"\xff" + draw(st.binary(min_size=1, max_size=20))
            return data[:place] + inserted + data[place:]


@pytest.mark.slow
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
    """At any cut, unless the pixels are complete and only the end marker is missing."""
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
    with pytest.raises(ValueError, match="not a readable JPEG, PNG or WebP"):
        load_image(to_bytes(random_image(20, 20), "BMP"))


def test_a_side_that_is_all_border_is_named() -> None:
    data = to_bytes(random_image(4, 50), "PNG")
    for kind in get_args(Kind):
        with pytest.raises(ValueError, match=r"^x is 4 x 50 pixels"):
            encode(data, "x", encoding_parameters(kind, 32, 2))


def changed_precision(data: bytes, bits: int) -> bytes:
    """Return a JPEG whose frame header announces another number of bits."""
    place = data.index(b"\xff\xc0") + 4
    return data[:place] + bytes([bits]) + data[place + 1 :]


def with_chunk(name: bytes, content: bytes, *, behind: bool) -> bytes:
    block = chunk(name, content)
    return png_row([1, 2], 8, GREY, b"" if behind else block, after=block if behind else b"")


HOSTILE = {
    "JPEG of 12 bits": (changed_precision(to_bytes(random_image(20, 20), "JPEG"), 12), "12-bit"),
    "profile that ends early": (with_chunk(b"iCCP", b"abc\0", behind=True), ""),
    "profile of an unknown kind": (with_chunk(b"iCCP", b"abc\0\x09", behind=False), ""),
    "sizes that end early": (with_chunk(b"pHYs", b"a", behind=True), ""),
    "text that unpacks to 10 MB": (
        with_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)), behind=False),
        "",
    ),
    "111 megapixels": (empty_png(11_100, 10_000), "is 11100 x 10000 pixels, 111.0 million; --max"),
    "400 megapixels": (empty_png(20_000, 20_000), "400.0 million; --max-pixels allows 110 million"),
    "6000 x 1": (empty_png(6000, 1), r"is 6000 x 1 pixels; .* at most 100 times"),
    "1 x 101": (empty_png(1, 101), r"is 1 x 101 pixels; .* at most 100 times"),
    "70,000 x 1000": (empty_png(70_000, 1000), "at most 65535"),
}


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["original", "jpeg", "pixels"])
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("photos", [False, True])
def test_hostile_images_are_named(name: str, kind: Kind, photos: bool) -> None:
    """By the packer in every encoding, by readers, and by the indexer of third-party shards."""
    data, message = HOSTILE[name]
    with pytest.raises(ValueError, match=rf"^n01/x\.png .*{message}"):
        encode(data, "n01/x.png", encoding_parameters(kind, 32, 0, photos=photos))
    with pytest.raises(ValueError, match=rf"^n01/x\.png .*{message}"):
        load_image(data, "n01/x.png", Treatment(photo=photos))
    if "early" not in name:  # found only in decoding
        with pytest.raises(ValueError, match=rf"^n01/x\.png .*{message}"):
            identify(data, "n01/x.png", 0)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_photos_of_many_megapixels_are_no_attack() -> None:
    """Phones make 108 megapixels; only the header is read here."""
    header, _ = identify(empty_png(12_000, 9_000), "photo", 0)
    assert (header.width, header.height) == (12_000, 9_000)


def test_elongated_inside_the_border() -> None:
    data = to_bytes(random_image(300, 6), "PNG")
    for kind in get_args(Kind):
        encode(data, "x", encoding_parameters(kind, 32, 0))
        with pytest.raises(ValueError, match=r"^x is 300 x 6 pixels; .* at most 100 times"):
            encode(data, "x", encoding_parameters(kind, 32, 2))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([8, 33]))
@example(6000, 1, 224)
@example(1, 6000, 224)
def test_a_resize_never_takes_many_squares(width: int, height: int, size: int) -> None:
    """The area passed to `Image.resize` is bounded, for any image."""
    asked = []

    class Spy(Image.Image):
        def resize(self, size, *arguments):
            asked.append(size[0] * size[1])
            return Image.new("L", size)

    image = Spy()
    image._size = (width, height)
    if max(width, height) > MOST_ELONGATED * min(width, height):
        with pytest.raises(ValueError, match="at most 100 times"):
            clip_square(image, size)
        assert asked == []
    elif (width, height) != (size, size):
        clip_square(image, size)
        assert max(asked, default=0) <= MOST_ELONGATED * size**2


@pytest.mark.parametrize("kind", ["original", "jpeg", "pixels"])
def test_too_little_memory_is_not_the_image(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run with the image's name, and never counts for --max-bad."""
    data = to_bytes(random_image(20, 20), "PNG")

    def load(image):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(OSError, match=r"^n01/x\.png: not enough memory"):
        encode(data, "n01/x.png", encoding_parameters(kind, 32, 0))


def test_npy_is_plain() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    np.testing.assert_array_equal(np.load(io.BytesIO(to_npy(array)), allow_pickle=False), array)


# --- what small files cost ----------------------------------------------------------------------


def test_more_pixels_may_be_allowed_and_fewer() -> None:
    data = to_bytes(random_image(100, 80), "PNG")
    for kind in get_args(Kind):
        encoding = encoding_parameters(kind, 32, 0)
        encode(data, "x", encoding, max_pixels=0.008)
        with pytest.raises(ValueError, match=r"^x is 100 x 80 pixels, 0\.0 million; --max-pixels"):
            encode(data, "x", encoding, max_pixels=0.0079)
    for read in (load_image, lambda *rest, **option: identify(*rest[:2], 0, **option)):
        read(data, "x", max_pixels=0.008)
        with pytest.raises(ValueError, match=r"--max-pixels allows 0\.0079 million"):
            read(data, "x", max_pixels=0.0079)
    # Pillow has its own limit, twice the size above which it warns
    header, _ = identify(empty_png(20_000, 20_000), "x", 0, max_pixels=400)
    assert (header.width, header.height) == (20_000, 20_000)


def test_a_file_has_no_more_bytes_than_its_pixels_may_need() -> None:
    data = to_bytes(random_image(10, 10), "PNG").ljust(4000, b"\0")
    load_image(data, "x", max_pixels=0.001)
    with pytest.raises(ValueError, match=r"^x has 4,001 bytes, more than 4 for each of the 0\.001"):
        load_image(data + b"\0", "x", max_pixels=0.001)


def with_scans(count: int, behind: bytes = b"") -> bytes:
    """A progressive JPEG of a megapixel whose last scan is repeated."""
    data = to_bytes(Image.new("L", (1000, 1000), 99), "JPEG", progressive=True)
    place = data.rindex(b"\xff\xda")
    scan = data[place:-2]
    return data[:-2] + count * scan + data[-2:] + behind


@pytest.mark.slow
def test_scans_that_cost_more_than_their_bytes() -> None:
    """Each scan passes over all pixels: 56 bytes take 0.3 s of an image of 110 million."""
    for count in (0, 100):  # and markers in the data after the image, such as a video
        load_image(with_scans(count, b"\xff\xda" * 5000), "x", max_pixels=10)
    for kind in get_args(Kind):
        with pytest.raises(ValueError, match=r"^x has more than 200 scans, too many for its"):
            encode(with_scans(200), "x", encoding_parameters(kind, 32, 0), max_pixels=10)


SMALL = to_bytes(Image.new("L", (32, 32), 99), "JPEG")
EXIF_SEGMENT = b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)
PHOTOSHOP_SEGMENT = b"\xff\xed\xff\xffPhotoshop 3.0\0" + 5459 * (b"8BIM" + bytes(8)) + bytes(11)
EMPTY_CHUNK = bytes(4) + b"teXt" + zlib.crc32(b"teXt").to_bytes(4)
COSTLY = {
    "segments": (b"\xff\xfe\0\2", 9_980, 10_020, "10,000 segments"),
    "EXIF": (EXIF_SEGMENT, 256, 257, "16,777,216 bytes of EXIF and Photoshop's blocks"),
    "Photoshop": (PHOTOSHOP_SEGMENT, 256, 257, "16,777,216 bytes of EXIF and Photoshop's blocks"),
    "fill": (b"\xff", 65_000, 65_600, "65,536 bytes between its segments"),
    "zeros": (b"\xff\0", 32_000, 32_800, "65,536 bytes between its segments"),
    "restarts": (b"\xff\xd0", 32_000, 32_800, "65,536 bytes between its segments"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COSTLY)
def test_what_stands_before_a_jpegs_pixels_costs_no_more_than_its_bytes(kind: str) -> None:
    part, allowed, refused, says = COSTLY[kind]
    load_image(SMALL[:2] + allowed * part + SMALL[2:], "x", Treatment(photo=True))
    for count in (refused, 100_000_000 // len(part)):
        for end in (SMALL[2:], b""):  # a file may have nothing else
            with pytest.raises(ValueError, match=f"^x has more than {says}; open it"):
                load_image(SMALL[:2] + count * part + end, "x", Treatment(photo=True))


def test_a_segment_that_reaches_beyond_the_file_makes_up_for_nothing() -> None:
    last = b"\xff\xfe\xff\xff"  # a comment that is not there
    with pytest.raises(ValueError, match=r"^x has more than 65,536 bytes between its segments"):
        load_image(SMALL[:2] + 100_000 * b"\xff" + last, "x")


@pytest.mark.slow
def test_so_do_the_chunks_of_a_png() -> None:
    data = to_bytes(random_image(10, 10), "PNG")
    load_image(data[:33] + 250_000 * EMPTY_CHUNK + data[33:] + bytes(10**8), "x")
    for count in (300_001, 8_000_000):
        with pytest.raises(ValueError, match=r"^x has more than 300,000 chunks; open it"):
            load_image(data[:33] + count * EMPTY_CHUNK + data[33:], "x")


def test_a_png_has_one_colour_profile() -> None:
    """A kilobyte of it unpacks to a megabyte, each time."""
    data = to_bytes(random_image(10, 10), "PNG", icc_profile=b"profile")
    load_image(data, "x")
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20)))
    with pytest.raises(ValueError, match=r"^x has more than 10 colour profiles; open it"):
        load_image(data[:33] + 2000 * profile + data[33:], "x")


@pytest.mark.slow
def test_looking_for_the_end_of_scans_takes_no_more_memory_than_the_file() -> None:
    data = with_scans(0) + bytes((0xFF, 0)) * 50_000_000
    tracemalloc.start()
    assert jpeg_skeleton(data) is None
    assert tracemalloc.get_traced_memory()[1] < 1.1 * len(data)
    tracemalloc.stop()


def peak_of(data: bytes, treatment: Treatment) -> int:
    """Bytes of memory that decoding takes at its peak, in a separate process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # the peak of a fork starts with its parent's memory
        Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text
        start = int(re.search(r"VmRSS:\s+(\d+)", status())[1])
        clip_square(load_image(data, "x", treatment), 224)
        peak = int(re.search(r"VmHWM:\s+(\d+)", status())[1])
        os.write(writer, str((peak - start) * 1024).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return int(text)


def oriented(image: Image.Image, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return to_bytes(image, kind, exif=exif, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("PNG", "RGBA", {"compress_level": 1}),
        ("WEBP", "RGBA", {"lossless": True, "quality": 0, "method": 0}),
    ],
)
def test_the_largest_image_fits_into_two_gigabytes(kind: str, mode: str, options: dict) -> None:
    """Extrapolated from an image with a tenth of its pixels."""
    color = (9, 8, 7, 99)[: len(mode)]
    data = oriented(Image.new(mode, (4000, 2750), color), kind, **options)
    assert 10 * peak_of(data, Treatment(photo=True)) < 1.9e9


PICTURES = [
    oriented(random_image(24, 16), "JPEG", progressive=True),
    oriented(random_image(24, 16, "RGBA"), "PNG"),
    oriented(random_image(24, 16, "RGBA"), "WEBP"),
    to_bytes(random_image(24, 16, "P"), "PNG", transparency=3),
]


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.sampled_from(PICTURES),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=6),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_any_bytes_are_an_image_or_refused_by_name(data, changes, end, cut, mend) -> None:
    changed = bytearray(data)
    for place, value in changes:
        place %= len(changed)
        changed[place : place + len(value)] = value
    if cut:
        del changed[end % len(changed) :]
    content = right_checksums(bytes(changed)) if mend else bytes(changed)
    for photo in (False, True):
        try:
            load_image(content, "n01/x", Treatment(photo=photo), max_pixels=1)
        except ValueError as error:
            assert re.match(r"n01/x .", str(error)), error  # noqa: PT017 - it need not be raised
    with contextlib.suppress(ValueError):
        encode(content, "n01/x", encoding_parameters("original", 0, 0, photos=True), max_pixels=1)


def right_checksums(data: bytes) -> bytes:
    """A PNG whose chunk checksums match their content: damage reaches the parsers."""
    position, out = 8, data[:8]
    while 8 <= position <= len(data) - 12:
        length = int.from_bytes(data[position : position + 4])
        body = data[position + 4 : position + 8 + length]
        out += data[position : position + 4] + body + zlib.crc32(body).to_bytes(4)
        position += 12 + length
    return out
