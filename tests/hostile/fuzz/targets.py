"""The targets of the fuzzers. Each takes the valid world and its own writable folder."""

import contextlib
import io
import json
import pickletools
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from rft import cli
from rft.clip import load, weights
from rft.clip.classifier import build_classifier, load_state, map_state
from rft.config import Config, load_config, settings
from rft.convert.exports import Export
from rft.convert.imports import Import
from rft.evaluate.command import Arguments as Evaluate
from rft.evaluate.localisation import Arguments as Localise
from rft.evaluate.localisation import check as check_localisation
from rft.experiments import Arguments as Plan
from rft.experiments import experiments
from rft.loading.dataset import PackedDataset
from rft.loading.show import Arguments as Show
from rft.merge.command import Arguments as Merge
from rft.packing import encode
from rft.packing.foreign.index import read_shard
from rft.packing.foreign.rule import Rule
from rft.packing.foreign.samples import read_samples
from rft.report import tables
from rft.report.command import Arguments as Report
from rft.report.page import compose, render
from rft.report.page import documents as documents_of
from rft.report.read import load_runs
from rft.runs import folder as runs
from rft.runs import trained_on
from rft.runs.gallery_file import read as read_gallery
from rft.runs.header import read_entries
from rft.runs.predictions import read as read_predictions
from rft.shards import tar
from rft.shards.images import Treatment, clip_pixels, encoding_parameters, load_image
from rft.shards.index import Index
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.shards.samples import Samples
from rft.storage import files
from rft.storage.documents import convert
from rft.train.command import parse_command
from tests.hostile.fuzz.engine import Target
from tests.hostile.fuzz.mutate import (
    NUMBERS,
    TEXTS,
    Change,
    Edit,
    changed,
    changes,
    edited,
    edits,
    styles,
    to_text,
)
from tests.hostile.table.images import BROKEN as BROKEN_IMAGES
from tests.hostile.table.images import CONTROLS, FINE, chunk
from tests.hostile.table.tars import BROKEN as BROKEN_TARS
from tests.hostile.table.tars import END, header, member, number, pax
from tests.hostile.table.weights import header_of, with_header

MOST_SAMPLES = 100  # for reading a mutated set: a valid one has four
SMALL_BYTES = 10**6  # a larger seed only slows everything down


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def npz_bytes(columns: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **columns)
    return stream.getvalue()


def manifest(world: Path, folder: Path) -> Target:
    """A mutated manifest over a mutated index, and then a batch: refused, or correct."""
    sets = {}
    for name in ("shards", "original"):
        shutil.copytree(world / name / "test", folder / name, dirs_exist_ok=True)
        packed = PackedDataset(str(world / name / "test"))
        batch = packed.batch(np.arange(len(packed)), 16)
        images = {int(crc): image for crc, image in zip(packed.index.crc32, batch[0], strict=True)}
        sets[name] = (read_json(folder / name / "manifest.json"), dict(vars(packed.index)), images)

    cells = st.tuples(
        st.sampled_from(["offset", "length", "crc32", "label", "width", "height"]),
        st.integers(0, 3),
        st.sampled_from([0, 1, -1, 2**31 - 1, 2**32 - 1, 2**63, 512, 1536, 896]),
    )

    def check(example: tuple[str, list[Change], list[tuple[str, int, int]], str]) -> None:
        name, made, written, style = example
        document, index, images = sets[name]
        columns = {key: column.copy() for key, column in index.items()}
        for key, row, value in written:
            columns[key][row] = np.array(value).astype(columns[key].dtype)
        data = npz_bytes(columns)
        (folder / name / "index.npz").write_bytes(data)
        whole = {**document, "index_sha256": files.sha256_bytes(data)}
        text = to_text(changed(whole, made), style)
        (folder / name / "manifest.json").write_bytes(text)
        packed = PackedDataset(str(folder / name))
        samples = np.arange(min(len(packed), MOST_SAMPLES))
        batch = packed.batch(samples, 16)
        # whatever vouches for them, they are images of the set, with scored labels
        scored = {class_id for group in packed.manifest.groups for class_id in group}
        assert set(batch.labels_B.tolist()) <= scored
        assert batch.labels_B.tolist() == packed.index.label[samples].tolist()
        border = packed.manifest.encoding["crop_border"]
        same_border = border == document["encoding"]["crop_border"]
        for crc, image in zip(packed.index.crc32[samples], batch.images_BCHW, strict=True):
            if same_border and "photos" in packed.manifest.encoding:
                assert torch.equal(image, images[int(crc)]), "other pixels"

    example = st.tuples(
        st.sampled_from(sorted(sets)), changes(), st.lists(cells, max_size=2), styles()
    )
    found = (
        ("shards", [], [], ""),
        ("original", [], [], ""),
        ("shards", [], [("label", 0, -1)], ""),
    )
    return Target(example, check, found)


