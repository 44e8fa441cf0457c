"""The miniature world: layouts that the readers accept, and images with the stated properties."""

import dataclasses
import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rft.clip.load import load_clip
from rft.config import ModelConfig
from rft.demo import world
from rft.demo.captions import CONTEXT_LENGTH, TEMPLATES, VOCABULARY, caption
from rft.demo.objects import CLASSES, SHAPE_INSTANCES, SHARES, bank_members, load_silhouettes
from rft.demo.render import IMAGE_SIZE, pattern_and_palette, place, render
from rft.demo.scenes import (
    NOVEL_CONTEXTS,
    NUM_CONTEXTS,
    PLAIN,
    VERSION,
    Setting,
    draw_context,
    draw_scene,
)
from rft.packing.layouts import read_source
from rft.packing.objectnet import objectnet_groups
from rft.rng import numpy_generator
from rft.shards.label_space import LabelSpace

pytestmark = pytest.mark.slow  # together

SCALE = 0.01  # 20 training images, 16 of each other set
DIVERSE = Setting(
    bank="dev",
    styles={"photo": 0.2, "cartoon": 0.2, "painting": 0.2, "embroidery": 0.2, "sketch": 0.2},
    contexts="any",
    wide_rotation=0.5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("miniature") / "world"
    world.write_world(path, scale=SCALE)
    return path


@pytest.fixture(scope="module")
def labels(folder: Path) -> LabelSpace:
    return LabelSpace.load(str(folder / "classes.json"))


def content(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def scenes(setting: Setting, count: int):
    silhouettes = load_silhouettes(setting.bank)
    for number in range(count):
        rng = numpy_generator("test", number)
        yield draw_scene(setting, number % len(CLASSES), silhouettes, rng), rng


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    world.write_world(tmp_path / "again", scale=SCALE)
    world.write_world(tmp_path / "other", seed=1, scale=SCALE)
    assert content(tmp_path / "again") == content(folder)
    other, same = content(tmp_path / "other"), content(folder)
    images = [path for path in same if path.endswith(".JPEG") and path in other]
    assert images
    assert all(other[path] != same[path] for path in images)


def test_a_finished_world_is_left_alone_and_another_is_refused(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    world.write_world(folder, scale=SCALE)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ValueError, match=r"another miniature world \(seed: 0 -> 1\)"):
        world.write_world(folder, seed=1, scale=SCALE)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds no miniature world"):
        world.write_world(tmp_path, scale=SCALE)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(root: Path, *_):
        (root / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(world, "_write_image", fail)
    with pytest.raises(OSError, match="disk full"):
        world.write_world(tmp_path / "world", scale=SCALE)
    assert list(tmp_path.iterdir()) == []


def test_only_the_training_set_shares_objects_with_fine_tuning():
    banks = {name: image_set.setting.bank for name, image_set in world.SETS.items()}
    assert banks.pop("imagenet-train") == "finetune"
    assert set(banks.values()) == {"test"}


def test_every_set_is_read_in_its_official_layout(folder, labels):
    for name, image_set in world.SETS.items():
        source = read_source(name, folder, labels)
        assert len(source.items) == max(16, round(SCALE * image_set.images)), name
        members = {class_id for group in source.groups for class_id in group}
        subset = name in ("imagenet-r", "imagenet-a", "objectnet")
        assert members == set(image_set.classes if subset else range(len(CLASSES))), name
        assert source.crop_border == (world.OBJECTNET_FRAME if name == "objectnet" else 0)


def test_the_layouts_keep_the_traps_of_the_originals(folder):
    v2 = sorted(
        path.name for path in (folder / "imagenetv2-matched-frequency-format-val").iterdir()
    )
    assert v2 != sorted(v2, key=int)
    assert world.SETS["imagenet-r"].classes != world.SETS["imagenet-a"].classes
    for name in ("imagenet-r", "imagenet-a"):
        assert (folder / name / "README.txt").is_file()
        assert len(world.SETS[name].classes) == 10
    assert all(
        path.name.count(".") > 1 and " " in path.name for path in folder.glob("imagenet-a/*/*.jpg")
    )
    ids = json.loads((folder / "classes.json").read_text())["ids"]
    assert ids == sorted(ids)


def test_objectnet_mappings_resolve_to_the_intended_groups(folder):
    groups = objectnet_groups(folder / "objectnet-1.0" / "mappings", len(CLASSES))
    intended = {name: members for name, (_, members) in world.OBJECTNET_FOLDERS.items()}
    assert groups == {name: members for name, members in intended.items() if members}
    assert sorted(set(world.CLASS_TO_2012) ^ set(range(len(CLASSES)))) == []
    assert tuple(range(len(CLASSES))) != world.CLASS_TO_2012
    folders = {path.name for path in (folder / "objectnet-1.0" / "images").iterdir()}
    assert folders == set(intended)
    assert len(folders - set(groups)) >= 3
    assert sum(len(members) > 1 for members in groups.values()) == 2
    assert any("-" in name for name in groups)


def test_objectnet_images_have_a_red_frame(folder):
    for path in (folder / "objectnet-1.0" / "images").glob("*/*.png"):
        image = np.asarray(Image.open(path)).astype(int)
        assert image.shape == (IMAGE_SIZE + 4, IMAGE_SIZE + 4, 3)
        frame = np.ones(image.shape[:2], dtype=bool)
        frame[2:-2, 2:-2] = False
        assert (image[frame] == (255, 0, 0)).all()


def test_every_image_has_a_mask_that_covers_its_object(folder):
    images = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpeg", ".jpg", ".png") and "masks" not in path.parts
    ]
    masks = [path.relative_to(folder) for path in (folder / "masks").rglob("*.png")]
    assert sorted(masks) == sorted(Path(world.mask_path(path)) for path in images)
    for path in images:
        mask = np.asarray(Image.open(folder / world.mask_path(path)))
        assert set(np.unique(mask)) <= {0, 255}
        image = np.asarray(Image.open(folder / path).convert("L")).astype(float)
        assert mask.shape == image.shape
        if "train" in path.parts:  # photographs: bright objects on dark contexts
            assert 0.02 < (mask == 255).mean() < 0.6
            assert image[mask == 255].mean() > image[mask == 0].mean() + 20, path


def test_the_mask_is_where_the_silhouette_was_pasted():
    photos = Setting(bank="dev", styles={"photo": 1.0}, contexts="any")
    for scene, rng in scenes(photos, 16):
        state = rng.bit_generator.state
        image, mask = render(scene, rng)
        rng.bit_generator.state = state
        absent = np.zeros_like(scene.silhouette)
        ground, nothing = render(dataclasses.replace(scene, silhouette=absent), rng)
        assert not nothing.any()
        changed = np.abs(image.astype(int) - ground).max(axis=-1)
        # the mask is where the object's opacity exceeds one half
        assert (changed[place(scene) == 0] == 0).all()
        assert (mask == (place(scene) > 0.5)).all()
        assert (changed[mask] > 10).mean() > 0.9


def test_contexts_follow_their_rule():
    rng = numpy_generator("test", "contexts")

    def drawn(rule: str, class_id: int) -> np.ndarray:
        setting = Setting(bank="dev", styles={"photo": 1.0}, contexts=rule)
        return np.array([draw_context(setting, class_id, rng) for _ in range(4000)])

    # a class's own context also occurs among the 5% drawn from all sixteen
    assert (drawn("usual", 3) == 3).mean() == pytest.approx(0.95 + 0.05 / 16, abs=0.012)
    assert set(drawn("wrong", 3)) == set(range(16)) - {3}
    assert set(drawn("novel", 3)) == set(NOVEL_CONTEXTS)
    assert set(drawn("any", 3)) == set(range(PLAIN, NUM_CONTEXTS))
    assert len({pattern_and_palette(context) for context in range(NUM_CONTEXTS)}) == NUM_CONTEXTS


def test_no_instance_is_in_two_banks():
    for class_id in range(len(CLASSES)):
        members = bank_members(class_id, SHAPE_INSTANCES)
        assert sorted(np.concatenate(list(members.values()))) == list(range(SHAPE_INSTANCES))
        for bank, share in SHARES.items():
            assert len(members[bank]) == pytest.approx(share * SHAPE_INSTANCES, abs=1)
    banks = {bank: load_silhouettes(bank) for bank in SHARES}
    for class_id in range(len(CLASSES)):
        seen = [
            {silhouette.tobytes() for silhouette in silhouettes[class_id]}
            for silhouettes in banks.values()
        ]
        assert len(set.union(*seen)) == sum(map(len, seen))


def test_every_caption_and_prompt_is_in_the_vocabulary():
    clip = load_clip(ModelConfig(clip="rft-miniature", pretrained=""))
    texts = [caption(scene, rng) for scene, rng in scenes(DIVERSE, 500)]
    prompts = [template.replace("{c}", name) for template in TEMPLATES for name in CLASSES]
    tokens = clip.tokenize([*texts, *prompts])
    assert tokens.shape == (500 + len(prompts), CONTEXT_LENGTH)
    assert (tokens.max(dim=1).values == len(VOCABULARY) - 1).all()
    named = [scene.class_id for scene, _ in scenes(DIVERSE, 500)]
    right = [CLASSES[class_id] in text for class_id, text in zip(named, texts, strict=True)]
    assert np.mean(right) > 0.9


def test_the_shipped_weights_fit_their_files():
    shipped = Path(str(resources.files("rft.demo") / "clip"))
    clip = load_clip(ModelConfig(clip="rft-miniature", pretrained=""))
    words = (shipped / "vocab.txt").read_text().splitlines()
    assert tuple(words) == VOCABULARY
    assert clip.model.vocab_size == len(words)
    assert clip.model.context_length == CONTEXT_LENGTH
    assert clip.architecture.image_size == IMAGE_SIZE
    assert sum(file.stat().st_size for file in shipped.iterdir()) < 3e6
    assert {parameter.dtype for parameter in clip.model.parameters()} == {torch.float32}
    card = json.loads((shipped / "card.json").read_text())
    assert card["world_version"] == VERSION
