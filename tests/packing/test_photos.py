"""The user's own photos: rotated upright and composed on white, by the packer and every reader."""

import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from rft.loading.dataset import PackedDataset
from rft.packing.encode import encode, to_jpeg
from rft.packing.own_folder import read_folder
from rft.packing.pack import Options, pack_source
from rft.packing.verify import verify
from rft.shards.images import (
    PHOTOS,
    Encoding,
    Kind,
    Treated,
    clip_pixels,
    encoding_parameters,
    load_image,
    payload_of,
)
from rft.shards.manifest import Manifest
from rft.storage import documents
from tests.pictures import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, chunk, png_row
from tests.reference.pixels import STORED_SIDES, stored_as

ORIGINAL = encoding_parameters("original", 0, 0, photos=True)
TAG = 0x0112
WHITE = [255, 255, 255]


def scene() -> np.ndarray:
    """White above and black below, with a red corner at the top left, (48, 32, 3)."""
    seen_HWC = np.zeros((48, 32, 3), dtype=np.uint8)
    seen_HWC[:24] = 255
    seen_HWC[:16, :16] = (255, 0, 0)
    return seen_HWC


def to_bytes(pixels: np.ndarray, format_name: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format_name, **options)
    return stream.getvalue()


def with_exif(orientation: int, pixels: np.ndarray, format_name: str) -> bytes:
    exif = Image.Exif()
    exif[TAG] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}
    return to_bytes(pixels, format_name, exif=exif, **options[format_name])


def show(data: bytes, encoding: dict) -> tuple[np.ndarray, Treated]:
    """A file packed as `original` and read back, (H, W, 3)."""
    encoded = encode(data, "x", encoding)
    image = load_image(encoded.payload, "x", payload_of(encoding).treatment)
    assert image.size == (encoded.header.width, encoded.header.height)
    return np.asarray(image), encoded.treated


# --- orientation --------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_SIDES)
def test_a_photo_is_turned_upright(orientation: int, format_name: str) -> None:
    """In every encoding; a set without the key shows it as stored."""
    seen_HWC, stored_HWC = scene(), stored_as(scene(), orientation)
    data = with_exif(orientation, stored_HWC, format_name)
    shown_HWC, treated = show(data, ORIGINAL)
    assert treated == Treated(orientation=orientation)
    assert shown_HWC.shape == seen_HWC.shape
    error = np.abs(shown_HWC.astype(int) - seen_HWC).max()
    assert error <= (2 if format_name == "JPEG" else 0)
    for kind in ("pixels", "jpeg"):
        encoding = encoding_parameters(kind, 24, 2, photos=True)
        encoded = encode(data, "x", encoding)
        assert (encoded.header.width, encoded.header.height) == (32, 48)
        assert encoded.treated == treated
        upright = Image.fromarray(shown_HWC)
        square_CHW = clip_pixels(upright, 24, border=2)
        if kind == "pixels":
            np.testing.assert_array_equal(np.load(io.BytesIO(encoded.payload)), square_CHW)
        else:
            square = Image.fromarray(square_CHW.transpose(1, 2, 0))
            assert encoded.payload == to_jpeg(square, 95)
            # a payload that is already upright is not rotated again
            assert not payload_of(encoding).treatment.photo
    stored, untreated = show(data, encoding_parameters("original", 0, 0))
    assert np.abs(stored.astype(int) - stored_HWC).max() <= 2
    assert untreated == Treated()


