"""Third-party weights: formats are detected, read without executing code, matched to a model."""

import dataclasses
import io
import json
import os
import pickle
import sys
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rft.clip import hub, load, unpickle, weights
from rft.clip.classifier import load_state, save_classifier
from rft.config import ModelConfig
from tests import formats
from tests.conftest import build_model
from tests.formats import known_models  # noqa: F401


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return formats.build_state()


@pytest.fixture(scope="module")
def made(tmp_path_factory, state) -> Path:
    """One file in each format."""
    folder = tmp_path_factory.mktemp("formats")
    formats.write_openai(folder / "openai.pt")
    formats.write_open_clip_checkpoint(folder / "epoch_3.pt")
    torch.save(formats.build_clip().state_dict(), folder / "open_clip_pytorch_model.bin")
    save_file(formats.build_clip().state_dict(), folder / "open_clip.safetensors")
    formats.write_hub_folder(folder / "hub")
    formats.write_released(folder / "ckpt-best.pt", state)
    formats.write_model_soups(folder / "model_0.pt", state)
    formats.write_wise_ft(folder / "checkpoint_10.pt", state)
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "format", "has_head", "has_text"),
    [
        ("epoch_3.pt", "open_clip", False, True),
        ("open_clip_pytorch_model.bin", "open_clip", False, True),
        ("open_clip.safetensors", "open_clip", False, True),
        ("hub", "open_clip", False, True),
        ("ckpt-best.pt", "released", True, False),
        ("model_0.pt", "model-soups", True, False),
        ("checkpoint_10.pt", "wise-ft", True, False),
        ("old.pt", "open_clip", True, False),
    ],
)
def test_every_format_gives_the_same_weights(made, state, name, format, has_head, has_text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = weights.read(made / name)
    head = {k: v for k, v in state.items() if k.startswith("head.")}
    assert found.format == format
    assert same({**found.visual, **head}, state)
    assert same(found.head, head if has_head else {})
    text = formats.build_clip().state_dict().items()
    text = {k: v for k, v in text if not k.startswith("visual.")}
    assert same(found.text, text if has_text else {})
    assert found.geometry == weights.Geometry(width=64, patch=4, layers=2, grid=4, embed_dim=16)


def test_openai_archive_is_what_torch_jit_reads_from_it(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = weights.read(made / "openai.pt")
        warnings.simplefilter("ignore")
        scripted = torch.jit.load(made / "openai.pt").state_dict()
    assert {value.dtype for value in scripted.values()} > {torch.float16, torch.float32}
    dropped = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    expected = {k: v.float() for k, v in scripted.items() if k not in dropped}
    assert same({**found.visual, **found.text}, expected)
    assert (found.format, found.quick_gelu, found.head) == ("openai", True, {})


def test_our_own_file(tmp_path):
    model = build_model()
    save_classifier(str(tmp_path / "m.safetensors"), model, {"recipe": "test", "step": "3"}, None)
    found = weights.read(tmp_path / "m.safetensors")
    assert same({**found.visual, **found.head}, model.state_dict())
    assert found.architecture == model.architecture


def test_wrappers_of_a_module_are_not_part_of_a_name(tmp_path, state):
    for prefix in ("", "module.", "module._orig_mod.", "_orig_mod.module."):
        torch.save({f"{prefix}{k}": v for k, v in state.items()}, tmp_path / "m.pt")
        found = weights.read(tmp_path / "m.pt")
        assert same({**found.visual, **found.head}, state)


def test_a_view_of_a_storage_and_a_bfloat16_file(tmp_path, state):
    whole = torch.arange(2 * 16.0 * 6).view(16, 12)
    state = {**state, "head.weight": whole[2:12:3, ::2].T[:4, :1].expand(4, 16)}
    torch.save({k: v.bfloat16() if "ln" in k else v for k, v in state.items()}, tmp_path / "m.pt")
    found = weights.read(tmp_path / "m.pt")
    assert torch.equal(found.head["head.weight"], state["head.weight"])
    assert all(value.dtype == torch.float32 for value in found.visual.values())


def test_an_empty_tensor_keeps_its_type(tmp_path):
    torch.save({"x": torch.empty(0, dtype=torch.bfloat16)}, tmp_path / "m.pt")
    content, _ = unpickle.read(tmp_path / "m.pt")
    assert unpickle.load_tensors(content, 1)["x"].dtype == torch.bfloat16


def test_a_head_without_bias_has_a_zero_one(tmp_path, state):
    torch.save({k: v for k, v in state.items() if k != "head.bias"}, tmp_path / "m.pt")
    assert torch.equal(weights.read(tmp_path / "m.pt").head["head.bias"], torch.zeros(4))


FILES = [
    "openai.pt",
    "epoch_3.pt",
    "open_clip.safetensors",
    "ckpt-best.pt",
    "checkpoint_10.pt",
    "old.pt",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0005, 0.5, 0.999])
def test_a_truncated_file_is_one_clear_error(made, tmp_path, name, share):
    data = (made / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=f"{name} is damaged or truncated"):
        weights.read(path)


@pytest.mark.parametrize("name", ["openai.pt", "epoch_3.pt", "ckpt-best.pt"])
def test_a_flipped_bit_in_an_archive_is_found(made, tmp_path, name):
    data = bytearray((made / name).read_bytes())
    weight = weights.read(made / name).visual["visual.conv1.weight"]
    stored = weight.half() if name == "openai.pt" else weight
    data[data.index(stored.numpy().tobytes()) + 5] ^= 8
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}.*damaged tensor.*CRC"):
        weights.read(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has an unknown format"),
        (b"a text file, not weights", "has an unknown format"),
        (b"\x89PNG\r\n\x1a\n0000", "has an unknown format"),
        (b"PK\x05\x06" + bytes(18), "a zip file, but not one that torch wrote"),
        (pickle.dumps({"a": 1}), "has no CLIP image tower"),
        (pickle.dumps([1, 2]), "has no CLIP image tower"),
    ],
)
def test_a_file_that_is_no_weights(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        weights.read(tmp_path / "file")


def test_other_things_that_are_no_weights(tmp_path, state):
    with pytest.raises(ValueError, match="no weights at"):
        weights.read(tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"a folder without open_clip_config\.json"):
        weights.read(tmp_path / "folder")
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"no CLIP image tower .*layer\.weight"):
        weights.read(tmp_path / "m.pt")
    torch.save({"visual.conv1.weight": torch.ones(2, 2, 2, 2)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="no image tower that is a CLIP vision transformer"):
        weights.read(tmp_path / "m.pt")
    released = formats.renamed(state, {"visual.": "backbone.", "head.": "classifier."})
    torch.save({"model": {**released, "extra.weight": torch.ones(1)}}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"a tensor 'extra\.weight' that its format does not have"):
        weights.read(tmp_path / "m.pt")
    torch.save({**state, "head.weight": torch.ones(4, 7)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"head of shape \(4, 7\), but its tower has 16 features"):
        weights.read(tmp_path / "m.pt")


def test_a_head_on_features_that_are_not_normalised_is_refused(tmp_path, state):
    formats.write_wise_ft(tmp_path / "m.pt", state, normalize=False)
    with pytest.raises(ValueError, match="reads un-normalised features"):
        weights.read(tmp_path / "m.pt")


# Attacks


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path, call=os.system) -> None:
        self._marker, self._call = marker, call

    def __reduce__(self):
        command = f"touch {self._marker}"
        if self._call is os.system:
            return os.system, (command,)
        return self._call, (f"__import__('os').system({command!r})",)


class Reduced:
    """Pickled as a call of anything."""

    def __init__(self, call, *arguments) -> None:
        self._made = call, arguments

    def __reduce__(self):
        return self._made


def torch_bytes(content: object, *, archive: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=archive)
    return stream.getvalue()


@pytest.mark.parametrize("call", [os.system, eval, exec])
@pytest.mark.parametrize(
    "hide",
    [
        pickle.dumps,
        lambda evil: pickle.dumps(evil, protocol=2),
        lambda evil: pickle.dumps({"state_dict": {"visual.conv1.weight": evil}}),
        lambda evil: torch_bytes({"model": {}, "optimizer": evil}, archive=True),
        lambda evil: torch_bytes({"model": {}, "optimizer": evil}, archive=False),
        lambda evil: pickle.dumps(
            Reduced(torch.storage._load_from_bytes, pickle.dumps(evil, protocol=2))
        ),
        lambda evil: pickle.dumps(
            Reduced(torch.storage._load_from_bytes, torch_bytes(evil, archive=False))
        ),
    ],
)
def test_an_attack_runs_nothing_and_is_refused_by_name(tmp_path, hide, call):
    marker = tmp_path / "was-here"
    path = tmp_path / "model.pt"
    path.write_bytes(hide(Evil(marker, call)))
    name = {os.system: r"posix\.system", eval: r"builtins\.eval", exec: r"builtins\.exec"}[call]
    with pytest.raises(ValueError, match=rf"model\.pt is refused: it names {name}, which"):
        weights.read(path)
    assert not marker.exists()


def test_the_attack_is_a_real_one(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "was-here")))  # noqa: S301
    assert (tmp_path / "was-here").exists()


