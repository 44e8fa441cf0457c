"""Hostile weights files get a one-line error each, before memory or time is spent."""

import dataclasses
import io
import json
import os
import pickle
import re
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rft.classes import Classes
from rft.clip import load, unpickle, weights
from rft.clip.classifier import load_state, map_state, save_classifier
from rft.config import ModelConfig
from rft.runs import header
from rft.storage import files
from tests import formats
from tests.conftest import build_model

pytestmark = pytest.mark.slow  # together

Change = Callable[[dict], object]


def parts(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(document: object, content: bytes) -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + content


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    metadata = {"recipe": "test", "step": "3", "trained_on": json.dumps([["own", "0" * 64]])}
    classes = Classes(ids=tuple("abcde"), names=tuple("ABCDE"), prompts_sha256="0" * 64)
    save_classifier(str(path), build_model(), metadata, classes)
    return path.read_bytes()


def entry(change: Change) -> Change:
    """A change of rft's own entries in a header."""

    def apply(document: dict) -> None:
        entries = json.loads(document["__metadata__"]["rft"])
        change(entries)
        document["__metadata__"]["rft"] = json.dumps(entries)

    return apply


def tower(**fields: object) -> Change:
    """A change of the architecture in a header."""

    def apply(entries: dict) -> None:
        architecture = json.loads(entries["architecture"])
        vision = fields.pop("vision", None)
        architecture["vision_cfg"] |= vision or {}
        entries["architecture"] = json.dumps(architecture | fields)

    return entry(apply)


BIAS = "head.bias"
OWN = {
    "step": (entry(lambda e: e.update(step=3)), "step is 3; it must be a text"),
    "a step": (entry(lambda e: e.update(step="-1")), "step is '-1'"),
    "recipe": (entry(lambda e: e.update(recipe="a\x1b[2J")), "recipe is .*no control"),
    "classes": (entry(lambda e: e.update(classes=[])), r"classes is \[\]; it must be an object"),
    "names": (entry(lambda e: e["classes"].pop("names")), "classes.names is missing"),
    "a name": (entry(lambda e: e["classes"]["names"].insert(2, 1)), r"classes.names\[2\] is 1"),
    "ids": (entry(lambda e: e["classes"]["ids"].pop()), "4 class ids but 5 class names"),
    "prompts": (entry(lambda e: e["classes"].update(prompts_sha256="../x")), "prompts_sha256 is"),
    "no step": (entry(lambda e: e.pop("step")), "step is missing"),
    "no tower": (entry(lambda e: e.pop("architecture")), "header has no architecture"),
    "trained on": (entry(lambda e: e.update(trained_on=[])), r"trained_on is \[\]; it must be a t"),
    "layers": (tower(vision={"layers": 10**9}), "layers is 1000000000; it must be less than or eq"),
    "no layers": (
        tower(vision={"layers": 0}),
        "layers is 0; it must be greater than or equal to 1",
    ),
    "true": (tower(vision={"layers": True}), "layers is True; it must be a whole number"),
    "text": (tower(vision={"width": "32"}), "width is '32'; it must be a whole number"),
    "width": (tower(vision={"width": 33}), "width is 33; it must be a multiple of head_width, 8"),
    "heads": (tower(vision={"head_width": 0}), "head_width is 0; it must be greater"),
    "patch": (tower(vision={"patch_size": -4}), "patch_size is -4; it must be greater"),
    "grid": (tower(vision={"image_size": 18}), "image_size is 18; it must be a multiple of patch_"),
    "ratio": (tower(vision={"mlp_ratio": 1e9}), "mlp_ratio is 1000000000.0; it must be less"),
    "norm": (tower(vision={"norm_kwargs": {"device": "cuda"}}), "norm_kwargs.device is an unknown"),
    "embedding": (tower(embed_dim=2**40), "embed_dim is 1099511627776; it must be less"),
    "no layer's width": (
        tower(vision={"mlp_ratio": 1e-9}),
        "mlp_ratio is 1e-09; times the width 32",
    ),
    "odd positions": (
        tower(vision={"pos_embed_type": "sin_cos_2d", "width": 26, "head_width": 13}),
        "width is 26; with pos_embed_type sin_cos_2d it must be a multiple of 4",
    ),
    "an attention pool": (
        tower(vision={"attentional_pool": True, "attn_pooler_heads": 7}),
        "cannot build the image tower of .*: embed_dim must be divisible by num_heads",
    ),
    "deviation": (tower(std=[0, 1, 1]), r"std\[0\] is 0.*; it must be greater"),
    "huge mean": (tower(mean=[1e300, 1, 1]), r"mean\[0\] is 1e\+300; it must be less"),
    "quick": (tower(quick_gelu=1), "quick_gelu is 1; it must be true or false"),
    "a wider tower": (
        tower(vision={"width": 4096}),
        r"it has visual.class_embedding of shape \(32,",
    ),
    "a deeper tower": (
        tower(vision={"layers": 128}),
        "it has no 'visual.transformer.resblocks.10",
    ),
    "a longer list": (
        entry(lambda e: e["classes"].update(names=[*"ABCDEF"], ids=[*"abcdef"])),
        "header names 6 classes, but its head has 5",
    ),
    "metadata": (lambda d: d.update(__metadata__=[]), r"is \[\]; it must be an object"),
    "other metadata": (lambda d: d.update(__metadata__={"rft": 3}), "rft is 3; it must be a text"),
    "no metadata": (lambda d: d.pop("__metadata__"), "was not written by rft"),
    "no JSON": (lambda d: d["__metadata__"].update(rft="[" * 10**5), "is not valid JSON"),
    "twice in JSON": (
        lambda d: d["__metadata__"].update(rft='{"step": "1", "step": "2"}'),
        "'step' occurs twice",
    ),
    "a missing tensor": (
        lambda d: d.update({"other": d.pop("visual.conv1.weight")}),
        "it has no 'visual.conv1.weight'",
    ),
    "an extra tensor": (
        lambda d: d.update({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "it has an unknown 'x'",
    ),
    "another shape": (
        lambda d: d[BIAS].update(shape=[1, 5]),
        r"head.bias of shape \(1, 5\) instead",
    ),
    "whole numbers": (lambda d: d[BIAS].update(dtype="I32"), "head.bias of torch.int32 instead of"),
    "an unknown type": (lambda d: d[BIAS].update(dtype="F31"), "unknown variant `F31`"),
    "a large shape": (lambda d: d[BIAS].update(shape=[2**40]), "damaged or truncated"),
    "a larger one": (lambda d: d[BIAS].update(shape=[2**60]), r"shape\[0\] is 11529.*must be less"),
    "many dimensions": (lambda d: d[BIAS].update(shape=[1] * 9 + [5]), "shape is .*at most 8"),
    "a negative one": (
        lambda d: d[BIAS].update(shape=[-5]),
        r"shape\[0\] is -5; it must be greater",
    ),
    "overlapping": (lambda d: d[BIAS].update(data_offsets=[4, 24]), "damaged or truncated"),
    "no fields": (lambda d: d.update(x=3), "x is 3; it must be an object"),
    "a name of a terminal": (lambda d: d.update({"\x1b[2J": d.pop(BIAS)}), "must have no control"),
    "many tensors": (
        lambda d: d.update({str(n): {"dtype": "F32", "shape": [0]} for n in range(10_001)}),
        "has 10,[0-9]{3} tensors; the limit is 10,000",
    ),
}


@pytest.mark.parametrize(("change", "message"), OWN.values(), ids=OWN.keys())
def test_a_header_of_ours_that_was_tampered_with_is_one_line(good, tmp_path, change, message):
    document, content = parts(good)
    change(document)
    path = tmp_path / "m.safetensors"
    path.write_bytes(joined(document, content))
    with pytest.raises(ValueError, match=message) as raised:
        map_state(path)
    assert str(path) in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_header_that_names_a_tensor_twice(good, tmp_path):
    """The safetensors library takes the last entry, other readers may take the first."""
    document, content = parts(good)
    text = json.dumps(document)
    text = text.replace('"head.bias"', '"head.bias": {"dtype": "I32"}, "head.bias"').encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    with pytest.raises(ValueError, match=r"header of .*'head.bias' occurs twice in one object"):
        header.read(tmp_path / "m.safetensors")


def test_a_long_header_is_not_read(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as stream:
        stream.write((header.BYTES + 1).to_bytes(8, "little") + b"{")
        stream.truncate(header.BYTES + 9)
    for read in (header.read, weights.read, load_state):
        with pytest.raises(ValueError, match=r"a header of 16,777,217 bytes; the limit is"):
            read(path)


@pytest.mark.parametrize("kind", ["folder", "FIFO"])
def test_what_has_no_end_is_not_opened(tmp_path, kind):
    path = tmp_path / "m.safetensors"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    for read in (header.read, load_state, unpickle.read):
        with pytest.raises(ValueError, match=rf"m\.safetensors:? (it )?is a {kind}"):
            read(path)
    if kind == "FIFO":
        with pytest.raises(ValueError, match="is a FIFO, not a regular file"):
            weights.read(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_a_strange_type_are_refused_by_name(tmp_path, dtype):
    state = formats.build_state()
    state["visual.proj"] = state["visual.proj"].to(dtype)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=f"m.safetensors has visual.proj of {dtype}; weights are fp"
    ):
        weights.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_a_usual_type_are_read(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in formats.build_state().items()}
    save_file(state, tmp_path / "m.safetensors")
    found = weights.read(tmp_path / "m.safetensors").visual
    assert all(torch.equal(value, state[name].float()) for name, value in found.items())


# Folders


def folder_with(path: Path, change: Change) -> str:
    formats.write_hub_folder(path)
    file = path / "open_clip_config.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return f"local-dir:{path}"


def text(**fields: object) -> Change:
    return lambda d: d["model_cfg"]["text_cfg"].update(fields)


def vision(**fields: object) -> Change:
    return lambda d: d["model_cfg"]["vision_cfg"].update(fields)


FOLDERS = {
    "layers": (vision(layers=10**9), "vision_cfg.layers is 1000000000; it must be less"),
    "a ResNet": (vision(layers=[1, 2, 3, 4]), "ResNet; rft needs open_clip's VisionTransformer"),
    "a deep tower": (vision(layers=128, width=4096), "has a different image tower"),
    "vocabulary": (text(vocab_size=10**12), "text_cfg.vocab_size is 10+; it must be less"),
    "a large text tower": (text(vocab_size=2**21, width=4096), "it has .*of shape"),
    "no layer's width": (text(mlp_ratio=1e-9), "text_cfg: mlp_ratio is 1e-09; times the width 64"),
    "an attention pool": (
        vision(attentional_pool=True, attn_pooler_heads=7),
        "cannot build the image tower of local-dir:.*: embed_dim must be divisible by num_heads",
    ),
    "odd attention": (
        text(block_type="custom", scaled_cosine_attn=True, qk_norm=True),
        "cannot build .*: Cannot activate both scaled cosine and QK normalization",
    ),
    "heads": (text(heads=3), "text_cfg: width is 64; it must be a multiple of heads, 3"),
    "no heads": (text(heads=0), "text_cfg.heads is 0; it must be greater"),
    "a path": (text(hf_model_name="../evil"), "hf_model_name is '../evil'"),
    "tokenizer": (text(tokenizer_kwargs={"use_fast": True}), "others may run code; remove them"),
    "unknown": (text(evil=1), "text_cfg.evil is an unknown field"),
    "mean": (lambda d: d["preprocess_cfg"].update(mean=[0.5]), r"mean\[1\] is missing"),
    "std": (lambda d: d["preprocess_cfg"].update(std=[0, 0, 0]), r"std\[0\] is 0"),
    "a CoCa": (lambda d: d["model_cfg"].update(multimodal_cfg={}), "CoCa; rft needs a CLIP"),
    "list": (lambda d: d.update(model_cfg=[]), r"model_cfg is \[\]; it must be an object"),
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_describes_too_much_is_one_line(tmp_path, change, message):
    name = folder_with(tmp_path / "hub", change)
    with pytest.raises(ValueError, match=message) as raised:
        load.load_clip(ModelConfig(clip=name, pretrained=""))
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (b"\xff\xfe", "vocab.txt is not UTF-8 text"),
        (b"\n<s>\n" + b"x\n" * 60_000, "vocab.txt has 60,002 words, but the text tower 49,408"),
        (b"", "vocab.txt has 1 words"),
    ],
)
def test_a_vocabulary_that_does_not_fit(tmp_path, words, message):
    name = folder_with(tmp_path / "hub", lambda _: None)
    (tmp_path / "hub" / "vocab.txt").write_bytes(words)
    with pytest.raises(ValueError, match=message):
        load.load_clip(ModelConfig(clip=name, pretrained=""))


def test_a_head_beside_weights_is_of_a_usual_type(tmp_path):
    formats.write_hub_folder(tmp_path / "hub")
    head = {"head.weight": torch.ones(4, 16).half(), "head.bias": torch.zeros(4)}
    save_file(head, tmp_path / "hub" / "head.safetensors")
    assert weights.read(tmp_path / "hub").head["head.weight"].dtype == torch.float32
    save_file({**head, "head.bias": torch.ones(4).int()}, tmp_path / "hub" / "head.safetensors")
    with pytest.raises(ValueError, match=r"head.safetensors has head.bias of torch.int32"):
        weights.read(tmp_path / "hub")


CARDS = {
    "hash": (lambda c: c["files"].update(x="../x"), r"files.x is '../x'; it must be 64 hex digits"),
    "format": (lambda c: c.update(format="x"), "format is 'x'; it must be"),
    "schema": (lambda c: c.update(schema=2), "schema is 2; it must be 1"),
    "classes": (lambda c: c.update(classes=["a\nb"] * 4), r"classes\[0\] is .*no control"),
    "number": (lambda c: c.update(classes=["a"]), "head.classes is 4; classes names 1"),
    "source": (lambda c: c.update(source=3), "source is 3; it must be an object"),
    "sets": (
        lambda c: c.update(trained_on=[["a", "b"]]),
        r"trained_on\[0\]\[1\] is 'b'; it must be",
    ),
    "tower": (lambda c: c["architecture"].update(embed_dim=0), "architecture.embed_dim is 0"),
    "activation": (
        lambda c: c.update(activation="GELU"),
        "activation is GELU, but by architecture",
    ),
    "side": (lambda c: c["preprocessing"].update(size=32), "preprocessing.size is 32, but by arch"),
    "mean": (lambda c: c["preprocessing"].update(mean=[0, 0, 0]), r"preprocessing.mean is \(0.0,"),
    "std": (lambda c: c["preprocessing"].update(std=[1, 1, 1]), r"preprocessing.std is \(1.0,"),
    "features": (
        lambda c: c["head"].update(features=9),
        "head.features is 9, but by architecture it",
    ),
}


@pytest.mark.parametrize(("change", "message"), CARDS.values(), ids=CARDS.keys())
def test_a_card_that_was_tampered_with_is_one_line(tmp_path, change, message):
    state = formats.build_state()
    save_file(state, tmp_path / "m.safetensors")
    described = card_of(tmp_path / "m.safetensors")
    path = tmp_path / "m.safetensors.json"
    path.write_text(json.dumps(described))
    assert weights.read(tmp_path / "m.safetensors").classes is not None
    change(described)
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"m.safetensors.json: {message}"):
        weights.read(tmp_path / "m.safetensors")


def card_of(path: Path) -> dict:
    digest = files.sha256_file(path)
    architecture = dataclasses.asdict(build_model().architecture)
    return {
        "format": "safetensors",
        "source": {"path": "run", "sha256": digest, "text": ""},
        "files": {path.name: digest},
        "architecture": architecture,
        "activation": "QuickGELU" if architecture["quick_gelu"] else "GELU",
        "preprocessing": {
            "size": 16,
            "mean": architecture["mean"],
            "std": architecture["std"],
        },
        "head": {"classes": 4, "features": architecture["embed_dim"]},
        "classes": list("abcd"),
    }


def folder_with_card(path: Path, change: Change, metadata: dict | None = None) -> Path:
    """A folder in open_clip's layout with the card of its export, which is changed."""
    formats.write_hub_folder(path)
    file = path / "open_clip_model.safetensors"
    if metadata:
        save_file(load_file(file), file, metadata=metadata)
    tower = load.architecture_of(f"local-dir:{path}")
    described = card_of(file) | {
        "architecture": dataclasses.asdict(tower),
        "activation": "QuickGELU",
        "preprocessing": {"size": tower.image_size, "mean": tower.mean, "std": tower.std},
        "head": {"classes": 4, "features": tower.embed_dim},
    }
    change(described)
    (path / "card.json").write_text(json.dumps(described))
    return path


def other_tower(**fields: object) -> Change:
    """A different architecture in a card that is consistent with itself."""

    def change(described: dict) -> None:
        described["architecture"] |= fields
        described["activation"] = "QuickGELU" if described["architecture"]["quick_gelu"] else "GELU"
        described["preprocessing"]["mean"] = described["architecture"]["mean"]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_tower(quick_gelu=False), "quick_gelu: True -> False"),
        (other_tower(mean=[0, 0, 0]), "mean: "),
        (
            lambda c: c["architecture"]["vision_cfg"].update(norm_kwargs={"eps": 0.5}),
            "vision_cfg.norm_kwargs: None -> ",
        ),
    ],
)
def test_a_card_and_the_configuration_beside_it_describe_one_model(tmp_path, change, message):
    good = weights.read(folder_with_card(tmp_path / "good", lambda _: None))
    assert good.architecture is not None
    assert good.architecture.mean == (0.5, 0.5, 0.5)
    folder = folder_with_card(tmp_path / "hub", change)
    both = f"{folder}/open_clip_config.json and {folder}/card.json describe different models: "
    with pytest.raises(ValueError, match=re.escape(both) + message):
        weights.read(folder)