def exif_block(kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block with one entry, the orientation."""
    return (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI", TAG, kind, count) + value + b"\0" * 4
    )


UNREADABLE = {
    "0": exif_block(3, 1, b"\0\0\0\0"),
    "9": exif_block(3, 1, b"\0\x09\0\0"),
    "text": exif_block(2, 2, b"6\0\0\0"),
    "bytes": exif_block(7, 4, b"\0\0\0\x06"),
    "elsewhere": exif_block(3, 9, b"\xff\xff\xff\xff"),
    "cut off": exif_block(3, 1, b"\0\x06\0\0")[:20],
    "no directory": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "no TIFF": b"Exif\0\0something else",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_an_unreadable_orientation_changes_nothing(exif: bytes, format_name: str) -> None:
    options = {"lossless": True} if format_name == "WEBP" else {}
    data = to_bytes(scene(), format_name, exif=exif, **options)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    shown, treated = show(data, ORIGINAL)
    np.testing.assert_array_equal(shown, stored)
    assert treated == Treated()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_tags_that_are_damaged_do_not_matter() -> None:
    """Pillow's `exif_transpose` rewrites them, and fails."""
    entries = [(TAG, 3, 1, b"\0\x03\0\0"), (0x011A, 5, 1, b"\xff\xff\xff\xff")]
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries))
    exif += b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries) + b"\0" * 4
    data = to_bytes(stored_as(scene(), 3), "PNG", exif=exif)
    np.testing.assert_array_equal(show(data, ORIGINAL)[0], scene())


def test_orientation_behind_the_pixels_of_a_png() -> None:
    block = chunk(b"eXIf", exif_block(3, 1, b"\0\x02\0\0")[6:])
    shown, treated = show(png_row([0, 128], 8, GREY, after=block), ORIGINAL)
    assert shown[0, :, 0].tolist() == [128, 0]
    assert treated == Treated(orientation=2)


# --- transparency -------------------------------------------------------------------------------

COLOURS = chunk(b"PLTE", bytes([200, 0, 0, 0, 200, 0, 0, 0, 200]))


def key(*samples: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))


# file, and its pixels on white. A level c of opacity a / 255 is (a c + (255 - a) 255) / 255: with
# c = 100 and a = 51 it is (5,100 + 52,020) / 255 = 224.
ON_WHITE = {
    "RGBA": (
        png_row([9, 8, 7, 0, 9, 8, 7, 255, 100, 0, 255, 51], 8, RGBA),
        [WHITE, [9, 8, 7], [224, 204, 255]],
    ),
    "RGBA, 16 bits": (
        png_row([0x09FF, 1, 2, 0, 0x09FF, 0x0800, 0xFF00, 0xFFFF], 16, RGBA),
        [WHITE, [9, 8, 255]],
    ),
    "grey and alpha": (png_row([9, 0, 9, 255, 100, 51], 8, GREY_ALPHA), [255, 9, 224]),
    "grey and alpha, 16 bits": (
        png_row([0x0900, 0, 0x09FF, 0xFFFF, 0x6400, 0x3300], 16, GREY_ALPHA),
        [255, 9, 224],
    ),
    "palette, one transparent": (
        png_row([0, 1, 2], 8, PALETTE, COLOURS, chunk(b"tRNS", b"\xff\x00")),
        [[200, 0, 0], WHITE, [0, 0, 200]],
    ),
    "palette of 2 bits, opacities": (
        png_row([0, 1, 2], 2, PALETTE, COLOURS, chunk(b"tRNS", b"\x00\x33\xff")),
        [WHITE, [204, 244, 204], [0, 0, 200]],
    ),
    "RGB, one transparent": (
        png_row([1, 2, 3, 3, 2, 1, 1, 2, 4], 8, RGB, key(1, 2, 3)),
        [WHITE, [3, 2, 1], [1, 2, 4]],
    ),
    "grey, one transparent": (png_row([1, 2, 3], 8, GREY, key(2)), [1, 255, 3]),
    "grey of 16 bits, one transparent": (
        png_row([0x0201, 0x0202, 0x0300], 16, GREY, key(0x0202)),
        [2, 255, 3],
    ),
    "grey of 4 bits, one transparent": (png_row([1, 2, 3], 4, GREY, key(2)), [17, 255, 51]),
    "grey of 2 bits, one transparent": (png_row([0, 1, 2], 2, GREY, key(2)), [0, 85, 255]),
    "bits, black transparent": (png_row([0, 1], 1, GREY, key(0)), [255, 255]),
}