def test_what_torch_says_of_a_nested_pickle_is_not_passed_on(tmp_path):
    # its advice is to load without the restriction
    path = tmp_path / "m.pt"
    nested = pickle.dumps(Evil(tmp_path / "was-here"), protocol=4)
    path.write_bytes(pickle.dumps(Reduced(torch.storage._load_from_bytes, nested)))
    with pytest.raises(ValueError, match=r"m\.pt is (refused|damaged)") as refused:
        weights.read(path)
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "was-here").exists()


def test_names_that_are_stood_in_for_do_nothing(tmp_path):
    # each is harmless here, but not with the real object behind the name
    marker = tmp_path / "was-here"
    getter = Reduced(getattr, nn.Module, "__init__")
    calls = [
        Reduced(getattr, nn.Linear, "__doc__"),
        Reduced(torch.nn.Module),
        Reduced(torch.optim.AdamW, getter),
    ]
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(calls))
    content, _ = unpickle.read(path)
    assert all(isinstance(made, unpickle.StandIn) for made in content)
    assert [type(made).__mro__[1] for made in content] == [unpickle.StandIn] * 3
    # the stand-in for getattr cannot be called in turn
    chain = b"\x80\x02c__builtin__\ngetattr\nctorch.nn\nModule\nX\x06\x00\x00\x00evil_x\x86R"
    path.write_bytes(
        chain + b"X" + bytes([len(str(marker)), 0, 0, 0]) + str(marker).encode() + b"\x85R."
    )
    with pytest.raises(ValueError, match="damaged"):
        weights.read(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "attributes", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x08\x00\x00\x00__code__Ns\x86"]
)
def test_a_pickle_cannot_change_the_unpickler(tmp_path, attributes):
    # BUILD sets attributes of any object on the stack: here of that of _rebuild_parameter
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_parameter\n" + attributes + b"b.")
    with pytest.raises(ValueError, match="damaged"):
        unpickle.read(path)
    function = unpickle.Unpickler(io.BytesIO()).find_class("torch._utils", "_rebuild_parameter")
    assert vars(function) == {}
    assert function.__code__ is not None


