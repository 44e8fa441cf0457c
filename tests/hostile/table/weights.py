"""Weights: wrong headers, tensors that do not fit, pickles that run code (C7, C8, C9)."""

import dataclasses
import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save

from tests.hostile.rows import Answer, Row
from tests.hostile.world import DRY, EVALUATE, EXPORT, HUB, IMPORT, REPORT, SOUP, TRAIN, WISE, Place

BEST = "run/checkpoints/best.safetensors"
LAST = "zero/checkpoints/last.safetensors"
ALONE = ("rft.evaluate", "alone.safetensors", *EVALUATE[2:])


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(data: bytes, document: object) -> bytes:
    """Weights with a different header before the same tensors."""
    body = data[8 + int.from_bytes(data[:8], "little") :]
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + body


def entries(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """Change the metadata of a weights file without a run folder."""

    def damage(place: Place) -> None:
        data = (place / LAST).read_bytes()
        document = header_of(data)
        own = json.loads(document["__metadata__"]["rft"])
        found = change(own)
        document["__metadata__"]["rft"] = found if isinstance(found, str) else json.dumps(own)
        (place / "alone.safetensors").write_bytes(with_header(data, document))

    return damage


def tower(**values: object) -> Callable[[dict[str, Any]], None]:
    """Change fields of the architecture's image tower."""

    def change(own: dict[str, Any]) -> None:
        architecture = json.loads(own["architecture"])
        architecture["vision_cfg"].update(values)
        own["architecture"] = json.dumps(architecture)

    return change


def architecture(**values: object) -> Callable[[dict[str, Any]], None]:
    def change(own: dict[str, Any]) -> None:
        own["architecture"] = json.dumps({**json.loads(own["architecture"]), **values})

    return change


def entry(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda own: own.update(values)


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Place], None]:
    """Change the tensors of a weights file without a run folder."""

    def damage(place: Place) -> None:
        data = (place / LAST).read_bytes()
        found = dict(load_file(place / LAST))
        change(found)
        metadata = header_of(data)["__metadata__"]
        (place / "alone.safetensors").write_bytes(save(found, metadata))

    return damage


