"""The miniature world packed by the two tools, like the real benchmarks."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tiny_world import environment
from rft import dist
from rft.clip.classifier import Classifier
from rft.clip.head import zero_shot_head
from rft.clip.load import MINIATURE, load_clip
from rft.config import ModelConfig
from rft.demo.world import write_world
from rft.evaluate.count import count_correct
from rft.loading.dataset import PackedDataset
from rft.sets import BENCHMARKS

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[2] / "tools"
OOD = [name for name in BENCHMARKS if name not in ("imagenet-train", "imagenet-val")]


def run_tools(world: Path, out: Path, *options: str) -> None:
    common = ["--out", out, "--classes", world / "classes.json", "--workers", "1", *options]
    imagenet = [TOOLS / "shard_imagenet.py", "--source", world / "imagenet"]
    ood = [TOOLS / "shard_ood.py", "--source", world, "--benchmark", *OOD]
    for command in (imagenet, ood):
        arguments = [sys.executable, *map(str, [*command, *common])]
        subprocess.run(arguments, env=environment(), check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, dict[str, PackedDataset]]:
    """Each set, packed as the images' own bytes and as pixels."""
    folder = tmp_path_factory.mktemp("miniature")
    write_world(folder / "world", scale=0.1)
    found = {}
    for encoding in ("original", "pixels"):
        options = ("--encoding", encoding, "--size", "48", "--shard-mb", "0.3")
        run_tools(folder / "world", folder / encoding, *options)
        found[encoding] = {
            name: PackedDataset(str(folder / encoding / name)) for name in BENCHMARKS
        }
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_decoding_while_reading_gives_the_packed_pixels(packed, name):
    original, pixels = packed["original"][name], packed["pixels"][name]
    numbers = {key: number for number, key in enumerate(pixels.index.key)}
    assert len(original) == len(pixels) == len(numbers)
    for number in range(0, len(original), 7):
        same = numbers[original.index.key[number]]
        assert original.index.label[number] == pixels.index.label[same]
        assert (original.image(number, 48) == pixels.image(same, 48)).all()


def test_scoring_rules_are_the_benchmarks(packed):
    groups = {name: dataset.manifest.groups for name, dataset in packed["pixels"].items()}
    single = [len(group) for name in groups if name != "objectnet" for group in groups[name]]
    assert set(single) == {1}
    assert [len(groups[name]) for name in ("imagenet-val", "imagenet-v2")] == [16, 16]
    assert [len(groups[name]) for name in ("imagenet-r", "imagenet-a")] == [10, 10]
    assert groups["imagenet-r"] != groups["imagenet-a"]
    assert sorted(len(group) for group in groups["objectnet"])[-2:] == [2, 2]
    # images in folders that are not classes are ignored
    assert len(groups["objectnet"]) == 10


def test_v2_labels_follow_the_folder_numbers(packed):
    dataset = packed["original"]["imagenet-v2"]
    with tarfile.open(Path(dataset.url) / dataset.manifest.shards[0].name) as tar:
        records = [tar.extractfile(name).read() for name in tar.getnames() if name[-5:] == ".json"]
    paths = [json.loads(record)["path"] for record in records]
    labels = dataset.index.label[: len(paths)]
    assert [int(path.split("/")[-2]) for path in paths] == labels.tolist()
    assert max(labels) > 9, "two-digit folders would be sorted wrongly as text"


def test_the_shipped_clip_knows_this_world(packed):
    pretrained = load_clip(ModelConfig(clip=MINIATURE, pretrained=""))
    manifest = packed["pixels"]["imagenet-val"].manifest
    head = zero_shot_head(pretrained, manifest.classes, manifest.templates)
    model = Classifier(pretrained.model.visual, head, pretrained.architecture)
    (count,) = count_correct(
        [model],
        packed["pixels"]["imagenet-val"],
        image_size=48,
        world=dist.World(rank=0, size=1, local_rank=0),
        device=torch.device("cpu"),
    )
    assert count.total == len(packed["pixels"]["imagenet-val"])
    assert count.share > 0.4, "chance is 1 in 16"


def test_a_flipped_byte_a_cut_and_a_missing_shard_name_the_sample(packed, tmp_path):
    source = Path(packed["pixels"]["imagenet-r"].url)
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset = PackedDataset(str(tmp_path))
    shard = tmp_path / dataset.manifest.shards[0].name
    whole = shard.read_bytes()
    offset = int(dataset.index.offset[0]) + 500
    shard.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
    with pytest.raises(ValueError, match=rf"crc32 mismatch.*{shard.name}.*{dataset.key(0)}"):
        PackedDataset(str(tmp_path)).image(0, 48)
    shard.write_bytes(whole[: offset + 10])
    with pytest.raises(ValueError, match=rf"short read.*{shard.name}, sample '{dataset.key(0)}'"):
        PackedDataset(str(tmp_path)).image(0, 48)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"missing shard.*{shard.name}"):
        PackedDataset(str(tmp_path)).image(0, 48)
    index = tmp_path / "index.npz"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="does not have the sha256 in its manifest"):
        PackedDataset(str(tmp_path))


def test_batches_through_loader_processes_are_the_same(packed):
    from rft.loading.batches import TrainingBatches
    from rft.loading.order import Plan
    from rft.loading.read import read_batches

    dataset = packed["original"]["imagenet-train"]
    samples = np.arange(len(dataset))
    sizes = dataset.shard_sizes(samples)
    plan = Plan(shard_sizes=sizes, batch_size=12, seed=1, streams=3, block_shards=2)
    whole = TrainingBatches(dataset, samples, plan, image_size=48, rank=0, world_size=1)
    device = torch.device("cpu")
    alone = [
        batch._replace(images_BCHW=batch.images_BCHW.clone())
        for batch in read_batches(whole, range(3, 6), workers=0, device=device)
    ]
    for ranks in (2, 3):
        parts = [
            TrainingBatches(dataset, samples, plan, image_size=48, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        workers = 2 if ranks == 2 else 0
        streams = [read_batches(p, range(3, 6), workers=workers, device=device) for p in parts]
        for expected, *pieces in zip(alone, *streams, strict=True):
            assert torch.equal(expected.samples_B, torch.cat([p.samples_B for p in pieces]))
            assert torch.equal(expected.images_BCHW, torch.cat([p.images_BCHW for p in pieces]))