class Talks(nn.Module):
    """Scripted code that runs while torch.jit.load reads its state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        print("code of the archive runs")
        self.weight = state[0]
        self.training = state[1]


@pytest.mark.filterwarnings("ignore")
def test_code_in_a_torchscript_archive_does_not_run(tmp_path, capfd):
    torch.jit.save(torch.jit.script(Talks()), tmp_path / "m.pt")
    torch.jit.load(tmp_path / "m.pt")
    assert "code of the archive runs" in capfd.readouterr().out
    with pytest.raises(ValueError, match="no CLIP image tower"):
        weights.read(tmp_path / "m.pt")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "tensor",
    [
        {"size": (4, 1 << 40)},
        {"offset": -1},
        {"offset": 1 << 62},
        {"stride": (1, -1)},
        {"length": 100},
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tensor):
    flat = torch.arange(64.0)

    def read_storage(_: str) -> bytes:
        return flat.numpy().tobytes()

    reader = unpickle.Unpickler(io.BytesIO(), read_storage)
    length = tensor.pop("length", 64)
    storage = reader.persistent_load(("storage", torch.float32, "0", "cpu", length))
    made = {"offset": 0, "size": (4, 4), "stride": (4, 1)} | tensor
    with pytest.raises(ValueError, match="damaged tensor"):
        unpickle.load_tensors({"x": unpickle._rebuild_tensor(storage, *made.values())}, 1000)


# Tiny files that would cost much memory or time


def peak_of_reading(path: Path) -> int:
    """Bytes of Python's memory used to refuse a file."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"m\.pt"):
            weights.read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\x00\x00\x00\x01.",  # None is object number 2 ** 24
        b"\x80\x05\x96\x00\x00\x00\x01\x00\x00\x00\x00.",  # 2 ** 24 bytes follow
    ],
)
def test_a_pickle_takes_no_more_memory_than_it_has_bytes(tmp_path, data):
    (tmp_path / "m.pt").write_bytes(data)
    assert peak_of_reading(tmp_path / "m.pt") < 1_000_000


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_are_not_larger_than_what_is_stored(tmp_path, state, archive):
    path = tmp_path / "m.pt"
    more = {"visual.x": torch.ones(1).half().expand(1000, 1000)}
    path.write_bytes(torch_bytes({**state, **more}, archive=archive))
    with pytest.raises(ValueError, match=r"m\.pt: damaged tensor: it is larger than its storage"):
        weights.read(path)
    more = {f"visual.x{n}": state["visual.proj"] for n in range(1000)}
    path.write_bytes(torch_bytes({**state, **more}, archive=archive))
    with pytest.raises(ValueError, match=r"m\.pt: damaged: its tensors are larger than the file"):
        weights.read(path)


