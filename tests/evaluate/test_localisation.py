"""Table 2: the chosen images, the map, and the command on one and more ranks."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import tiny_world
from rft import paper
from rft.clip.classifier import Classifier, save_classifier
from rft.clip.head import zero_shot_head
from rft.clip.load import MINIATURE, load_clip
from rft.config import ModelConfig
from rft.demo.world import write_world
from rft.evaluate import localisation
from rft.evaluate.measure_cam import label_map
from rft.evaluate.measured_images import RESTRICTED, select
from rft.loading.dataset import PackedDataset
from rft.packing.pack import Options, pack
from rft.shards.label_space import LabelSpace
from rft.storage import files
from tests import tiny
from tests.conftest import ARCHITECTURE, build_model, sharpen
from tests.evaluate.masks import blob, save_mask
from tests.reference import pixels as reference
from tests.reference import textbook

THRESHOLDS = (0.7, 0.4, 0.2)
SUMS = ("masked", "both", "either")


@pytest.fixture(scope="module")
def tiny_case(tmp_path_factory, tiny_data) -> dict:
    """A random model of the tiny world; masks for most of 76 images, two of them empty."""
    folder = tmp_path_factory.mktemp("localisation")
    model = build_model(classes=len(tiny_world.LABELS.ids))
    checkpoint = folder / "run" / "checkpoints" / "best.safetensors"
    save_classifier(str(checkpoint), model, {"step": "7"}, tiny_world.LABELS.classes)
    (folder / "run" / "config.json").write_text('{"recipe": "x", "seed": 0}\n')
    packed, rng = PackedDataset(str(tiny_data / "imagenet-train")), np.random.default_rng(5)
    masks = {}
    for sample in range(5, len(packed)):
        key = packed.key(sample)
        mask_HW = blob(rng, 16, 16) & (sample not in (20, 41))
        save_mask(folder / "masks" / key.split("_")[0] / f"{key}.png", mask_HW)
        masks[key] = mask_HW
    return {"folder": folder, "model": model, "packed": packed, "masks": masks}


def arguments(tiny_case, tiny_data, checkpoint: Path, *more: str) -> list[str]:
    return [
        *(str(checkpoint), "--data", str(tiny_data), "--masks", str(tiny_case["folder"] / "masks")),
        *("--classes", "all", "--batch-size", "16", "--workers", "0", "--device", "cpu"),
        *("--thresholds", *map(str, THRESHOLDS), *more),
    ]


def call(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rft", *options])
    localisation.main()


@pytest.mark.slow
def test_the_command_equals_the_textbook(tiny_case, tiny_data, tmp_path, monkeypatch, capsys):
    """CAM with R in full, one image at a time, and masks as sets of pixels."""
    run = tiny_case["folder"] / "run"
    call(monkeypatch, *arguments(tiny_case, tiny_data, run))
    document = json.loads((run / "localisation.json").read_text())
    model, packed = tiny_case["model"], tiny_case["packed"]
    objects, maps = list(tiny_case["masks"].values()), []
    for sample in range(5, len(packed)):
        image_BCHW = torch.from_numpy(packed.image(sample, 16))[None]
        image_CHW = textbook.normalise_images(model, image_BCHW)[0]
        cam_P = textbook.relevance(model, image_CHW, int(packed.index.label[sample]))
        maps.append(cam_P / cam_P.max())
    assert document["images"] == {"measured": 69, "empty_mask": 2, "without_mask": 5}
    for entry, threshold in zip(document["thresholds"], THRESHOLDS, strict=True):
        masks = [(cam_P > threshold).tolist() for cam_P in maps]
        expected = reference.table_2(masks, objects)
        assert entry["threshold"] == threshold
        assert entry["pixels"] == {name: expected[name] for name in SUMS}
        assert document["pixels"] == {name: expected[name] for name in ("image", "object")}
        assert entry["mean"] == pytest.approx({name: expected[name] for name in entry["mean"]})
        assert entry["pooled"]["iou"] == expected["both"] / expected["either"]
    assert len({entry["pixels"]["masked"] for entry in document["thresholds"]}) == 3
    assert document["checkpoint"] == "run/checkpoints/best.safetensors"
    assert document["checkpoint_sha256"] == files.sha256_file(
        run / "checkpoints" / "best.safetensors"
    )
    assert document["config_sha256"] == files.sha256_file(run / "config.json")
    assert document["manifest_sha256"] == packed.manifest.sha256
    assert (document["step"], document["set"], document["cam"]) == (
        7,
        "imagenet-train",
        "relevance",
    )
    assert document["provenance"]["packages"]["torch"]
    lines = capsys.readouterr().out.splitlines()
    assert "mean over 69 images (2 more have an empty mask, 5 no mask)" in lines[0]
    first = document["thresholds"][0]["mean"]
    names = ("image_masking_rate", "object_masking_rate", "iou")
    assert [line.split()[-3] for line in lines[2:]] == [f"{first[name]:.3f}" for name in names]
    assert not any("paper" in line for line in lines)  # another model, other classes


@pytest.mark.parametrize("cam", ["relevance", "grad-cam"])
def test_the_map_is_the_one_that_is_asked_for(images_BCHW, labels_B, cam):
    kind = {"relevance": textbook.relevance, "grad-cam": textbook.grad_cam}[cam]
    model = sharpen(build_model())
    found = label_map(model.requires_grad_(False), images_BCHW, labels_B, cam)
    model.requires_grad_()
    for n, image_CHW in enumerate(textbook.normalise_images(model, images_BCHW)):
        cam_P = kind(model, image_CHW, int(labels_B[n]))
        torch.testing.assert_close(found[n], cam_P / (cam_P.max() + 1e-8), rtol=0, atol=1e-4)


def results(path: Path) -> dict:
    document = json.loads(path.read_text())
    del document["provenance"], document["checkpoint"]
    return document


@pytest.mark.slow
def test_ranks_change_no_digit(tiny_case, tiny_data, tmp_path, monkeypatch):
    # as this process alone; 71 masks in batches of 16: ranks get unequal numbers of batches, and
    # the last one is short; loader processes and threads change nothing either
    weights = (tiny_case["folder"] / "run" / "checkpoints" / "best.safetensors").read_bytes()
    (tmp_path / "alone.safetensors").write_bytes(weights)
    (tmp_path / "model.safetensors").write_bytes(weights)
    call(monkeypatch, *arguments(tiny_case, tiny_data, tmp_path / "alone.safetensors"))
    options = arguments(tiny_case, tiny_data, tmp_path / "model.safetensors")
    tiny.torchrun(3, "rft.evaluate.localisation", *options, "--workers", "1")
    expected = results(tmp_path / "alone.localisation.json")
    assert results(tmp_path / "model.localisation.json") == expected
    assert expected["config_sha256"] is None


@pytest.mark.slow
def test_more_ranks_than_batches(tiny_case, tiny_data, tmp_path, monkeypatch):
    # ten images are one batch
    weights = (tiny_case["folder"] / "run" / "checkpoints" / "best.safetensors").read_bytes()
    (tmp_path / "alone.safetensors").write_bytes(weights)
    (tmp_path / "model.safetensors").write_bytes(weights)
    ten = ("--samples", "10")
    call(monkeypatch, *arguments(tiny_case, tiny_data, tmp_path / "alone.safetensors", *ten))
    options = arguments(tiny_case, tiny_data, tmp_path / "model.safetensors", *ten)
    tiny.torchrun(2, "rft.evaluate.localisation", *options)
    expected = results(tmp_path / "alone.localisation.json")
    assert results(tmp_path / "model.localisation.json") == expected
    assert expected["images"]["measured"] + expected["images"]["empty_mask"] == 10
    assert expected["images"]["without_mask"] == 5


@pytest.mark.parametrize("what", ["packed set", "list of masks"])
def test_ranks_that_see_other_files_are_stopped(
    tiny_case, tiny_data, tmp_path, disagreeing, refused, what
):
    disagreeing(what)
    weights = (tiny_case["folder"] / "run" / "checkpoints" / "best.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    options = arguments(tiny_case, tiny_data, tmp_path / "model.safetensors")
    assert f"ranks [1] have a different {what}" in refused(localisation, *options)
    assert not (tmp_path / "model.localisation.json").exists()


@pytest.mark.slow
def test_several_checkpoints_are_measured_in_one_pass(tiny_case, tiny_data, tmp_path, monkeypatch):
    paths = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        save_classifier(
            str(path),
            build_model(seed, len(tiny_world.LABELS.ids)),
            {"step": "0"},
            tiny_world.LABELS.classes,
        )
    first, second = map(str, paths)
    call(monkeypatch, first, *arguments(tiny_case, tiny_data, paths[1]))
    together = [results(path.with_suffix(".localisation.json")) for path in paths]
    for path, expected in zip((first, second), together, strict=True):
        call(monkeypatch, *arguments(tiny_case, tiny_data, Path(path)))
        assert results(Path(path).with_suffix(".localisation.json")) == expected
    assert together[0]["masks_sha256"] == together[1]["masks_sha256"]
    assert together[0]["thresholds"] != together[1]["thresholds"]
    call(monkeypatch, *arguments(tiny_case, tiny_data, paths[0], "--cam", "grad-cam"))
    other = results(paths[0].with_suffix(".localisation.json"))
    assert other["cam"] == "grad-cam"
    assert other["thresholds"] != together[0]["thresholds"]


def with_imagenets_classes(packed: PackedDataset, labels: list[int]) -> PackedDataset:
    """The same set as if it had been packed with ImageNet's classes; labels repeat."""
    other = PackedDataset(packed.url)
    imagenet = LabelSpace.imagenet()
    other.manifest = dataclasses.replace(
        other.manifest, classes=imagenet.names, class_ids=imagenet.ids
    )
    other.index = dataclasses.replace(other.index, label=np.resize(labels, len(packed)))
    return other