def test_the_header_of_weights_and_the_configuration_beside_it_describe_one_model(tmp_path):
    own = {"step": "0", "architecture": build_model().architecture.to_json()}
    folder = folder_with_card(tmp_path / "hub", lambda _: None, {"rft": json.dumps(own)})
    with pytest.raises(ValueError, match=r"model\.safetensors and .*_config\.json describe diff"):
        weights.read(folder)


def test_a_card_is_of_a_head_of_this_many_classes(tmp_path):
    save_file(formats.build_state(), tmp_path / "m.safetensors")
    described = card_of(tmp_path / "m.safetensors")
    described |= {"classes": None, "head": {**described["head"], "classes": 5}}
    (tmp_path / "m.safetensors.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"json describes a head of 5 classes, but .* has 4"):
        weights.read(tmp_path / "m.safetensors")


# Pickles and archives of less than a megabyte that would cost time or memory


PRIME = 2**61 - 1  # with Python's hash of integers, all multiples have one hash


def number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


SAME_HASH = [number(PRIME * n) for n in range(1, 60_000)]
PAIRS = b"".join(key + b"N" for key in SAME_HASH)
LONG_LIST = b"]q\x01(" + b"N" * 300_000 + b"e0"
LONG_DICT = b"}q\x01(" + b"".join(b"X\5\0\0\0%05dN" % n for n in range(40_000)) + b"u0"
MODULE = b"ctorch.nn\nX\nq\x020"
SHARED = b"}(X\x0b\0\0\0_parametersh\x01X\x08\0\0\0_modules}uq\x030"
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02"
NESTED = OLD + b"N0" * 200_000 + b"N."


def nested(inner: bytes, times: int) -> bytes:
    made = b"\x80\x03B" + len(inner).to_bytes(4, "little") + inner + b"q\x010"
    return made + b"ctorch.storage\n_load_from_bytes\nq\x020" + b"h\x02h\x01\x85R0" * times + b"N."


BOMBS = {
    "keys of one hash": (b"\x80\x02}(" + PAIRS + b"u.", "a key of type int"),
    "keys one by one": (b"\x80\x02}" + PAIRS.replace(b"N\x8a", b"Ns\x8a") + b"s.", "a key of type"),
    "a dict of them": (b"\x80\x02(" + PAIRS + b"d.", "a key of type int"),
    "a set of them": (b"\x80\x04\x8f(" + b"".join(SAME_HASH) + b"\x90.", "a key of type int"),
    "a frozen set": (b"\x80\x04(" + b"".join(SAME_HASH) + b"\x91.", "a key of type int"),
    "memo": (
        b"\x80\x02N" + b"".join(b"p%d\n" % (PRIME * n) for n in range(30_000)),
        "a key of typ",
    ),
    "arguments": (b"\x80\x02" + LONG_LIST + MODULE + b"h\x02h\x01R0" * 80_000, "more than 20 arg"),
    "places": (b"\x80\x02" + LONG_LIST + b"h\x01Q0" * 90_000, "more than 20 arguments"),
    "state": (
        b"\x80\x02" + LONG_DICT + b"ccollections\nOrderedDict\n)Rq\x020" + b"h\x02h\x01b0" * 80_000,
        "damaged or truncated: EOFError",  # state that a dict cannot store is dropped
    ),
    "classes": (
        b"\x80\x02" + b"".join(b"ctorch.nn\nC%d\n0" % n for n in range(400_000)) + b"N.",
        "it names more than 1,000 classes",
    ),
    "shared parameters": (
        b"\x80\x02"
        + LONG_DICT
        + MODULE
        + SHARED
        + b"}("
        + b"".join(b"X\5\0\0\0m%04dh\x02)\x81h\x03b" % n for n in range(9999))
        + b"u.",
        "has more than 1,000,000 entries",
    ),
    "nested": (nested(NESTED, 60_000), "EOFError|larger than the file"),
    "small nested": (nested(OLD + b"N.", 60_000), "EOFError|larger than the file"),
    "operations": (b"\x80\x02" + b"N0" * (2**20 + 1), "more than 2,097,152 operations"),
    "a name": (
        b"\x80\x02cevil\x1b[2J\n" + b"x" * 10**6 + b"\n.",
        r"names evil\\x1b\[2J.x{150,199}\.",
    ),
    "8 GB": (b"\x80\x04\x8e" + struct.pack("<Q", 2**33), "EOFError|MemoryError"),
}


@pytest.mark.parametrize(("data", "message"), BOMBS.values(), ids=BOMBS.keys())
def test_a_small_pickle_takes_little_time(tmp_path, data, message):
    path = tmp_path / "m.pt"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as raised:
        weights.read(path)
    assert time.process_time() - start < 20
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def archive(**members: bytes) -> bytearray:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, data in {"data.pkl": b"\x80\x02}.", **members}.items():
            made.writestr(f"a/{name}", data)
    return bytearray(stream.getvalue())


def patched(signature: bytes, offset: int, kind: str, value: int) -> bytes:
    data = archive()
    struct.pack_into(kind, data, data.rindex(signature) + offset, value)
    return bytes(data)


ENTRY, END = b"PK\1\2", b"PK\5\6"
ARCHIVES = {
    "declared size": (patched(ENTRY, 24, "<I", 2**32 - 16), "has 4,294,967,280 bytes, more than"),
    "zip64": (patched(ENTRY, 24, "<I", 2**32 - 1), "has 4,294,967,295 bytes, more than"),
    "encrypted": (patched(ENTRY, 8, "<H", 1), "is encrypted"),
    "compressed": (patched(ENTRY, 10, "<H", 8), "is compressed, which torch never does"),
    "unknown": (patched(ENTRY, 10, "<H", 99), "is compressed, which torch never does"),
    "place of a member": (patched(ENTRY, 42, "<I", 2**32 - 16), "m.pt is damaged or truncated"),
    "size of the list": (patched(END, 12, "<I", 2**31), "m.pt is damaged or truncated"),
    "place of the list": (patched(END, 16, "<I", 2**31), "m.pt is damaged or truncated"),
}


@pytest.mark.parametrize(("data", "message"), ARCHIVES.values(), ids=ARCHIVES.keys())
def test_an_archive_that_lies_is_one_line(tmp_path, data, message):
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        weights.read(tmp_path / "m.pt")
    assert "m.pt" in str(raised.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as made:
        for data in (b"\x80\x02}.", b"\x80\x02N."):
            made.writestr("a/data.pkl", data)
    with pytest.raises(ValueError, match=r"m\.pt.*two members with the same name"):
        weights.read(tmp_path / "m.pt")


def test_an_archive_of_many_members(tmp_path):
    members = {f"data/{n}": b"" for n in range(unpickle.MEMBERS)}
    (tmp_path / "m.pt").write_bytes(archive(**members))
    with pytest.raises(
        ValueError, match=r"m\.pt.*has 30,001 members; a checkpoint has at most 30,000"
    ):
        weights.read(tmp_path / "m.pt")


@pytest.mark.parametrize("new", [True, False])
def test_each_storage_is_read_once_however_many_views_it_has(tmp_path, new, monkeypatch):
    flat = torch.arange(100_000.0)
    state = formats.build_state()
    views = {f"visual.x{n}": flat[n : n + 1] for n in range(8000)}
    path = tmp_path / "m.pt"
    torch.save({**state, **views}, path, _use_new_zipfile_serialization=new)
    reads = []
    real = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: reads.append(1) or real(*a, **k))
    found = weights.read(path).visual
    assert torch.equal(found["visual.x7999"], flat[7999:8000])
    assert len(reads) == len(state) + 1
    torch.save({**state, **{f"visual.x{n}": flat[:1] for n in range(10_000)}}, path)
    with pytest.raises(ValueError, match="more than 10,000 tensors"):
        weights.read(path)


def ordered(key: bytes, value: bytes, **methods: str) -> bytes:
    """An OrderedDict of one entry, of which BUILD replaces methods."""
    made = b"ccollections\nOrderedDict\n)R" + key + value + b"s"
    named = [b"X" + struct.pack("<I", len(n)) + n.encode() + m.encode() for n, m in methods.items()]
    return made + b"}" + b"".join(one + b"s" for one in named) + b"b"


SET = "cbuiltins\nset\n"
DOUBLED = b"]q\xf0" + b"0](h\xf0h\xf0eq\xf0" * 30


@pytest.mark.parametrize(
    "methods", [{}, {"keys": SET, "values": SET}, {"__len__": SET}, {"__dict__": SET}]
)
def test_an_ordered_dict_hides_nothing(tmp_path, methods):
    path = tmp_path / "step.pt"
    path.write_bytes(b"\x80\x02" + ordered(b"K\1", DOUBLED, **methods) + b".")
    content, _ = unpickle.read(path)
    assert type(content) is dict
    with pytest.raises(ValueError, match="more than 1,000,000 entries, or more than 20 levels"):
        unpickle.require_data(content)


@pytest.mark.parametrize("name", ["get", "items", "keys", "__getitem__", "__class__"])
def test_a_state_dict_keeps_its_methods(tmp_path, name):
    path = tmp_path / "m.pt"
    own = ordered(b"X\1\0\0\0x", b"N", **{name: "ctorch._utils\n_rebuild_tensor_v2\n"})
    path.write_bytes(b"\x80\x02" + own + b".")
    with pytest.raises(ValueError, match=r"m\.pt has no CLIP image tower"):
        weights.read(path)


NOT_BUILT = {
    "a list": b"]",
    "a set": b"\x8f",
    "a text": b"X\1\0\0\0a",
    "a class": b"ctorch.nn\nLinear\n",
    "a type": b"ctorch\nFloatStorage\n",
    "a function": SET.encode(),
    "a tuple": b")",
}


@pytest.mark.parametrize("made", NOT_BUILT.values(), ids=NOT_BUILT.keys())
def test_a_pickle_sets_attributes_of_stand_ins_alone(tmp_path, made):
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x04" + made + b"}X\1\0\0\0aK\1sb.")
    with pytest.raises(ValueError, match="damaged or truncated: a pickle sets attributes of a "):
        unpickle.read(path)