def rewrite(path: Path, *, compress: str = "", without: str = "") -> None:
    """Rewrite an archive with one entry compressed, or without it."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            kind = zipfile.ZIP_DEFLATED if compress and name.endswith(compress) else 0
            if not (without and name.endswith(without)):
                new.writestr(name, data, compress_type=kind)


@pytest.mark.parametrize("entry", ["/data.pkl", "/data/0", "/byteorder"])
def test_a_compressed_archive_is_refused(made, tmp_path, entry):
    path = tmp_path / "m.pt"
    path.write_bytes((made / "ckpt-best.pt").read_bytes())
    rewrite(path, compress=entry)
    with pytest.raises(ValueError, match=f"m.pt.*{entry} is compressed"):
        weights.read(path)


def test_an_archive_inside_a_pickle_is_refused(tmp_path, state):
    nested = torch_bytes(torch.ones(1), archive=True)
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Reduced(torch.storage._load_from_bytes, nested)))
    with pytest.raises(ValueError, match=r"m\.pt is damaged or truncated"):
        weights.read(tmp_path / "m.pt")


def test_an_old_file_is_not_what_torch_would_make_of_it(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(torch_bytes(Reduced(bytearray, 1 << 40), archive=False))
    with pytest.raises(ValueError, match=r"m\.pt is refused: it names builtins\.bytearray"):
        weights.read(path)
    # a storage that reads one twice, which reads one twice, ...
    nested = Reduced(torch.storage._load_from_bytes, pickle.dumps(1))
    path.write_bytes(pickle.dumps(Reduced(torch.storage._load_from_bytes, pickle.dumps(nested))))
    with pytest.raises(ValueError, match=r"refused.*_load_from_bytes for a storage"):
        weights.read(path)


def test_modules_that_hold_the_next_one_twice_are_read_once(tmp_path):
    module = nn.Linear(2, 1)
    for _ in range(40):
        module = nn.Sequential(module, module)
    (tmp_path / "m.pt").write_bytes(pickle.dumps(module))
    content, _ = unpickle.read(tmp_path / "m.pt")
    names = [name for name, _ in unpickle.named_tensors(content)]
    assert names == ["0." * 40 + "weight", "0." * 40 + "bias"]


def test_a_buffer_that_is_not_saved_is_not_a_weight(tmp_path):
    module = nn.Linear(2, 1)
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    for protocol in (3, 4):  # the code points where a set is a call, and where it is not
        (tmp_path / "m.pt").write_bytes(pickle.dumps(module, protocol=protocol))
        content, _ = unpickle.read(tmp_path / "m.pt")
        assert [name for name, _ in unpickle.named_tensors(content)] == ["weight", "bias"]


def test_a_container_of_itself_twice_is_neither_printed_nor_hashed(tmp_path):
    path = tmp_path / "m.pt"
    doubled = b")" + b"2\x86" * 60  # a tuple of the tuple before, twice
    path.write_bytes(b"\x80\x02(" + doubled + b"NK\x00K\x00K\x00tQ.")  # as kind of a storage
    with pytest.raises(ValueError, match=r"m\.pt is refused: it names an entry of the"):
        weights.read(path)
    path.write_bytes(b"\x80\x02}" + doubled + b"Ns.")  # as key of a dict
    with pytest.raises(ValueError, match=r"m\.pt is damaged or truncated: a key of type tuple"):
        weights.read(path)


# Damage


def test_an_archive_without_one_of_its_storages(made, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes((made / "ckpt-best.pt").read_bytes())
    rewrite(path, without="/data/0")
    with pytest.raises(ValueError, match=r"m\.pt: damaged tensor: .*data/0"):
        weights.read(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"visual.conv1.weight": torch.tensor(1.0)},
        {"visual.positional_embedding": torch.ones(0, 64)},
        {"visual.positional_embedding": torch.tensor(1.0)},
        {"visual.proj": torch.tensor(1.0)},
    ],
)
def test_shapes_that_no_tower_has(tmp_path, state, damage):
    torch.save({**state, **damage}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt: it has no image tower that is a CLIP vision"):
        weights.read(tmp_path / "m.pt")


ARCHITECTURE = build_model().architecture


def changed(**fields: object) -> str:
    document = {**json.loads(ARCHITECTURE.to_json()), **fields}
    return json.dumps({"step": "0", "architecture": json.dumps(document)})


@pytest.mark.parametrize(
    "header",
    [
        "3",
        "{}",
        "[]",
        "{",
        "[" * 100_000,
        '{"architecture": "{"}',
        '{"architecture": "[]"}',
        '{"architecture": 3}',
        changed(clip=3),
        changed(mean=None),
        changed(mean=[0.5]),
        changed(vision_cfg={}),
        changed(vision_cfg=[]),
        changed(vision_cfg={"image_size": 16, "unknown": 1}),
        changed(unknown=1),
    ],
)
def test_a_header_that_is_not_ours(tmp_path, state, header):
    path = tmp_path / "m.safetensors"
    save_file(state, path, metadata={"rft": header})
    for read in (weights.read, load_state):
        with pytest.raises(ValueError, match=r"header.*m\.safetensors|m\.safetensors.*header") as e:
            read(path)
        assert str(e.value).isprintable()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("card.json", "{"),
        ("card.json", "[]"),
        ("card.json", '{"format": "open-clip", "architecture": {}}'),
        ("card.json", '{"format": "open-clip", "architecture": 3}'),
        ("open_clip_config.json", "{"),
        ("open_clip_config.json", "[]"),
        ("open_clip_config.json", "{}"),
        ("open_clip_config.json", '{"model_cfg": {"vision_cfg": {}, "text_cfg": 3}}'),
    ],
)
def test_documents_beside_weights_that_are_none(tmp_path, name, text):
    formats.write_hub_folder(tmp_path / "hub")
    (tmp_path / "hub" / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        weights.read(tmp_path / "hub")


def test_architectures_differ_in_all_but_the_name():
    other = dataclasses.replace(ARCHITECTURE, clip="elsewhere")
    assert ARCHITECTURE.difference(other) == []
    wide = dataclasses.replace(other, embed_dim=13)
    assert ARCHITECTURE.difference(wide) == ["embed_dim: 12 -> 13"]


# Requests to other libraries that a folder or a header can cause


def hub_folder(folder: Path, *, text: dict | None = None, **parts: object) -> Path:
    """A folder in open_clip's hub layout with an additional field in its configuration."""
    formats.write_hub_folder(folder)
    model_cfg = {**formats.CONFIG, "text_cfg": {**formats.CONFIG["text_cfg"], **(text or {})}}
    document = {"model_cfg": {**model_cfg, **parts}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {"bpe_path": "/etc/passwd"}, 3])