def index(world: Path, folder: Path) -> Target:
    """The bytes of index.npz or samples.npz, with a matching manifest."""
    source = world / "shards/test"
    document, whole = read_json(source / "manifest.json"), Manifest.load(str(source))
    document["domains"] = ["fog", "snow"]
    rows = np.arange(whole.samples)
    samples = Samples(source=rows.astype(np.uint64), domain=(rows % 2).astype(np.int32))
    valid = {"index": (source / "index.npz").read_bytes(), "samples": samples.to_bytes()}
    members = {}
    for kind, data in valid.items():
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members[kind] = {name: archive.read(name) for name in archive.namelist()}
    tokens = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b"'<u8'", b"'|O'", b"(4,)"]
    tokens += [b"(4,99999999)", b"(-1,)", b"True", b"'descr'", b"\x08\x00", b"{'", b"|S9999999"]

    def check(example: tuple[str, list[Edit], list[tuple[int, list[Edit]]], int]) -> None:
        kind, outer, inner, method = example
        parts = dict(members[kind])
        for place, made in inner:
            name = sorted(parts)[place % len(parts)]
            parts[name] = edited(parts[name], made)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
        data = edited(stream.getvalue() if inner else valid[kind], outer)
        for name, content in (valid | {kind: data}).items():
            (folder / f"{name}.npz").write_bytes(content)
            document[f"{name}_sha256"] = files.sha256_bytes(content)
        (folder / "manifest.json").write_text(json.dumps(document))
        manifest = Manifest.load(str(folder))
        found, of = Index.load(str(folder), manifest), Samples.load(str(folder), manifest)
        assert len(found.label) == len(of.source) == whole.samples
        assert ((found.label >= 0) & (found.label < len(whole.classes))).all()
        assert of.domain is not None
        assert ((of.domain >= 0) & (of.domain < len(manifest.domains))).all()

    member_edits = st.tuples(st.integers(0, 20), edits(tokens))
    methods = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    kinds = st.sampled_from(sorted(valid))
    example = st.tuples(kinds, edits(tokens), st.lists(member_edits, max_size=2), methods)
    found = (("index", [], [], zipfile.ZIP_STORED), ("samples", [], [], zipfile.ZIP_STORED))
    return Target(example, check, found)