def raw(make: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    """Change the bytes of a weights file without a run folder."""
    return lambda place: (place / "alone.safetensors").write_bytes(
        make((place / LAST).read_bytes())
    )


def row(
    what: str,
    damage: Callable[[Place], object],
    *says: str,
    words: Sequence[str] = ALONE,
    answer: Answer = "refused",
    slow: bool = True,
) -> Row:
    return Row(
        kind="weights", what=what, words=words, damage=damage, says=says, answer=answer, slow=slow
    )


def spare_tensors(found: dict[str, np.ndarray]) -> None:
    found.update({f"visual.x{n}": np.zeros(1, np.float32) for n in range(30_000)})


def claims(name: str, **values: object) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        document = header_of(data)
        document[name] = {**document[name], **values}
        return with_header(data, document)

    return make


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


class Touch:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("touch ran",)


class Import:
    """Imports a module of the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import importlib

        return importlib.import_module, ("trap",)


class Evaluate:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("open('ran', 'w')",)


def pickled(value: object) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        (place / "trap.py").write_text("open('ran', 'w')\n")
        (place / "model.pt").write_bytes(pickle.dumps(value))

    return damage


def stream(data: bytes) -> Callable[[Place], object]:
    return lambda place: (place / "model.pt").write_bytes(data)


def state_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """Change the state dict of third-party code."""

    def damage(place: Place) -> None:
        state = torch.load(place / "model.pt", weights_only=True)
        change(state)
        torch.save(state, place / "model.pt")

    return damage


def directory(place: Place) -> None:
    """A zip of 276 MB with only a directory, for which zipfile needs three gigabytes."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *14 * (0,), 0, 0)
    size = 6_000_000 * len(entry)
    last = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 6_000_000, 6_000_000, size, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, size, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    (place / "model.pt").write_bytes(entry * 6_000_000 + last + locator + end)


def rezipped(
    change: Callable[[dict[str, bytes]], object], kind: int = zipfile.ZIP_STORED
) -> Callable[[Place], None]:
    """Change the entries of a torch archive."""

    def damage(place: Place) -> None:
        with zipfile.ZipFile(place / "model.pt") as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        change(found)
        with zipfile.ZipFile(place / "model.pt", "w", kind) as archive:
            for name, data in found.items():
                archive.writestr(name, data)

    return damage


def memo_bomb() -> bytes:
    """A list that names the previous one ten times, thirty times over."""
    data = b"\x80\x02]q\x00"
    for level in range(30):
        data += b"](" + b"h%c" % level * 10 + b"eq%c" % (level + 1)
    return data + b"."


def numpy_objects(place: Place) -> None:
    array = np.array([Touch(), Touch()], dtype=object)
    buffer = io.BytesIO()
    np.savez(buffer, **{**place.columns(), "key": array})
    place.publish_index(buffer.getvalue())


def gallery_objects(place: Place) -> None:
    np.savez(place / "run/gallery.npz", class_names=np.array([Touch()], dtype=object))


def hub_file(name: str, content: str) -> Callable[[Place], object]:
    return lambda place: (place / "hub" / name).write_text(content)


def hub_options(**values: object) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        for folder in ("hub", "clip"):
            document = place.read(f"{folder}/open_clip_config.json")
            document["model_cfg"]["text_cfg"].update(values)
            place.write(f"{folder}/open_clip_config.json", document)
        (place / "clip/trap.py").write_text("open('ran', 'w')\n")

    return damage


def vision_options(**values: object) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        document = place.read("clip/open_clip_config.json")
        document["model_cfg"]["vision_cfg"].update(values)
        place.write("clip/open_clip_config.json", document)

    return damage


def headers() -> Iterator[Row]:
    name = "alone"
    sizes = {"layers": 10**9, "width": 10**9, "image_size": 10**9, "mlp_ratio": 1e9}
    for field, value in sizes.items():
        yield row(f"{field} of {value:.0e} (C7)", entries(tower(**{field: value})), name)
    for field in ("layers", "width", "patch_size", "image_size", "head_width"):
        yield row(f"{field} of zero (C8)", entries(tower(**{field: 0})), name)
        yield row(f"{field} of minus one (C8)", entries(tower(**{field: -1})), name)
        yield row(f"{field} that is a text (C8)", entries(tower(**{field: "24"})), name)
        yield row(f"{field} that is true (C8)", entries(tower(**{field: True})), name)
    for field, value in {
        "layers": [2, 2],
        "head_width": 7,
        "mlp_ratio": 0,
        "patch_size": 5,
        "patch_dropout": 2,
        "pool_type": "none",
        "attentional_pool": True,
        "timm_model_name": "resnet50",
        "act_kwargs": {"x": 1},
        "norm_kwargs": {"eps": "a"},
        "ls_init_value": "a",
        "surprise": 1,
    }.items():
        yield row(f"{field} is {value} (C8)", entries(tower(**{field: value})), name)
    for field, value in {
        "embed_dim": 10**9,
        "clip": 7,
        "mean": [1, 2],
        "std": [0.0, 0.0, 0.0],
        "quick_gelu": "yes",
        "vision_cfg": [],
        "surprise": 1,
    }.items():
        yield row(
            f"{field} of the architecture is {value} (C8)",
            entries(architecture(**{field: value})),
            name,
        )
    for infinite in ("mean", "std"):
        yield row(
            f"{infinite} is no number",
            entries(architecture(**{infinite: [float("nan")] * 3})),
            name,
        )
    for field, value in {
        "step": "many",
        "recipe": 7,
        "classes": {"names": "red"},
        "trained_on": "7",
        "architecture": "[",
    }.items():
        yield row(f"{field} is {value} (C8)", entries(entry(**{field: value})), name)
    yield row("a step without an end", entries(entry(step="9" * 5000)), name)
    yield row("a negative step", entries(entry(step="-1")), name)
    yield row("no step", entries(lambda own: own.pop("step")), name)
    yield row(
        "more classes than rows", entries(entry(classes={"ids": [], "names": ["a"] * 9})), name
    )
    yield row("its entries are deep (C8)", entries(lambda _: nested(10**4).decode()), name)
    yield row("its entries are a list", entries(lambda _: "[]"), name)
    yield row(
        "its classes are deep",
        entries(lambda _: '{"classes":' + nested(10**4).decode() + "}"),
        name,
    )
    yield row("its header is deep (C8)", raw(lambda data: with_header(data, nested(10**5))), name)
    yield row("its header is a list", raw(lambda data: with_header(data, [])), name)
    yield row("its header is no text", raw(lambda data: with_header(data, b"\xff" * 99)), name)
    yield row("its header has no end", raw(lambda data: struct.pack("<Q", 2**63) + data[8:]), name)
    yield row(
        "its header is larger than the file",
        raw(lambda data: struct.pack("<Q", 10**7) + data[8:]),
        name,
    )
    yield row(
        "its header is a hundred megabytes of spaces",
        raw(lambda data: with_header(data, b" " * 99_000_000 + b"{}")),
        name,
    )
    yield row("it is cut off", raw(lambda data: data[: len(data) // 2]), name)
    yield row("it is cut off in its header", raw(lambda data: data[:99]), name)
    yield row("it is empty", raw(lambda _: b""), name)
    yield row("it is a text", raw(lambda _: b"weights"), name)
    first = "visual.conv1.weight"
    yield row("a tensor reaches beyond the file", raw(claims(first, data_offsets=[0, 2**40])), name)
    yield row("a tensor ends before it begins", raw(claims(first, data_offsets=[96, 0])), name)
    yield row("a tensor has 2^60 numbers", raw(claims(first, shape=[2**30, 2**30])), name)
    yield row("a tensor of an unknown type", raw(claims(first, dtype="X9")), name)
    yield row("a tensor of negative size", raw(claims(first, shape=[-1])), name)


def contents() -> Iterator[Row]:
    name = "alone"
    head, conv = "head.weight", "visual.conv1.weight"
    yield row("30,000 tensors (C7)", tensors(spare_tensors), name)
    for tensor in (head, "head.bias", conv, "visual.proj", "visual.positional_embedding"):
        yield row(
            f"{tensor} is missing (C8)",
            tensors(lambda found, tensor=tensor: found.pop(tensor)),
            name,
            tensor.partition(".")[0],
        )
    yield row(
        "one tensor more (C8)",
        tensors(lambda found: found.update(surprise=np.zeros(3))),
        name,
        "surprise",
    )
    for tensor in (head, "head.bias", conv, "visual.ln_post.weight"):
        yield row(
            f"{tensor} is flat (C8)",
            tensors(
                lambda found, tensor=tensor: found.update({tensor: found[tensor].reshape(-1)[:1]})
            ),
            name,
            tensor.partition(".")[0],
        )
        yield row(
            f"{tensor} is nothing (C8)",
            tensors(
                lambda found, tensor=tensor: found.update({tensor: np.zeros((0,), np.float32)})
            ),
            name,
            tensor.partition(".")[0],
        )
        yield row(
            f"{tensor} is one number (C8)",
            tensors(lambda found, tensor=tensor: found.update({tensor: np.zeros((), np.float32)})),
            name,
            tensor.partition(".")[0],
        )
    for kind in (np.int64, np.bool_, np.uint8):
        yield row(
            f"{head} holds {kind.__name__}",
            tensors(lambda found, kind=kind: found.update({head: found[head].astype(kind)})),
            name,
            head,
        )
    for value in (np.nan, np.inf, -np.inf):
        yield row(
            f"a weight is {value} (C9)",
            tensors(lambda found, value=value: found[conv].__setitem__((0, 0, 0, 0), value)),
            "alone",
            conv,
        )
    yield row(
        "another head, exported",
        tensors(lambda found: found.pop(head)),
        name,
        "head",
        words=(*EXPORT[:2], "alone.safetensors", *EXPORT[3:]),
    )
    yield row(
        "another shape, merged",
        tensors(lambda found: found.update({conv: found[conv][:1]})),
        name,
        words=(*WISE[:3], "alone.safetensors", *WISE[4:]),
    )
    yield row(
        "a weight is nan, merged (C9)",
        tensors(lambda found: found[conv].fill(np.nan)),
        name,
        words=(*WISE[:3], "alone.safetensors", *WISE[4:]),
    )
    yield row(
        "a weight is nan, in a soup (C9)",
        tensors(lambda found: found[conv].fill(np.nan)),
        name,
        words=(*SOUP[:3], "alone.safetensors", *SOUP[4:]),
    )
    yield row(
        "a weight is nan, started from (C9)",
        tensors(lambda found: found[conv].fill(np.nan)),
        name,
        words=(*DRY, "--model.start", "alone.safetensors"),
    )
    yield row(
        "a tensor is missing, started from (C8)",
        tensors(lambda found: found.pop(conv)),
        name,
        words=(*DRY, "--model.start", "alone.safetensors"),
    )
    yield row("as it was written", tensors(lambda _: None), answer="accepted")


def others() -> Iterator[Row]:
    def other(what: str, damage: Callable[[Place], object], **options: Any) -> Row:
        return row(what, damage, r"model\.pt", words=IMPORT, **options)

    for kind in (Touch, Import, Evaluate):
        yield other(f"a pickle that calls {kind.__name__.lower()}", pickled(kind()))
        yield other(
            f"a state dict with one that calls {kind.__name__.lower()}",
            pickled({"visual.conv1.weight": kind()}),
        )
    yield other(
        "a pickle of protocol 0 that runs a command", stream(b"cos\nsystem\n(S'touch ran'\ntR.")
    )
    yield other(
        "a pickle of builtins",
        stream(b"\x80\x02cbuiltins\nexec\nX\x11\x00\x00\x00open('ran', 'w')()\x85R."),
    )
    yield other("a pickle that names itself without an end", stream(memo_bomb()))
    yield other(
        "a pickle of a long without an end",
        stream(b"\x80\x02\x8b\xff\xff\xff\x7f" + b"x" * 99 + b"."),
    )
    yield other("a pickle with a frame of exabytes", stream(b"\x80\x04\x95" + b"\xff" * 8 + b"."))
    yield other(
        "a pickle of 2^32 bytes that are not there",
        stream(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00."),
    )
    yield other(
        "a pickle of nested lists", stream(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")
    )
    yield other("a pickle of nested tuples", stream(b"\x80\x02)" + b"\x85" * 10**6 + b"."))
    yield other("a pickle that puts 2^31 in its memo", stream(b"\x80\x02Nr\xff\xff\xff\x7f."))
    yield other("a pickle that is cut off", stream(b"\x80\x02}q\x00X\x05"))
    yield other("a pickle of nothing", stream(b"\x80\x02N."))
    yield other("a pickle of a text", stream(pickle.dumps("weights")))
    yield other("a pickle of protocol 9", stream(b"\x80\x09N."))
    yield other("an empty file", stream(b""))
    yield other("a zip of nothing", stream(b"PK\x05\x06" + bytes(18)))
    yield other(
        "a zip that is cut off",
        lambda place: (place / "model.pt").write_bytes((place / "model.pt").read_bytes()[:999]),
    )
    yield other(
        "a state dict of texts", state_with(lambda state: state.update({"visual.proj": "a"}))
    )
    yield other("a state dict without a tensor", state_with(lambda state: state.pop("visual.proj")))
    yield other(
        "a state dict with one more",
        state_with(lambda state: state.update(x=torch.zeros(2))),
        answer="either",
    )
    yield other(
        "a head that is flat",
        state_with(lambda state: state.update({"head.weight": torch.zeros(3)})),
    )
    yield other(
        "a head of another width",
        state_with(lambda state: state.update({"head.weight": torch.zeros(2, 9)})),
    )
    yield other("an empty state dict", state_with(lambda state: state.clear()))
    yield other(
        "a tensor that is sparse",
        state_with(lambda state: state.update({"head.weight": torch.eye(2).to_sparse()})),
    )
    yield other(
        "a tensor of complex numbers",
        state_with(
            lambda state: state.update({"head.weight": torch.zeros(2, 16, dtype=torch.complex64)})
        ),
    )
    yield other(
        "a weight that is nan (C9)",
        state_with(lambda state: state["visual.proj"].fill_(float("nan"))),
    )
    yield other(
        "30,000 tensors of other code (C7)",
        state_with(
            lambda state: state.update({f"visual.x{n}": torch.zeros(1) for n in range(30_000)})
        ),
    )
    yield other(
        "keys that are numbers",
        state_with(lambda state: state.update({7: torch.zeros(2)})),
        answer="either",
    )
    yield other(
        "a key of 10^6 letters",
        state_with(lambda state: state.update({"a" * 10**6: torch.zeros(1)})),
    )
    many = other("a zip that is a directory of 6,000,000 members (C7)", directory)
    yield dataclasses.replace(many, thorough=True)
    yield other("compressed entries (C7)", rezipped(lambda _: None, zipfile.ZIP_DEFLATED))
    yield other(
        "an entry that is a bomb (C7)",
        rezipped(lambda found: found.update({"model/data/0": bytes(2**28)}), zipfile.ZIP_DEFLATED),
    )
    yield other(
        "storages that are missing",
        rezipped(lambda found: [found.pop(name) for name in list(found) if "/data/" in name]),
    )
    yield other(
        "storages that are too short",
        rezipped(lambda found: found.update({name: b"x" for name in found if "/data/" in name})),
    )
    yield other(
        "two pickles", rezipped(lambda found: found.update({"other/data.pkl": b"\x80\x02N."}))
    )
    yield other(
        "an unknown byte order",
        rezipped(lambda found: found.update({"model/byteorder": b"middle"})),
    )
    yield other(
        "a pickle in it that runs a command",
        rezipped(lambda found: found.update({"model/data.pkl": pickle.dumps(Touch())})),
    )


def folders() -> Iterator[Row]:
    def hub(what: str, damage: Callable[[Place], object], *says: str, **options: Any) -> Row:
        return row(what, damage, *says, words=HUB, **options)

    code = "open('ran', 'w')\n"
    yield hub("a hub folder with code", hub_file("modeling.py", code), answer="either")
    yield hub("a hub folder with a setup", hub_file("__init__.py", code), answer="either")
    for what, values in {
        "a tokenizer of a folder": {"hf_tokenizer_name": "."},
        "a tokenizer that may run code": {"tokenizer_kwargs": {"trust_remote_code": True}},
        "tokenizer options that are a list": {"tokenizer_kwargs": [1]},
        "a text tower of a folder": {"hf_model_name": "."},
        "a text tower with code": {
            "hf_model_name": "x/y",
            "hf_model_config": {"trust_remote_code": True},
        },
    }.items():
        yield row(
            f"a hub folder with {what}",
            hub_options(**values),
            "clip|open_clip_config",
            words=DRY,
            answer="either",
        )
    for what, values in {
        "a tower of timm's": {"timm_model_name": "resnet50", "timm_model_pretrained": True},
        "10^9 layers (C7)": {"layers": 10**9},
        "a width of 10^9 (C7)": {"width": 10**9, "head_width": 10**9},
        "pictures of 10^9 pixels a side (C7)": {"image_size": 10**9},
        "no layers": {"layers": 0},
    }.items():
        yield row(
            f"a hub folder with {what}",
            vision_options(**values),
            "clip|open_clip_config",
            words=DRY,
        )
    yield hub(
        "a hub folder with a pickle that runs a command",
        lambda place: [
            (place / "hub/open_clip_model.safetensors").rename(place / "hub/x"),
            (place / "hub/card.json").unlink(),
            (place / "hub/open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Touch())),
        ],
        "open_clip_pytorch_model",
    )
    yield hub(
        "a hub folder whose head is a pickle",
        lambda place: [
            (place / "hub/head.safetensors").write_bytes(pickle.dumps(Touch())),
            (place / "hub/card.json").unlink(),
        ],
        "head",
    )
    yield hub(
        "a hub folder that is empty",
        lambda place: [path.unlink() for path in (place / "hub").iterdir()],
        "hub",
    )
    yield row("an index that is a pickle", numpy_objects, r"index\.npz", words=EVALUATE)
    yield row("a gallery that is a pickle", gallery_objects, "gallery", words=REPORT)
    yield row(
        "a vocabulary without words",
        lambda place: (place / "clip/vocab.txt").write_text(""),
        "vocab",
        words=DRY,
    )
    yield row(
        "a vocabulary that is no text",
        lambda place: (place / "clip/vocab.txt").write_bytes(b"\xff\xfe\x00"),
        "vocab",
        words=DRY,
    )
    yield row(
        "a vocabulary larger than its tower",
        lambda place: (place / "clip/vocab.txt").write_text(
            "\n".join(["", "a", "red", "green", "square", *map(str, range(999))])
        ),
        "vocab",
        words=DRY,
    )


def recorded(mapping: Mapping[str, object]) -> Callable[[Place], None]:
    return lambda place: place.edit("run/training.json", **mapping)


def resumed(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    """Change the checkpoint of an unfinished run, with a matching record."""

    def damage(place: Place) -> None:
        for name in ("training.json", "results.json"):
            (place / "run" / name).unlink()
        path = place / "run/checkpoints/step-00000002.pt"
        data = change(path.read_bytes())
        path.write_bytes(data)
        known = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        place.edit("run/checkpoints/step-00000002.json", **known)

    return damage


def saved(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    """The same, changed through torch's own reader and writer."""

    def rewrite(data: bytes) -> bytes:
        content = torch.load(io.BytesIO(data), weights_only=True)
        change(content)
        out = io.BytesIO()
        torch.save(content, out)
        return out.getvalue()

    return resumed(rewrite)


def bomb(data: bytes) -> bytes:
    """2,000 MiB of zeros in some MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, part in entries.items():
            if not name.endswith("data/0"):
                archive.writestr(name, part, zipfile.ZIP_STORED)
                continue
            # not writestr, which would need them in memory
            with archive.open(name, "w") as stream:
                for _ in range(2000):
                    stream.write(bytes(2**20))
    return out.getvalue()


def expand(content: dict[str, Any]) -> None:
    for moments in content["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(1).expand(2**32)


CHECKPOINTS: tuple[tuple[str, Callable[[Place], None], str], ...] = (
    ("a model of NaN", saved(lambda c: [t.fill_(np.nan) for t in c["model"].values()]), "NaN"),
    ("a step far beyond the last", saved(lambda c: c["progress"].update(step=10**9)), "step"),
    ("a step before the first", saved(lambda c: c["progress"].update(step=-5)), "step"),
    ("moments of 16 GiB", saved(expand), "exp_avg"),
    ("no must_agree", saved(lambda c: c.pop("must_agree")), "must_agree"),
    ("a model that is a text", saved(lambda c: c.update(model="x")), "model"),
    ("a storage of 2,000 MiB, deflated", resumed(bomb), "data/0 has|compressed"),
    ("a pickle that runs code", resumed(lambda _: pickle.dumps(Touch())), "posix.system"),
    ("no bytes", resumed(lambda _: b""), "damaged"),
)


def checkpoints() -> Iterator[Row]:
    for what, damage, says in CHECKPOINTS:
        yield Row(
            kind="weights",
            what=f"resumed from: {what}",
            words=TRAIN,
            damage=damage,
            says=(r"step-00000002\.pt", says),
            writes=["run/provenance.json"],
            slow=True,
        )


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    yield from headers()
    yield from contents()
    yield from others()
    yield from folders()
    yield from checkpoints()
    yield row(
        "other weights than those that the run ended with",
        lambda place: (place / BEST).write_bytes((place / LAST).read_bytes()),
        "weights",
        words=EVALUATE,
    )
    yield row(
        "no hash of them", recorded({"weights_sha256": {}}), words=EVALUATE, answer="accepted"
    )