def test_a_folder_cannot_make_a_tokenizer_run_its_code(tmp_path, monkeypatch, options):
    asked = []
    tokenizer = types.SimpleNamespace(from_pretrained=lambda *a, **k: asked.append((a, k)))
    stub = types.SimpleNamespace(AutoTokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "transformers", stub)
    text = {"hf_tokenizer_name": "some/one", "tokenizer_kwargs": {"clean": "lower"}}
    good = hub_folder(tmp_path / "good", text=text)
    load.load_clip(ModelConfig(clip=f"local-dir:{good}", pretrained=""))
    assert len(asked) == 1
    folder = hub_folder(tmp_path / "evil", text={**text, "tokenizer_kwargs": options})
    monkeypatch.setattr(hub, "fetch", lambda _, name="open_clip_model.safetensors": folder / name)
    for clip in (f"local-dir:{folder}", "hf-hub:some/one"):
        with pytest.raises(ValueError, match=r"open_clip_config\.json: .*tokenizer_kwargs"):
            load.load_clip(ModelConfig(clip=clip, pretrained=""))
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["hf-hub:some/one", ""])
def test_no_header_and_no_folder_makes_timm_download(tmp_path, state, monkeypatch, name):
    asked = []
    monkeypatch.setattr("timm.create_model", lambda *a, **k: asked.append((a, k)))
    vision = {"image_size": 16, "timm_model_name": name, "timm_model_pretrained": True}
    path = tmp_path / "m.safetensors"
    save_file(state, path, metadata={"rft": changed(vision_cfg=vision)})
    for read in (weights.read, load_state):
        with pytest.raises(ValueError, match=r"m\.safetensors.*its image tower is built by timm"):
            read(path)
    folder = hub_folder(tmp_path / "hub", vision_cfg=vision)
    with pytest.raises(
        ValueError, match="its image tower is built by timm; rft needs open_clip's own"
    ):
        load.load_clip(ModelConfig(clip=f"local-dir:{folder}", pretrained=""))
    assert asked == []