def test_restricted_imagenet(tiny_case):
    names = LabelSpace.imagenet().names
    chosen = RESTRICTED
    assert len(set(chosen)) == len(chosen) == 144
    ends = {151: "Chihuahua", 268: "hairless", 281: "tabby", 285: "Egyptian", 80: "black grouse"}
    ends |= {100: "black swan"}
    for class_id, name in ends.items():
        assert name in names[class_id]
        assert class_id in chosen
    assert not {79, 101, 150, 269, 280, 286} & set(chosen)
    packed = with_imagenets_classes(tiny_case["packed"], [150, 151, 285, 286, 90, 7])
    selection = select(packed, tiny_case["folder"] / "masks", "restricted", 0, 0)
    assert set(packed.index.label[selection.samples]) == {151, 285, 90}
    inside = np.isin(packed.index.label, [151, 285, 90])
    assert len(selection.samples) + selection.missing == inside.sum()
    assert selection.missing == inside[:5].sum() > 0


def test_the_rates_of_table_2_rise_and_fit_each_other():
    """A misprint would show: all rates rise as the threshold falls, and imply one object size."""
    rows = [paper.TABLE_2[value] for value in (0.7, 0.6, 0.5, 0.4, 0.3)]
    rows.append(paper.TABLE_2[0.2])
    for above, below in itertools.pairwise(rows):
        assert all(one < other for one, other in zip(above, below, strict=True))
    for image, both, iou in rows:
        # iou = both x size / (image + size - both x size), solved for the object's share of pixels
        size = iou * image / (both - iou + iou * both)
        assert 0.19 < size < 0.4


