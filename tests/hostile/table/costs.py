"""Small inputs with large costs (C7)."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rft.sets import TEST_SETS
from tests.hostile.rows import Answer, Row
from tests.hostile.world import (
    DRY,
    EVALUATE,
    FRESH,
    IMPORT,
    INDEX,
    PACK,
    REPORT,
    SHOW,
    VERIFY,
    Place,
)
from tests.packing.test_foreign import write_tar


def row(
    what: str,
    words: Sequence[str],
    damage: Callable[[Place], object] = lambda _: None,
    *says: str,
    answer: Answer = "refused",
    **options: Any,
) -> Row:
    options = {"slow": True, **options}
    return Row(
        kind="cost", what=what, words=words, damage=damage, says=says, answer=answer, **options
    )


def npz(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def header(shape: tuple[int, ...], kind: str = "<u8") -> bytes:
    """The header of an array, without its content."""
    stream = io.BytesIO()
    fields = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def columns_with(place: Place, **arrays: bytes) -> dict[str, bytes]:
    found = {}
    for name, column in place.columns().items():
        stream = io.BytesIO()
        np.save(stream, column)
        found[name] = stream.getvalue()
    return {**found, **arrays}


def index_with(**arrays: bytes | Callable[[], bytes]) -> Callable[[Place], None]:
    """Put arrays into the index; large ones are created on demand."""

    def damage(place: Place) -> None:
        made = {name: data if isinstance(data, bytes) else data() for name, data in arrays.items()}
        place.publish_index(npz(columns_with(place, **made)))

    return damage


def zeros(count: int) -> bytes:
    return bytes(count)


def bomb() -> bytes:
    """A gigabyte that deflates to a megabyte."""
    return header((2**27,)) + zeros(2**30 - 2**10)


def lied_size(place: Place) -> None:
    """A zip whose directory understates a member's size."""
    data = bytearray(npz(columns_with(place, offset=header((2**28,)) + zeros(2**31 - 2**10))))
    at = data.find(b"PK\x01\x02")
    data[at + 24 : at + 28] = (200).to_bytes(4, "little")
    place.publish_index(bytes(data))


def many_members(place: Place) -> None:
    members = columns_with(place)
    place.publish_index(npz({**members, **{f"x{n}": header((0,)) for n in range(60_000)}}))


def quine(place: Place) -> None:
    """Members that overlap: each starts in the same compressed bytes."""
    data = npz({"offset": header((2**20,)) + zeros(2**23)})
    place.publish_index(data * 100)


def many_shards(count: int) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        shard = place.read("shards/test/manifest.json")["shards"][0]
        shards = [{**shard, "name": f"{n:06d}.tar", "sha256": f"{n:064x}"} for n in range(count)]
        place.edit("shards/test/manifest.json", shards=shards)

    return damage


def long_name(place: Place) -> None:
    place.edit_shard(name="a" * 10**6)


def long_classes(place: Place) -> None:
    place.edit("shards/test/manifest.json", classes=["a" * 10**6, "b" * 10**6])


def wide_text(place: Place) -> None:
    """60 MB of letters, for which Python needs four bytes each because of one."""
    path = place / "shards/test/manifest.json"
    document = json.loads(path.read_text()) | {"dataset": "X"}
    text = json.dumps(document).replace('"X"', '"\N{GRINNING FACE}' + "a" * 60_000_000 + '"')
    path.write_text(text)


def too_large(name: str, letter: bytes, count: int) -> Callable[[Place], None]:
    return lambda place: (place / name).write_bytes("\N{GRINNING FACE}".encode() + letter * count)


def many_classes(place: Place) -> None:
    names = [f"c{n}" for n in range(10**6)]
    place.edit("shards/test/manifest.json", classes=names, class_ids=names, groups=[[0], [1]])


def many_templates(place: Place) -> None:
    place.edit("shards/train/manifest.json", templates=["a {c} square"] * 10**6)


def large_pixels(place: Place) -> None:
    manifest = place.read("shards/test/manifest.json")
    place.edit("shards/test/manifest.json", encoding={**manifest["encoding"], "size": 2**30})


def large_border(place: Place) -> None:
    manifest = place.read("original/test/manifest.json")
    encoding = {**manifest["encoding"], "crop_border": 2**62}
    place.edit("original/test/manifest.json", encoding=encoding)