def test_a_damaged_folder_is_one_clear_error(tmp_path):
    folder = hub_folder(tmp_path / "hub", unknown=1)
    with pytest.raises(ValueError, match=r"_config\.json: model_cfg\.unknown is an unknown field"):
        load.load_clip(ModelConfig(clip=f"local-dir:{folder}", pretrained=""))
    folder = hub_folder(tmp_path / "other")
    (folder / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors has an unknown format"):
        load.load_clip(ModelConfig(clip=f"local-dir:{folder}", pretrained=""))


def test_the_text_tower_of_a_file_is_not_downloaded_too(known_models, made, monkeypatch):  # noqa: F811
    text_cfg = {**formats.CONFIG["text_cfg"], "hf_model_name": "some/one"}
    config = {**formats.CONFIG, "text_cfg": text_cfg}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "custom", config)
    asked = []

    def build(text_cfg: dict, **parts: object) -> open_clip.CustomTextCLIP:
        asked.append(text_cfg)
        own = {k: v for k, v in text_cfg.items() if not k.startswith("hf_")}
        return open_clip.CustomTextCLIP(text_cfg=own, **parts)

    monkeypatch.setattr(load, "CustomTextCLIP", build)
    load_file_as(made / "epoch_3.pt", "custom")
    assert asked == 2 * [{**text_cfg, "hf_model_pretrained": False}]  # once without memory


# A file as --model.pretrained


def load_file_as(path: Path, clip: str = formats.NAME) -> load.PretrainedClip:
    return load.load_clip(ModelConfig(clip=clip, pretrained=str(path)))