def test_the_paper_stands_beside_its_own_model_alone():
    thresholds = [
        {"threshold": value, "mean": paper.TABLE_2[0.7]._asdict()} for value in (0.7, 0.33)
    ]
    document = {
        "set": "imagenet-train",
        "classes": "restricted",
        "images": {"measured": 1234, "empty_mask": 0, "without_mask": 5},
        "thresholds": thresholds,
    }
    text = localisation.format_table("runs/a", document, beside_paper=True)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][-1] == "mask)"
    assert "1,234" in lines[0]
    assert lines[4:6] == [
        ["object", "masking", "rate", "0.170", "0.170"],
        ["the", "paper's", "0.17", "-"],
    ]
    document["classes"] = "all"
    assert "paper" not in localisation.format_table("runs/a", document, beside_paper=True)


def test_the_choice_by_chance_does_not_depend_on_packing(tiny_case):
    folder, packed = tiny_case["folder"] / "masks", tiny_case["packed"]

    def chosen(packed: PackedDataset, seed: int) -> set[str]:
        selection = select(packed, folder, "all", 10, seed)
        assert list(selection.samples) == sorted(selection.paths)
        return {packed.key(sample) for sample in selection.samples}

    other = PackedDataset(packed.url)
    columns = {name: column[::-1] for name, column in vars(packed.index).items()}
    other.index = dataclasses.replace(packed.index, **columns)
    assert len(chosen(packed, 0)) == 10
    assert chosen(packed, 0) == chosen(other, 0) != chosen(packed, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "0"), "--batch-size is 0; it must be greater than 0"),
        (("--samples", "-1"), "--samples is -1; it must be"),
        (("--thresholds", "0.3", "1.5"), "--thresholds has 1.5; it must be from 0 to 1"),
        (("--thresholds", "nan"), "--thresholds[0] is nan; it must be a finite number"),
        (("--thresholds", "0.3", "0.3"), "without duplicates"),
        (("--classes", "dogs"), "--classes"),
        (("--classes", "restricted"), "(4 and 1000 classes); use --classes all"),
        (("--set", "imagenet-trian"), "no packed dataset at"),
        (("--samples", "72"), "--samples is 72, but only 71 of the 76 images have a mask below"),
        (("--masks", "/nowhere"), "no folder of masks at /nowhere"),
        # the images have the size of the model's input, the masks are those of 16 x 16 pixels
        (("--max-pixels", "0.00023"), "--max-pixels allows 0.00023 million"),
        (("--set", "imagenet-a", "--device", "cuda"), "device is cuda, but torch sees no GPU"),
    ],
)
def test_what_the_command_refuses(tiny_case, tiny_data, refused, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = tiny_case["folder"] / "run"
    line = refused(localisation, *arguments(tiny_case, tiny_data, run, *options))
    assert message in line


def test_no_mask_belongs_to_an_image(tiny_case, tiny_data, tmp_path, refused):
    run = tiny_case["folder"] / "run"
    options = arguments(tiny_case, tiny_data, run, "--masks", str(tmp_path))
    line = refused(localisation, *options)
    first = tiny_case["packed"].key(0)
    assert f"no mask below {tmp_path} belongs to any of the 76 images" in line
    assert f"would be {tmp_path}/{first}.png, or have the image's own path below" in line


def test_masks_of_nothing(tiny_case, tiny_data, tmp_path, refused):
    run = tiny_case["folder"] / "run"
    for key in list(tiny_case["masks"])[:3]:
        save_mask(tmp_path / f"{key}.png", np.zeros((16, 16)))
    options = arguments(tiny_case, tiny_data, run, "--masks", str(tmp_path))
    assert f"all 3 masks below {tmp_path} are empty" in refused(localisation, *options)
    path = save_mask(tmp_path / f"{next(iter(tiny_case['masks']))}.png", np.ones((16, 15)))
    assert f"{path} is 15 x 16 pixels" in refused(localisation, *options)


def test_checkpoints_that_do_not_fit(tiny_case, tiny_data, tmp_path, refused):
    options = arguments(tiny_case, tiny_data, tmp_path / "none.safetensors")
    assert "no checkpoint at" in refused(localisation, *options)
    assert "name at least one run folder" in refused(localisation, *options[1:])
    path = tmp_path / "five.safetensors"
    save_classifier(str(path), build_model(classes=5), {"step": "0"}, None)
    options = arguments(tiny_case, tiny_data, path)
    assert "has a 5-class head" in refused(localisation, *options)
    large = dataclasses.replace(
        ARCHITECTURE, vision_cfg={**ARCHITECTURE.vision_cfg, "image_size": 32}
    )
    model = Classifier(large.build_visual(), torch.nn.Linear(12, 4), large)
    save_classifier(str(path), model, {"step": "0"}, tiny_world.LABELS.classes)
    both = refused(localisation, str(tiny_case["folder"] / "run"), *options)
    assert "the checkpoints need images of [16, 32] px; evaluate them apart" in both
    assert "was packed at 16 px, the model wants 32 px" in refused(localisation, *options)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_miniatures_clip_finds_its_objects(tmp_path, monkeypatch):
    """The world's own masks, at the paths it writes them, and the CLIP that comes with rft."""
    write_world(tmp_path / "world", scale=0.05)
    labels = LabelSpace.load(str(tmp_path / "world" / "classes.json"))
    for encoding in ("pixels", "original"):
        options = Options(encoding=encoding, size=48, shard_mb=2, workers=1)
        for dataset in ("imagenet-train", "imagenet-r", "objectnet"):
            pack(dataset, str(tmp_path / "world"), str(tmp_path / encoding), labels, options)
    clip = load_clip(ModelConfig(clip=MINIATURE))
    head = zero_shot_head(clip, labels.names, labels.templates)
    model = Classifier(clip.model.visual, head, clip.architecture)
    save_classifier(str(tmp_path / "zero-shot.safetensors"), model, {"step": "0"}, labels.classes)

    def run(encoding: str, dataset: str) -> dict:
        options = ["--data", str(tmp_path / encoding), "--masks", str(tmp_path / "world/masks")]
        options += ["--set", dataset, "--classes", "all", "--thresholds", "0.1", "0.3", "0.6"]
        options += ["--workers", "0", "--device", "cpu"]
        call(monkeypatch, str(tmp_path / "zero-shot.safetensors"), *options)
        return results(tmp_path / "zero-shot.localisation.json")

    train = run("pixels", "imagenet-train")
    assert train["images"] == {"measured": 100, "empty_mask": 0, "without_mask": 0}
    for entry in train["thresholds"]:
        # for masks unrelated to the object the two would be equal
        assert entry["mean"]["object_masking_rate"] > 1.5 * entry["mean"]["image_masking_rate"]
    masks = list((tmp_path / "world/masks/objectnet-1.0").rglob("*.png"))
    object_pixels = sum(int((np.asarray(Image.open(path)) > 0).sum()) for path in masks)
    # without its frame an image of ObjectNet has the model's size: no resizing
    assert run("pixels", "objectnet")["pixels"]["object"] == object_pixels
    # the same when images are decoded while reading; in R, keys have their folders
    for dataset in ("imagenet-train", "imagenet-r", "objectnet"):
        packed, decoded = run("pixels", dataset), run("original", dataset)
        assert packed["images"] == decoded["images"]
        assert packed["images"]["without_mask"] == 0
        assert packed["pixels"] == decoded["pixels"]
        assert packed["thresholds"] == [
            {
                **entry,
                "mean": pytest.approx(entry["mean"]),
                "pooled": pytest.approx(entry["pooled"]),
            }
            for entry in decoded["thresholds"]
        ]