@pytest.mark.parametrize("name", ON_WHITE)
def test_transparent_photos_lie_on_white(name: str) -> None:
    data, expected = ON_WHITE[name]
    shown, treated = show(data, ORIGINAL)
    pixels = [level if isinstance(level, list) else [level] * 3 for level in expected]
    assert shown[0].tolist() == pixels
    assert treated == Treated(composed=True)
    small = encode(data, "x", encoding_parameters("pixels", 1, 0, photos=True))
    assert small.treated == treated


def test_bits_with_white_transparent() -> None:
    """Nothing of it is visible: the colour is white."""
    shown, treated = show(png_row([0, 1], 1, GREY, key(1)), ORIGINAL)
    assert shown[0].tolist() == [[0, 0, 0], WHITE]
    assert treated.composed


def test_a_transparent_webp() -> None:
    rgba_HWC = np.zeros((20, 20, 4), dtype=np.uint8)
    rgba_HWC[:, :10] = (10, 20, 30, 255)
    data = to_bytes(rgba_HWC, "WEBP", lossless=True, exact=True)
    shown, treated = show(data, ORIGINAL)
    assert (shown[:, :10] == (10, 20, 30)).all()
    assert (shown[:, 10:] == 255).all()
    assert treated.composed
    as_stored, _ = show(data, encoding_parameters("original", 0, 0))
    assert (as_stored[:, 10:] == 0).all()


@pytest.mark.parametrize(
    "data",
    [
        png_row([9, 8, 7, 255], 8, RGBA),
        png_row([0, 1], 8, PALETTE, COLOURS, chunk(b"tRNS", b"\xff\xff\x00")),
        png_row([1, 2], 8, GREY, key(3)),
    ],
)
def test_what_is_opaque_is_not_counted(data: bytes) -> None:
    shown, treated = show(data, ORIGINAL)
    assert treated == Treated()
    np.testing.assert_array_equal(shown, show(data, encoding_parameters("original", 0, 0))[0])


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_transparent_colour_of_16_bits_is_refused(kind: Kind) -> None:
    """Pillow keeps 8 bits of the pixels: the colour cannot be distinguished from its neighbours."""
    data = png_row([1, 2, 3, 1, 2, 4], 16, RGB, key(1, 2, 3))
    with pytest.raises(ValueError, match=r"^x cannot be decoded: its transparent colour has 16"):
        encode(data, "x", encoding_parameters(kind, 1, 0, photos=True))


# --- a complete folder --------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine photos of two classes: two of them are rotated, one is transparent."""
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for n in range(3):
            data = with_exif(1, np.full((20 + n, 30, 3), 40 * n, dtype=np.uint8), "PNG")
            (root / name / f"{n}.png").write_bytes(data)
    for tag, path in ((6, "cat/turned.jpg"), (8, "dog/turned.webp")):
        format_name = "JPEG" if path.endswith("jpg") else "WEBP"
        (root / path).write_bytes(with_exif(tag, stored_as(scene(), tag), format_name))
    clear = np.zeros((24, 24, 4), dtype=np.uint8)
    (root / "dog" / "clear.png").write_bytes(to_bytes(clear, "PNG"))
    return root


