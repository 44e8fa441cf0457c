"""Object masks: their geometry, their values, and their files."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rft.evaluate.object_masks import find_masks, read_mask
from rft.shards.images import clip_pixels, load_image
from rft.storage import files
from tests.evaluate.masks import blob, save_mask


@settings(max_examples=60)
@given(
    st.tuples(*[st.floats(2, 6)] * 2, *[st.floats(10, 14)] * 2),
    st.integers(20, 90),
    st.integers(20, 90),
    st.sampled_from([0, 2]),
)
def test_a_mask_stays_on_its_object(tmp_path_factory, place, width, height, border):
    """The image is its own mask; processed separately, both may differ only along the edge."""
    # the object's position in the crop of 16 pixels, mapped back to the image
    scale = (min(width, height) - 2 * border) / 16
    left, right = (round(width / 2 + (x - 8) * scale) for x in (place[0], place[2]))
    top, bottom = (round(height / 2 + (y - 8) * scale) for y in (place[1], place[3]))
    mask_HW = np.zeros((height, width), dtype=bool)
    mask_HW[top:bottom, left:right] = True
    path = save_mask(tmp_path_factory.getbasetemp() / "mask.png", mask_HW)
    cut = read_mask(path, (width, height), 16, border)
    image = load_image(path.read_bytes())
    seen_HW = clip_pixels(image, 16, border)[0] > 127
    edge_HW = np.zeros((16, 16), dtype=bool)
    padded = np.pad(cut.pixels_HW, 1, mode="edge")
    for down in range(3):
        for right in range(3):
            edge_HW |= padded[down : down + 16, right : right + 16] != cut.pixels_HW
    assert cut.pixels_HW.any()
    assert not ((seen_HW != cut.pixels_HW) & ~edge_HW).any()
    assert cut.sha256.hex() == files.sha256_file(path)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(5, 90), st.integers(5, 90), st.sampled_from([0, 2]))
def test_geometry_is_torchvisions(tmp_path_factory, seed, width, height, border):
    noise_HW = np.random.default_rng(seed).random((height, width)) < 0.5
    path = save_mask(tmp_path_factory.getbasetemp() / "noise.png", noise_HW)
    transform = Compose([Resize(16, InterpolationMode.NEAREST), CenterCrop(16)])
    inside = Image.open(path).crop((border, border, width - border, height - border))
    expected_HW = np.asarray(transform(inside)) > 0
    cut = read_mask(path, (width, height), 16, border)
    np.testing.assert_array_equal(cut.pixels_HW, expected_HW)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
@pytest.mark.parametrize("on", [1, 255])
def test_a_mask_may_have_any_one_value_on_the_object(tmp_path, mode, on):
    mask_HW = blob(np.random.default_rng(3), 16, 16)
    image = Image.fromarray(mask_HW.astype(np.uint16 if mode == "I;16" else np.uint8) * on)
    if mode == "P":
        image.putpalette([0, 0, 0] + [255, 0, 0] * 255)
    elif mode == "1":
        image = Image.fromarray(mask_HW)
    path = tmp_path / "mask.png"
    image.save(path)
    assert Image.open(path).mode == mode
    np.testing.assert_array_equal(read_mask(path, (16, 16), 16).pixels_HW, mask_HW)


def test_a_mask_of_the_crop_is_taken_as_it_is(tmp_path):
    mask_HW = blob(np.random.default_rng(4), 16, 16)
    path = save_mask(tmp_path / "mask.png", mask_HW)
    np.testing.assert_array_equal(read_mask(path, (500, 375), 16, 2).pixels_HW, mask_HW)


def test_masks_that_are_none(tmp_path):
    path = save_mask(tmp_path / "mask.png", np.ones((30, 20)))
    with pytest.raises(ValueError, match=r"mask.png is 20 x 30 pixels, its image 40 x 60; segment"):
        read_mask(path, (40, 60), 16)
    with pytest.raises(ValueError, match="its image 30 x 20; it is turned; segment the image as"):
        read_mask(path, (30, 20), 16)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    with pytest.raises(ValueError, match=r"mask.png is not binary; a mask has 0 and one other"):
        read_mask(path, (16, 16), 16)
    for palette in ([9, 0, 0, 0, 0, 0], [0, 0, 9, 9, 0, 0]):
        image = Image.fromarray(np.eye(16, dtype=np.uint8), mode="P")
        image.putpalette(palette)
        image.save(path)
        with pytest.raises(
            ValueError, match=r"mask.png has a palette whose black is not index 0 alone"
        ):
            read_mask(path, (16, 16), 16)
    # Pillow gives it a palette of one colour
    Image.fromarray(np.eye(16, dtype=np.uint8), mode="P").save(path)
    assert read_mask(path, (16, 16), 16).pixels_HW.sum() == 16
    Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(ValueError, match=r"mask.png has several channels \(RGB\)"):
        read_mask(path, (16, 16), 16)
    stream = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(stream, "PNG")
    for data in (b"", b"not an image", stream.getvalue()[:-900]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"mask.png (is not a readable PNG|cannot be decoded)"):
            read_mask(path, (16, 16), 16)


def test_masks_are_found_by_name(tmp_path):
    on = np.ones((2, 2))
    expected = {
        "n01440764_10026": "n01440764/n01440764_10026.png",  # the image's own path
        "n01440764_10027": "n01440764_10027.PNG",
        "n01443537_art_0": "n01443537/art_0.png",  # names repeat, so keys have the folder
        "n01443538_art_0": "sets/r/n01443538/art_0.png",
        "0_000116_digger___crab_0_42": "n01/0.000116_digger _ crab_0.42.png",
        "train/cat/7": "train/cat/7.png",  # of third-party shards
    }
    for path in [*expected.values(), "n01440764/other.png"]:
        save_mask(tmp_path / path, on)
    (tmp_path / "n01440764_10028.txt").write_text("")
    found = find_masks(tmp_path, [*expected, "n01440764_10028"])
    assert {key: str(path.relative_to(tmp_path)) for key, path in found.items()} == expected
    save_mask(tmp_path / "val" / "n01440764_10026.png", on)
    with pytest.raises(ValueError, match="may both be the mask of sample 'n01440764_10026'"):
        find_masks(tmp_path, list(expected))
    with pytest.raises(ValueError, match="several samples have the key '7'"):
        find_masks(tmp_path, ["7", "8", "7"])