def tars(world: Path, folder: Path) -> Target:
    """Archives whose member headers are wrong, and mutated valid archives."""
    valid = (world / "foreign/0.tar").read_bytes()
    labels = LabelSpace.load(str(world / "classes.json")).classes
    rule = Rule(labels=labels, groups=None)
    sizes = st.sampled_from([0, 1, 511, 512, -1, -512, -1536, 2**31, 2**63, 2**80, 2**87])
    texts = st.sampled_from(["9" * 30, "-512", "x", "", "1.5", "nan", "0", "9" * 5000])
    keys = ["size", "path", "linkpath", "GNU_sparse_map", "GNU_sparse_major", "GNU_sparse_minor"]
    keys += ["GNU_sparse_realsize", "GNU_sparse_size", "mtime", "uid", "hdrcharset", "comment"]
    blocks = st.one_of(
        st.builds(lambda size, kind: header(size=number(size), kind=kind), sizes, kinds()),
        st.builds(lambda records: pax(**records), st.dictionaries(st.sampled_from(keys), texts)),
        st.builds(lambda name, data: member(name, data), names(), st.binary(max_size=600)),
        st.builds(
            lambda size, data: header("x", number(size), b"x") + data, sizes, st.binary(max_size=9)
        ),
        st.sampled_from([make() for name, make in BROKEN_TARS.items() if len(make()) < 10_000]),
        st.just(bytes(512)),
    )
    tokens = [b"ustar\x0000", b"ustar  \0", b"x", b"g", b"L", b"K", b"S", b"\x80", b"\xff" * 12]

    def check(example: tuple[list[bytes], bool, list[Edit]]) -> None:
        made, ends, outer = example
        data = b"".join(made) + END * ends if made else valid
        data = edited(data, outer)
        with contextlib.suppress(ValueError):
            found = list(tar.walk(io.BytesIO(data), "a.tar"))
            assert len(found) <= len(data) // tar.BLOCK
            for one in found:
                assert 0 < one.offset <= one.offset + one.size <= len(data)
        with contextlib.suppress(ValueError):
            read_samples(io.BytesIO(data), "a.tar", Counter())
        path = folder / "a.tar"
        path.write_bytes(data)
        read_shard((str(path), len(data)), rule)

    example = st.tuples(st.lists(blocks, max_size=4), st.booleans(), edits(tokens))
    return Target(example, check, (([], True, []),))


def kinds() -> st.SearchStrategy[bytes]:
    return st.sampled_from([bytes([code]) for code in b"0123456789xgLKSVXDMN"] + [b"\0", b"\xff"])


def names() -> st.SearchStrategy[str]:
    texts = ["a.jpg", "a.cls", "a.json", "././@LongLink", "../x.jpg", "", "a/", "__x__.jpg", "."]
    return st.sampled_from(texts)


def image(world: Path, folder: Path) -> Target:
    """Images, complete and in chunks, through every reader of rft."""
    small = {
        name: make for name, make in (BROKEN_IMAGES | FINE | CONTROLS).items() if "C7" not in name
    }
    seeds = [data for data in (make() for make in small.values()) if len(data) < SMALL_BYTES]
    seeds += [path.read_bytes() for path in (world / "photos/red").iterdir()][:1]
    kinds = [
        b"IHDR",
        b"IDAT",
        b"PLTE",
        b"tRNS",
        b"iCCP",
        b"eXIf",
        b"zTXt",
        b"iTXt",
        b"gAMA",
        b"acTL",
    ]
    kinds += [b"fcTL", b"fdAT", b"pHYs", b"sRGB", b"cHRM", b"tEXt", b"IEND"]
    tokens = [b"\xff\xd8", b"\xff\xc0", b"\xff\xda", b"\xff\xe1", b"Exif\0\0", b"MM\0*", b"II*\0"]
    tokens += [b"VP8X", b"VP8L", b"VP8 ", b"ANIM", b"ANMF", b"ICCP", b"EXIF", *kinds]
    encodings = [
        encoding_parameters(kind, 16, 0, photos=True) for kind in ("original", "pixels", "jpeg")
    ]
    treatments = [
        Treatment(photo=photo, border=border) for photo in (True, False) for border in (0, 2)
    ]

    def check(example: tuple[bytes, list[Edit], list[tuple[bytes, bytes]]]) -> None:
        seed, made, chunks = example
        data = edited(seed, made)
        if chunks and data[:4] == b"\x89PNG":
            added = b"".join(chunk(kind, content) for kind, content in chunks)
            data = data[:33] + added + data[33:]
        for encoding in encodings:
            with contextlib.suppress(ValueError):
                found = encode.encode(data, "x", encoding)
                assert found.header.width > 0
                assert found.header.height > 0
        with contextlib.suppress(ValueError):
            encode.identify(data, "x", 0)
        for treatment in treatments[1:]:
            with contextlib.suppress(ValueError):
                load_image(data, "x", treatment)
        picture = load_image(data, "x", treatments[0])
        assert picture.mode == "RGB"
        assert clip_pixels(picture, 16).shape == (3, 16, 16)

    chunks = st.tuples(st.sampled_from(kinds), st.binary(max_size=40))
    example = st.tuples(st.sampled_from(seeds), edits(tokens), st.lists(chunks, max_size=2))
    return Target(example, check, ((seeds[0], [], []),))