def pack_photos(root: Path, out: Path, kind: Kind, **changes) -> PackedDataset:
    (source,), labels, *_ = read_folder(root, None, 0.0, 0)
    options = Options(encoding=kind, size=16, shard_mb=0.001, workers=1)
    assert pack_source(replace(source, **changes), str(out), labels, options)
    return PackedDataset(str(out / "train"))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_folder_of_photos(
    photos: Path, tmp_path: Path, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pack_photos(photos, tmp_path / "out", kind)
    assert "train: photos turned upright (EXIF orientation): 2\n" in (
        out := capsys.readouterr().out
    )
    assert "train: transparent photos composed on white: 1\n" in out
    assert packed.manifest.encoding["photos"] == PHOTOS
    samples = {packed.key(n): n for n in range(len(packed))}
    upright_CHW = clip_pixels(Image.fromarray(scene()), 16).astype(int)
    for name in ("cat_turned", "dog_turned"):
        n = samples[name]
        assert (packed.index.width[n], packed.index.height[n]) == (32, 48)
        assert np.abs(packed.image(n, 16).astype(int) - upright_CHW).mean() < 6
    assert (packed.image(samples["dog_clear"], 16) == 255).all()
    assert verify(str(tmp_path / "out" / "train"), deep=True, workers=1).problems == []


def test_a_set_that_was_packed_without_the_key(photos: Path, tmp_path: Path) -> None:
    """It is read as before, and is a different plan."""
    packed = pack_photos(photos, tmp_path / "out", "original", photos=False)
    assert packed.manifest.encoding == {"kind": "original", "crop_border": 0}
    samples = {packed.key(n): n for n in range(len(packed))}
    turned = samples["cat_turned"]
    assert (packed.index.width[turned], packed.index.height[turned]) == (48, 32)
    assert (packed.image(samples["dog_clear"], 16) == 0).all()
    with pytest.raises(ValueError, match=r"holds a different plan \(encoding\.photos: "):
        pack_photos(photos, tmp_path / "out", "original")


# --- encodings that this version does not know --------------------------------------------------

CHANGES: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "no dictionary": ("pixels", lambda encoding: None, "it is None; it must be an object"),
    "kind": (
        "pixels",
        lambda encoding: {**encoding, "kind": "avif"},
        "kind is 'avif'; it must be one of",
    ),
    "unhashable": (
        "pixels",
        lambda encoding: {**encoding, "kind": []},
        r"kind is .*; it must be one of",
    ),
    "key": ("jpeg", lambda encoding: {**encoding, "gamma": 2}, "gamma is an unknown field"),
    "key of another kind": (
        "pixels",
        lambda encoding: {**encoding, "quality": 95},
        "quality is an unknown field",
    ),
    "resample": ("pixels", lambda encoding: {**encoding, "resample": "box"}, "resample is 'box'"),
    "colours": (
        "jpeg",
        lambda encoding: {**encoding, "subsampling": "4:2:0"},
        "subsampling is '4:2:0'",
    ),
    "photos": (
        "original",
        lambda encoding: {**encoding, "photos": True},
        "photos is True; it must be an object",
    ),
    "alpha": (
        "original",
        lambda encoding: {**encoding, "photos": {**PHOTOS, "alpha": "black"}},
        "photos.alpha is 'black'",
    ),
    "border": ("original", lambda encoding: {**encoding, "crop_border": -1}, "crop_border is -1"),
    "large": (
        "pixels",
        lambda encoding: {**encoding, "size": 32768},
        "size is 32768; it must be less than or equal to 2048",
    ),
    "size": ("pixels", lambda encoding: {**encoding, "size": "224"}, "size is '224'"),
    "library": ("pixels", lambda encoding: {**encoding, "library": None}, "library is None"),
    "gone": ("original", lambda encoding: {"kind": "original"}, "crop_border is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_unknown_encodings_are_refused(name: str) -> None:
    kind, change, message = CHANGES[name]
    for photos in (False, True):
        encoding = encoding_parameters(kind, 224, 2, photos=photos)
        assert documents.convert(encoding, Encoding, "a/manifest.json") == encoding
        with pytest.raises(ValueError, match=f"^a/manifest.json: .*{message}"):
            documents.convert(change(encoding), Encoding, "a/manifest.json")


def test_readers_refuse_an_unknown_encoding(photos: Path, tmp_path: Path) -> None:
    packed = pack_photos(photos, tmp_path / "out", "original")
    path = Path(packed.url) / "manifest.json"
    document = json.loads(path.read_text())
    document["encoding"]["photos"]["gamut"] = "sRGB"
    path.write_text(json.dumps(document))
    for read in (Manifest.load, PackedDataset):
        with pytest.raises(
            ValueError, match=r"photos\.gamut is an unknown field; a newer rft may read it"
        ):
            read(packed.url)
    (problem,) = verify(packed.url, deep=True, workers=1).problems
    assert "photos.gamut is an unknown field" in str(problem)