@pytest.mark.parametrize("name", ["epoch_3.pt", "open_clip_pytorch_model.bin", "hub"])
def test_load_clip_takes_files_of_open_clip(known_models, made, name):  # noqa: F811
    found = load_file_as(made / name)
    assert same(found.model.state_dict(), formats.build_clip().state_dict())
    assert not found.model.training
    assert found.architecture == load.architecture_of(formats.NAME)
    assert found.tokenize(["a cat"]).shape == (1, 12)


def test_load_clip_takes_openai_archives_and_computes_what_they_do(known_models, made):  # noqa: F811
    found = load_file_as(made / "openai.pt")
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = found.tokenize(["a cat", "two dogs", "a red square"])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        scripted = torch.jit.load(made / "openai.pt").float()
        state = {k: v for k, v in scripted.state_dict().items() if k != "attn_mask"}
        theirs = open_clip.model.build_model_from_openai_state_dict(state).float()
        assert found.model.context_length == 12
        torch.testing.assert_close(found.model.encode_image(images), theirs.encode_image(images))
        torch.testing.assert_close(found.model.encode_text(tokens), theirs.encode_text(tokens))


def test_openai_weights_in_a_gelu_model_are_an_error(known_models, made):  # noqa: F811
    with pytest.raises(ValueError, match=f"were trained as {formats.NAME}; use that model"):
        load_file_as(made / "openai.pt", formats.GELU_NAME)


def test_another_geometry_is_one_error_that_names_the_right_model(known_models, made):  # noqa: F811
    with pytest.raises(ValueError, match="has a different image tower") as refused:
        load_file_as(made / "openai.pt", formats.OTHER_NAME)
    line = str(refused.value)
    assert "4 x 4 patches of 4 px" in line
    assert "2 x 2 patches of 8 px" in line
    assert line.endswith(f"models of this shape: {formats.NAME}")
    with pytest.raises(ValueError, match=f"shape: .*{formats.GELU_NAME}(,|$)"):
        load_file_as(made / "epoch_3.pt", "ViT-B-32")


def test_heads_of_another_width_cannot_be_openais(known_models, made, monkeypatch):  # noqa: F811
    narrow = {**formats.CONFIG, "vision_cfg": {**formats.CONFIG["vision_cfg"], "head_width": 16}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "narrow", narrow)
    with pytest.raises(ValueError, match="which have head_width 64; narrow has 16"):
        load_file_as(made / "openai.pt", "narrow")


def test_weights_without_a_text_tower_are_no_start(known_models, made):  # noqa: F811
    for name in ("ckpt-best.pt", "model_0.pt", "checkpoint_10.pt"):
        with pytest.raises(ValueError, match="has no text tower for a zero-shot head"):
            load_file_as(made / name)


def test_a_text_tower_of_another_shape(known_models, made, tmp_path):  # noqa: F811
    state = load_file(made / "open_clip.safetensors")
    save_file({**state, "positional_embedding": torch.ones(9, 64)}, tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"positional_embedding of shape \(9, 64\) instead of \(12"
    ):
        load_file_as(tmp_path / "m.safetensors")
    del state["ln_final.bias"]
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"it has no 'ln_final\.bias'"):
        load_file_as(tmp_path / "m.safetensors")


def test_a_custom_text_model_takes_plain_names(known_models, made, monkeypatch):  # noqa: F811
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "custom", {**formats.CONFIG, "custom_text": True}
    )
    found = load_file_as(made / "epoch_3.pt", "custom")
    assert torch.equal(
        found.model.text.token_embedding.weight, formats.build_clip().token_embedding.weight
    )


def test_a_hub_folder_that_does_not_fit_its_own_configuration(made, tmp_path):
    for path in (made / "hub").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "open_clip_config.json"
    document = json.loads(path.read_text())
    document["model_cfg"]["vision_cfg"]["layers"] = 3
    path.write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"safetensors has a different image tower .* 2 layers.*3 layer"
    ):
        load.load_clip(ModelConfig(clip=f"local-dir:{tmp_path}", pretrained=""))