def column(name: str, value: int) -> Callable[[Place], None]:
    """Put a value into the first row of a column."""

    def damage(place: Place) -> None:
        columns = place.columns()
        columns[name][0] = value
        stream = io.BytesIO()
        np.savez(stream, **columns)
        place.publish_index(stream.getvalue())

    return damage


def lengths(place: Place) -> None:
    """Make each payload four gigabytes, and the shard large enough."""
    columns = place.columns()
    columns["length"][:] = 2**32 - 1
    stream = io.BytesIO()
    np.savez(stream, **columns)
    place.edit_shard(bytes=2**45)
    place.publish_index(stream.getvalue())


def sparse_shard(place: Place) -> None:
    """The same with a shard that really has this size: a sparse file."""
    lengths(place)
    place.edit_shard(bytes=2**40)
    os.truncate(place / "shards/test/000000.tar", 2**40)


def large_gallery(place: Place) -> None:
    images = header((2**16, 3, 2**8, 2**8), "|u1") + zeros(2**31 - 2**12)
    (place / "run/gallery.npz").write_bytes(npz({"images_BCHW": images}))


def dear_gallery(patch: int, columns: int) -> Callable[[Place], None]:
    """A gallery of the maximum size, of noise, with a name that the font lacks."""

    def damage(place: Place) -> None:
        rng = np.random.default_rng(0)
        count, grid = 16, (512 // patch) ** 2
        donors = np.broadcast_to(np.arange(count, dtype=np.int8)[:, None], (count, grid))
        arrays = {
            "images_BCHW": rng.integers(0, 256, (count, 3, 512, 512), dtype=np.uint8),
            "labels_B": np.zeros(count, int),
            "class_names": np.array(["\u4e00\x1b[31m"]),
            "relevance_BP": np.zeros((count, grid), np.float16),
            "patch": np.array(patch),
            **{f"donor/r{n}": donors for n in range(columns)},
            # as many steps as the limit of bytes permits
            "steps_S": np.arange(steps := 12 if patch > 1 else 1),
            "relevance_SBP": np.zeros((steps, count, grid), np.float16),
            "masked_SBP": np.ones((steps, count, grid), bool),
        }
        np.savez(place / "run/gallery.npz", **arrays)

    return damage


def many_runs(count: int, recipe: str = "r{}", lines: int = 0) -> Callable[[Place], None]:
    """One run per recipe, evaluated on everything, each with lines of metrics."""

    def damage(place: Place) -> None:
        results, config = place.read("run/results.json"), place.read("run/config.json")
        sets = TEST_SETS
        for n in range(count):
            folder = place / f"runs/{n:04d}"
            folder.mkdir(parents=True)
            counts = {
                name: {"correct": n * (k + 3) % 101, "total": 100, "manifest_sha256": "a" * 64}
                for k, name in enumerate(sets)
            }
            found = {**results, "config_sha256": None, "sets": counts}
            (folder / "results.json").write_text(json.dumps(found))
            name = recipe.format(n, n // 10, n % 10)
            (folder / "config.json").write_text(json.dumps({**config, "recipe": name}))
            shutil.copy(place / "run/training.json", folder)
            logged = (f'{{"step": {k}, "ce": {k % 7}.5}}\n' for k in range(lines))
            (folder / "metrics.jsonl").write_text("".join(logged))

    return damage


def deep_settings(place: Place) -> None:
    """Indented, each of a million numbers takes hundreds of letters."""
    text = json.dumps(place.read("run/config.json"))
    deep = "[" * 150 + "0," * 900_000 + "0" + "]" * 150
    (place / "run/config.json").write_text(f'{text[:-1]}, "x": {deep}}}')


def command_of_urls(place: Place) -> None:
    words = [
        " ".join(f"http://a:b@h{n}.x" for n in range(m, m + 4000)) for m in range(0, 80000, 4000)
    ]
    place.edit("run/provenance.json", command=words)


def long_metrics(place: Place) -> None:
    line = json.dumps({"step": 1, "loss": 1.0, "ce": 1.0}) + "\n"
    with (place / "run/metrics.jsonl").open("w") as stream:
        for _ in range(400):
            stream.write(line * 10_000)


def wide_metrics(place: Place) -> None:
    line = json.dumps({"step": 1, "loss": "a" * 10**8})
    (place / "run/metrics.jsonl").write_text(f"{line}\n")


def many_sets(place: Place) -> None:
    count = {"correct": 1, "total": 4, "manifest_sha256": "a" * 64}
    place.edit("run/results.json", sets={f"set{n}": count for n in range(10**5)})


def large_commands(place: Place) -> None:
    place.edit("run/provenance.json", command=["a" * 10**7] * 10)


def many_files(place: Place) -> None:
    """A tar with as many members as its size permits."""
    write_tar(place / "foreign/0.tar", [(f"{n}.jpg", b"") for n in range(30_000)])


def large_json_label(place: Place) -> None:
    write_tar(
        place / "foreign/0.tar",
        [("a.jpg", b"x"), ("a.json", b"[" * 10**6 + b"]" * 10**6)],
    )


def bracketed(pattern: str) -> Row:
    return row(
        f"the pattern {pattern[:40]} of {len(pattern)} letters",
        (INDEX[0], pattern, "--out", "new/test", *INDEX[4:]),
        slow=False,
    )


def option(words: Sequence[str], *options: str, says: str, **more: Any) -> Row:
    return row(
        f"{words[0]} {' '.join(options)[:60]}", (*words, *options), lambda _: None, says, **more
    )


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    index = r"index\.npz"
    yield row("a zip bomb as the index", EVALUATE, index_with(offset=bomb), index)
    yield row(
        "a zip bomb as the index, verified",
        VERIFY,
        index_with(label=bomb),
        index,
        answer="reported",
        thorough=True,
    )
    yield row(
        "a zip bomb in a column nobody knows",
        EVALUATE,
        index_with(more=bomb),
        index,
        thorough=True,
    )
    yield row("a zip that tells other sizes", EVALUATE, lied_size, index, thorough=True)
    yield row("a zip of 60,000 members", EVALUATE, many_members, index)
    yield row("a zip that is a hundred zips", EVALUATE, quine, index)
    yield row("an array of 2^60 numbers", EVALUATE, index_with(offset=header((2**60,))), index)
    yield row(
        "an array of 10^5 dimensions", EVALUATE, index_with(offset=header((1,) * 10_000)), index
    )
    yield row(
        "a text of 2^31 letters for each key",
        EVALUATE,
        index_with(key=header((4,), "|S2147483647")),
        index,
    )
    yield row(
        "100,000 shards without files", EVALUATE, many_shards(10**5), r"shard|samples|\.tar|index"
    )
    yield row("a shard's name of 10^6 letters", EVALUATE, long_name, "manifest|shard")
    yield row(
        "class names of 10^6 letters", EVALUATE, long_classes, "class|manifest", answer="either"
    )
    wide = "manifest|characters|must"
    yield row("60 MB of wide letters in a manifest", EVALUATE, wide_text, wide, thorough=True)
    for name, letter, count in (
        ("classnames.txt", b"a", 200_000_000),
        ("classnames.txt", b"a\n", 2_500_000),
        ("nshards.txt", b"7", 200_000_000),
    ):
        what = f"{count * len(letter):,} bytes of {letter.decode()!r} in {name}"
        damage = too_large(f"foreign/{name}", letter, count)
        yield row(what, INDEX, damage, f"{name}.*it has more than")
    yield row("10^6 classes", EVALUATE, many_classes, "class|values")
    yield row("10^6 prompts", DRY, many_templates, "template|prompt|manifest", answer="either")
    yield row("pixels of 2^30 a side", EVALUATE, large_pixels, "size|px|encoding|manifest")
    yield row(
        "a border of 2^62 pixels",
        tuple("original" if w == "shards" else w for w in EVALUATE),
        large_border,
        "border",
    )
    yield row("payloads of four gigabytes", EVALUATE, lengths, r"index\.npz|shard|\.tar|length")
    yield row(
        "payloads of four gigabytes of holes",
        EVALUATE,
        sparse_shard,
        r"index\.npz|shard|\.tar|length",
    )
    yield row("an offset of 2^63", EVALUATE, column("offset", 2**63), index)
    yield row("an offset of 2^64 - 1", EVALUATE, column("offset", 2**64 - 1), index)
    yield row("a length of nothing", EVALUATE, column("length", 0), r"index|\.tar|length")
    yield row("a gallery of gigabytes", REPORT, large_gallery, "gallery", thorough=True)
    for what, patch, columns in (("maps", 512, 24), ("patches", 1, 7)):
        yield row(
            f"a gallery of all the {what} that it may have",
            REPORT,
            dear_gallery(patch, columns),
            answer="accepted",
            thorough=True,
        )
    for what, damage in {
        "2,000 recipes": many_runs(2000),
        "600 models on the paths of WiSE": many_runs(600, "wise-m{1}-0.{2}"),
        "100 recipes with short names": many_runs(100, "{}"),
        "2,000 recipes with metrics": many_runs(2000, lines=100),
    }.items():
        words = ("rft.report", "runs", "--out", "report")
        yield row(f"a report of {what}", words, damage, answer="accepted", thorough=True)
    yield row(
        "metrics of four runs, each as long as one may be",
        ("rft.report", "runs", "--out", "report"),
        many_runs(4, lines=2**19),
        "no training curves: the metrics",
        answer="accepted",
        thorough=True,
    )
    yield row("a million deep settings", REPORT, deep_settings, answer="either", thorough=True)
    yield row(
        "80,000 URLs with passwords in the command",
        REPORT,
        command_of_urls,
        r"provenance\.json has a URL with a credential",
        thorough=True,
    )
    yield row(
        "four million lines of metrics",
        REPORT,
        long_metrics,
        r"metrics\.jsonl",
        answer="either",
        thorough=True,
    )
    yield row(
        "a line of metrics of 10^8 letters",
        REPORT,
        wide_metrics,
        r"metrics\.jsonl",
        answer="either",
    )
    yield row("100,000 sets in the results", REPORT, many_sets, "results", answer="either")
    yield row("provenance of 100 megabytes", REPORT, large_commands, "provenance", answer="either")
    yield row(
        "a tar of 30,000 empty images", (*INDEX[:3], "new/test", *INDEX[4:]), many_files, r"0\.tar"
    )
    yield row(
        "a label that is deep JSON",
        (*INDEX[:3], "new/test", *INDEX[4:], "--label-field", "x"),
        large_json_label,
        r"0\.tar",
        slow=False,
    )

    yield bracketed("{0..99999999}.tar")
    yield bracketed("{0..9999999999999999999}.tar")
    yield bracketed("{a,b}" * 40 + ".tar")
    yield bracketed("{0..999}{0..999}{0..999}.tar")
    yield bracketed("{" * 10_000 + "a,b" + "}" * 10_000 + ".tar")
    yield bracketed("{0..-99999999}.tar")
    yield bracketed("{000000000000..999999999999..1}.tar")
    yield bracketed("{a..\U0010ffff}" * 3)
    yield bracketed("a" * 10**5 + ".tar")

    yield option(FRESH, "--optim.epochs", str(10**12), says="epochs")
    yield option(DRY, "--optim.epochs", "9" * 400, says="epochs")
    yield option(DRY, "--loader.batch-size", str(10**12), says="batch")
    yield option(DRY, "--loader.workers", str(10**6), says="workers", answer="either")
    yield option(DRY, "--optim.accumulate", str(10**9), says="accumul")
    yield option(DRY, "--loader.streams", "9" * 30, says="streams")
    yield option(DRY, "--loader.held-out", str(10**15), says="held")
    yield option(DRY, "--log.keep", str(10**15), says="keep", answer="either")
    yield option(DRY, "--seed", "9" * 400, says="seed", answer="either")
    yield option(DRY, "--seed", "-1", says="seed", answer="either")
    yield option(
        (*EVALUATE[:7], "--device", "cpu"), "--workers", str(10**6), says="workers", slow=False
    )
    yield option(
        (*EVALUATE[:1], "zero/checkpoints/last.safetensors", *EVALUATE[2:]),
        "--batch-size",
        str(10**15),
        says="batch",
        answer="either",
    )
    yield option(PACK[:-1], "1000000", says="workers", slow=False, answer="either")
    yield option((*PACK[:10],), "--size", str(2**20), "--workers", "1", says="size")
    yield option((*SHOW[:2], "--step", "0"), "--epoch", str(10**30), says="epoch", answer="either")
    yield option((*SHOW[:2], "--step", "0"), "--world-size", "9" * 400, says="world")
    yield option(
        ("rft.experiments", "--runs", "r", "--data", "d"),
        "--seeds",
        str(10**9),
        says="seeds",
        slow=False,
    )
    yield option(IMPORT, "--seed", "9" * 400, says="seed", answer="either")