def test_a_pickle_cannot_change_what_was_checked(tmp_path):
    """BUILD sets attributes: on a storage, its size would bypass the comparison."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ"
    for state in (b"}X\6\0\0\0nbytesK\0s", b"N}X\6\0\0\0nbytesK\0s\x86"):
        program = b"\x80\x02" + storage + state + b"b."
        (tmp_path / "m.pt").write_bytes(archive(**{"data.pkl": program}))
        with pytest.raises(ValueError, match=r"m\.pt is damaged"):
            weights.read(tmp_path / "m.pt")


def costs_of(read: Callable[[], object]) -> tuple[str, float, int]:
    """Message, seconds and bytes of a refusal, in a separate process limited to 2 GB more."""
    here, there = os.pipe()
    if (pid := os.fork()) == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        try:
            message = repr(read())
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        took = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(there, json.dumps([message[:1000], took, peak * 1024]).encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as stream:
        found = json.loads(stream.read() or b'["it was killed", 0, 0]')
    os.waitpid(pid, 0)
    return found


def test_no_small_file_takes_much(tmp_path, good):
    path = tmp_path / "m.safetensors"
    document, content = parts(good)
    tower(vision={"layers": 128, "width": 4096, "mlp_ratio": 16.0}, embed_dim=4096)(document)
    path.write_bytes(joined(document, content))
    name = folder_with(tmp_path / "hub", vision(layers=128, width=4096, mlp_ratio=16))
    other = folder_with(tmp_path / "text", text(vocab_size=2**21, width=4096, layers=128))
    (tmp_path / "m.pt").write_bytes(b"\x80\x04" + b"\x8f" * 999_000)  # sets
    reads = [
        lambda: load_state(path),
        lambda: weights.read(tmp_path / "m.pt"),
        *(lambda n=n: load.load_clip(ModelConfig(clip=n, pretrained="")) for n in (name, other)),
    ]
    for read in reads:
        message, seconds, size = costs_of(read)
        assert message.startswith("ValueError: "), message
        assert seconds < 20
        assert size < 5e8


# Anything else


@given(st.data())
def test_a_mutated_file_is_read_or_one_line(tmp_path_factory, good, data):
    path = tmp_path_factory.mktemp("mutated") / "m.safetensors"
    changed = bytearray(good[: int.from_bytes(good[:8], "little") + 200])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(bytes(changed) + good[len(changed) :])
    refused_or_read(lambda: load_state(path))
    refused_or_read(lambda: weights.read(path))


OPCODES = [bytes([code]) for code in unpickle._ACTIONS] + [
    b"ctorch.nn\nX\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"ccollections\nOrderedDict\n",
    b"c__builtin__\nset\n",
    b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x40tQ",
    b"X\5\0\0\0items",
    b"K\1",
    b"h\0",
    b"q\0",
    b"K\0K\x40\x85K\1\x85",
]


@given(st.lists(st.sampled_from(OPCODES), max_size=40), st.booleans())
def test_any_pickle_is_read_or_one_line(tmp_path_factory, codes, archived):
    path = tmp_path_factory.mktemp("pickle") / "m.pt"
    program = b"\x80\x02" + b"".join(codes) + b"."
    members = {"data.pkl": program, "data/0": bytes(256)}
    path.write_bytes(bytes(archive(**members)) if archived else program)
    refused_or_read(lambda: weights.read(path))


@pytest.fixture(scope="module")
def saved() -> tuple[bytes, ...]:
    made = []
    for new in (True, False):
        stream = io.BytesIO()
        torch.save(formats.build_state(), stream, _use_new_zipfile_serialization=new)
        made.append(stream.getvalue())
    return tuple(made)


@given(st.data())
def test_a_mutated_torch_file_is_read_or_one_line(tmp_path_factory, saved, data):
    path = tmp_path_factory.mktemp("torch") / "m.pt"
    changed = bytearray(data.draw(st.sampled_from(saved)))
    # positions of the pickle and of the list of members
    ends = st.integers(0, 3000) | st.integers(len(changed) - 3000, len(changed) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(ends)
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(changed)
    refused_or_read(lambda: weights.read(path))


def refused_or_read(read: Callable[[], object]) -> None:
    line = ""
    try:
        read()
    except (ValueError, OSError) as error:
        line = str(error)
    assert len(line) < 2000
    assert line.isprintable(), line