def weights_header(world: Path, folder: Path) -> Target:
    """The header of safetensors: its own entries, rft's entries, and its bytes."""
    valid = (world / "zero/checkpoints/last.safetensors").read_bytes()
    document = header_of(valid)
    own = json.loads(document["__metadata__"]["rft"])
    own["architecture"] = json.loads(own["architecture"])
    path = folder / "x.safetensors"

    def check(example: tuple[list[Change], list[Change], list[Edit]]) -> None:
        inner, outer, raw = example
        entries = changed(own, inner)
        if isinstance(entries, dict) and "architecture" in entries:
            entries["architecture"] = json.dumps(entries["architecture"])
        metadata = {**document["__metadata__"], "rft": json.dumps(entries)}
        data = with_header(valid, changed({**document, "__metadata__": metadata}, outer))
        path.write_bytes(edited(data, raw))
        for read in (read_entries, weights.read):
            with contextlib.suppress(ValueError, OSError):
                read(path)
        saved = load_state(path)
        trained_on.of_model(path, map_state(path).metadata)
        model = build_classifier(saved.state, saved.architecture)
        size = saved.architecture.image_size
        logits = model(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        assert logits.shape == (1, len(saved.state["head.weight"]))

    tokens = [b'"shape":[', b'"dtype":"F32"', b'"data_offsets":[', b"]", b"}", b"{", b"-1", b"1e9"]
    example = st.tuples(changes(), changes(), edits(tokens))
    return Target(example, check, (([], [], []),))


class Opcode:
    """Pieces of pickles: complete opcodes with valid kinds of arguments."""

    RUN = (
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"cbuiltins\n__import__\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch.storage\n_load_from_bytes\n",
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cbuiltins\ngetattr\n",
        b"cbuiltins\nset\n",
        b"ctorch.nn\nModule\n",
    )
    DATA = (b"N", b"(", b")", b"]", b"}", b"K\x01", b"J\xff\xff\xff\xff", b"I01\n", b"\x8a\x01\x05")
    DATA += (b"X\x01\x00\x00\x00a", b"U\x01a", b"C\x01a", b"\x8c\x01a", b"G" + bytes(8), b"\x88")
    BUILD = (b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"e", b"a", b"s", b"u", b"R", b"b", b"o")
    BUILD += (b"\x81", b"Q", b"0", b"1", b"2", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"\x94")
    BUILD += (
        b"\x93",
        b"\x90",
        b"\x91",
        b"\x8f",
        b"\x96" + bytes(8),
        b"\x95" + bytes(8),
        b"\x82\x01",
    )
    ALL = (*RUN, *DATA, *BUILD)


def pieces_of(data: bytes) -> list[bytes]:
    """Cut a pickle into its opcodes."""
    starts = [place for _, _, place in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def unpickler(world: Path, folder: Path) -> Target:
    """Pickles, opcode by opcode: bare, in a torch archive, and in torch's old format."""
    with zipfile.ZipFile(world / "model.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (inside,) = (name for name in entries if name.endswith("/data.pkl"))
    pieces = pieces_of(entries[inside])
    stream = io.BytesIO()
    torch.save({"head.weight": torch.ones(2, 2)}, stream, _use_new_zipfile_serialization=False)
    old, path = stream.getvalue(), folder / "model.pt"

    def check(example: tuple[str, list[tuple[str, int, bytes]], list[Edit]]) -> None:
        form, made, raw = example
        parts = list(pieces)
        for how, at, piece in made:
            position = at % (len(parts) + 1)
            match how:
                case "insert":
                    parts[position:position] = [piece]
                case "over":
                    parts[position : position + 1] = [piece]
                case "delete":
                    del parts[position : position + 1]
        pickled = b"".join(parts)
        match form:
            case "bare":
                data = edited(pickled, raw)
            case "old":
                data = edited(old, raw)
            case "short":
                data = b"\x80\x02" + b"".join(piece for _, _, piece in made) + b"."
            case _:
                buffer = io.BytesIO()
                with zipfile.ZipFile(buffer, "w") as written:
                    for name, content in entries.items():
                        written.writestr(name, pickled if name == inside else content)
                data = edited(buffer.getvalue(), raw)
        path.write_bytes(data)
        weights.read(path)

    steps = st.tuples(
        st.sampled_from(["insert", "insert", "over", "delete"]),
        st.integers(0, 10**4),
        st.sampled_from(Opcode.ALL),
    )
    example = st.tuples(
        st.sampled_from(["archive", "bare", "old", "short"]),
        st.lists(steps, max_size=8),
        edits(Opcode.ALL[:20]),
    )
    return Target(example, check, (("archive", [], []), ("old", [], []), ("bare", [], [])))


def config(world: Path, folder: Path) -> Target:
    """A run's configuration: refused, or written back unchanged."""
    document = read_json(world / "run/config.json")

    def check(example: tuple[list[Change], str]) -> None:
        made, style = example
        (folder / "config.json").write_bytes(to_text(changed(document, made), style))
        with contextlib.suppress(ValueError):
            runs.evaluation_command(folder)
            runs.unfinished(folder)
        found = load_config(folder)
        again = convert(json.loads(json.dumps(found.to_dict())), Config, "config")
        assert again == found
        assert again.to_dict() == found.to_dict()
        assert found.micro_batch(1) > 0
        found.identity()
        settings(found.to_dict())

    return Target(st.tuples(changes(), styles()), check, (([], ""),))


def report(world: Path, folder: Path) -> Target:
    """Two run folders with one mutated document: tables and page, without figures."""
    names = (
        "config.json",
        "results.json",
        "metrics.jsonl",
        "provenance.json",
        "training.json",
        "progress.json",
    )
    for run in ("run", "zero"):
        shutil.copytree(world / run, folder / run, dirs_exist_ok=True)
    texts = {
        name: [json.loads(line) for line in (world / "run" / name).read_text().splitlines()]
        if name.endswith("l")
        else [read_json(world / "run" / name)]
        for name in names
    }

    def check(example: tuple[dict[str, list[Change]], str, bool]) -> None:
        made, style, unfinished = example
        for name, documents in texts.items():
            lines = [
                to_text(changed(one, made.get(name, [])), style if name in made else "")
                for one in documents
            ]
            (folder / "run" / name).write_bytes(b"\n".join(lines) + b"\n")
        if unfinished:
            (folder / "run/training.json").unlink()
        found = load_runs([folder / "run", folder / "zero"])
        made_of = compose(found, draw=False)
        shown = (
            tables.csv_text(made_of.rows),
            tables.markdown(made_of.tables),
            made_of.text(),
            render(made_of),
            *(content.decode() for content in documents_of(made_of).values() if content),
        )
        assert "<script>alert" not in shown[3]
        for text in shown:
            text.encode()

    documents = st.dictionaries(st.sampled_from(names), changes(), max_size=2)
    return Target(
        st.tuples(documents, styles(), st.booleans()), check, (({}, "", False), ({}, "", True))
    )


def documents(world: Path, folder: Path) -> Target:
    """Class lists, a hub folder's configuration and card, galleries, predictions."""
    from tests.predicted import evaluated
    from tests.report.make_runs import make_gallery

    shutil.copytree(world / "hub", folder / "hub", dirs_exist_ok=True)
    shutil.copytree(world / "clip", folder / "clip", dirs_exist_ok=True)
    make_gallery(folder / "gallery.npz", size=16, frames=2)
    valid_gallery = (folder / "gallery.npz").read_bytes()
    valid_predictions = evaluated(3).predicted.predictions.to_bytes()
    sources = {
        "classes.json": world / "classes.json",
        "hub/card.json": world / "hub/card.json",
        "hub/open_clip_config.json": world / "hub/open_clip_config.json",
        "clip/open_clip_config.json": world / "clip/open_clip_config.json",
    }
    valid = {name: read_json(path) for name, path in sources.items()}

    def check(example: tuple[str, list[Change], str, list[Edit]]) -> None:
        name, made, style, raw = example
        for other, document in valid.items():
            text = to_text(changed(document, made), style) if other == name else to_text(document)
            (folder / other).write_bytes(edited(text, raw) if other == name else text)
        match name:
            case "classes.json":
                space = LabelSpace.load(str(folder / name))
                assert len(space.ids) == len(space.names) >= 2
            case "clip/open_clip_config.json":
                load.architecture_of(f"local-dir:{folder / 'clip'}").build_visual()
            case "gallery.npz":
                (folder / name).write_bytes(edited(valid_gallery, raw))
                found = read_gallery(folder / name)
                assert len(found.names) == len(found.images_BHWC)
            case "predictions.npz":
                (folder / name).write_bytes(edited(valid_predictions, raw))
                rows = read_predictions(folder / name, 10)
                assert (rows.right == (rows.label == rows.prediction)).all()
            case _:
                weights.read(folder / "hub")

    names = st.sampled_from([*sorted(valid), "gallery.npz", "predictions.npz"])
    return Target(
        st.tuples(names, changes(), styles(), edits()), check, (("hub/card.json", [], "", []),)
    )


def options_of(kind: Callable[..., Any], **more: Any) -> list[str]:
    """List the options in a command's help."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.parse(kind, args=[*more.get("before", ()), "--help"])
    return sorted(set(re.findall(r"--[a-z][\w.-]+", shown.getvalue())) - {"--help"})


def commands(world: Path, folder: Path) -> Target:
    """Command lines of every command, through its parser and the checks before any work."""

    def plan(words: list[str]) -> None:
        found = cli.parse(Plan, args=words).plan
        if found.seeds <= 3:
            experiments(found)

    def train(words: list[str]) -> None:
        command = parse_command(["vanilla", "--run-dir", "r", *words])
        command.config.micro_batch(1)
        again = convert(json.loads(json.dumps(command.config.to_dict())), Config, "config")
        assert again == command.config

    parsers: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
        "experiments": (plan, options_of(Plan)),
        "train": (train, training_options()),
        "localise": (
            lambda words: check_localisation(cli.parse(Localise, args=["r", *words])),
            options_of(Localise),
        ),
    }
    for name, kind in {
        "evaluate": Evaluate,
        "report": Report,
        "show": Show,
        "import": Import,
        "export": Export,
    }.items():
        parsers[name] = (lambda words, kind=kind: cli.parse(kind, args=words), options_of(kind))
    for name in ("wise", "uniform-soup", "greedy-soup"):
        parsers[name] = (
            lambda words, name=name: cli.parse(Merge, args=[name, *words]),
            options_of(Merge, before=[name]),
        )
    values = (
        st.sampled_from(TEXTS) | st.sampled_from([str(n) for n in NUMBERS]) | st.text(max_size=4)
    )

    def check(example: tuple[str, list[tuple[int, str, bool]], list[str]]) -> None:
        name, chosen, words = example
        parser, options = parsers[name]
        line = list(words)
        for place, value, joined in chosen:
            option = options[place % len(options)]
            line += [f"{option}={value}"] if joined else [option, value]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                parser(line)
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError("it stops without a line") from stop

    chosen = st.tuples(st.integers(0, 200), values, st.booleans())
    return Target(
        st.tuples(
            st.sampled_from(sorted(parsers)),
            st.lists(chosen, max_size=4),
            st.lists(values, max_size=2),
        ),
        check,
        (("train", [], []), ("experiments", [], ["--help"])),
    )


def training_options() -> list[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse_command(["--help"])
    return sorted(set(re.findall(r"--[a-z][\w.-]+", shown.getvalue())) - {"--help"})


TARGETS: dict[str, Callable[[Path, Path], Target]] = {
    "manifest and batch": manifest,
    "index": index,
    "tar": tars,
    "image": image,
    "weights header": weights_header,
    "unpickler": unpickler,
    "configuration": config,
    "report": report,
    "other documents": documents,
    "command lines": commands,
}
