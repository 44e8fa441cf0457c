"""JSON: every document that rft reads, damaged in every general way, then in specific ways.

Damages are crossed with documents, because a fault of one reader is a fault of its kind.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.hostile.rows import Answer, Row
from tests.hostile.world import (
    DRY,
    EVALUATE,
    HUB,
    PACK,
    REPORT,
    SHOW,
    TRAIN,
    WISE,
    Place,
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document, and a command that reads it."""

    name: str
    path: str
    words: Sequence[str]
    prepare: Callable[[Place], object] = lambda _: None
    optional: bool = False
    """Whether the command works without it, or with an empty one."""
    says: str = ""
    """Other names for it than its file name."""
    writes: Sequence[str] = ()
    slow: bool = False


def unfinished(place: Place) -> None:
    """Make the run an unfinished one."""
    (place / "run/training.json").unlink()
    (place / "run/results.json").unlink()


def uncommitted(place: Place) -> None:
    """Remove the manifest of the test set."""
    (place / "shards/test/manifest.json").unlink()


def not_ended(place: Place) -> None:
    (place / "run/training.json").unlink()


NEW_CLASSES = tuple("packed" if word == "shards" else word for word in PACK)
DOCUMENTS = (
    Document(name="manifest", path="shards/test/manifest.json", words=EVALUATE),
    Document(name="plan", path="shards/test/plan.json", words=PACK, says="plan"),
    Document(name="classes", path="classes.json", words=NEW_CLASSES),
    Document(name="results", path="run/results.json", words=REPORT),
    Document(name="configuration", path="run/config.json", words=SHOW),
    Document(
        name="hub configuration",
        path="clip/open_clip_config.json",
        words=DRY,
        says="open_clip_config|CLIP",
    ),
    Document(name="card", path="hub/card.json", words=HUB, optional=True),
    Document(
        name="commit record",
        path="shards/test/commit/000000.json",
        words=PACK,
        prepare=uncommitted,
        optional=True,
        writes=["shards/test/*"],
    ),
    Document(
        name="training record",
        path="run/training.json",
        words=TRAIN,
        optional=True,
        says="training|finished run",
    ),
    Document(
        name="progress", path="run/progress.json", words=REPORT, prepare=not_ended, optional=True
    ),
    Document(name="provenance", path="run/provenance.json", words=REPORT, optional=True),
    Document(name="metrics", path="run/metrics.jsonl", words=REPORT, optional=True),
    Document(
        name="checkpoint record",
        path="run/checkpoints/step-00000002.json",
        words=TRAIN,
        prepare=unfinished,
        says="checkpoint",
        writes=["run/*"],
        slow=True,
    ),
)


def leaves_as(value: object) -> Callable[[Any], Any]:
    """A change that replaces each value that is not a list or object."""

    def change(document: Any) -> Any:
        if isinstance(document, dict):
            return {key: change(inner) for key, inner in document.items()}
        if isinstance(document, list):
            return [change(inner) for inner in document]
        return value

    return change


def change_document(place: Place, path: str, change: Callable[[Any], Any]) -> None:
    lines = [json.loads(line) for line in text_documents(place, path)]
    (place / path).write_text("".join(f"{json.dumps(change(line))}\n" for line in lines))


def text_documents(place: Place, path: str) -> list[str]:
    text = (place / path).read_text()
    return text.splitlines() if path.endswith("jsonl") else [text]


def numbers_as(text: str) -> Callable[[Place, str], None]:
    """A change that writes each number in a different way."""

    def change(place: Place, path: str) -> None:
        content = (place / path).read_text()
        (place / path).write_text(re.sub(r"(?<=[:\[,] )-?\d[\d.e-]*(?=[,\n}\]])", text, content))

    return change


def replace_by(make: Callable[[Any], object]) -> Callable[[Place, str], None]:
    """A change that replaces the document by something else."""

    def change(place: Place, path: str) -> None:
        (place / path).unlink()
        make(place / path)

    return change


def write(content: bytes) -> Callable[[Place, str], None]:
    return lambda place, path: (place / path).write_bytes(content)


def sparse(path: Any) -> None:
    with path.open("wb") as stream:
        stream.write(b"[")
        stream.truncate(5 * 2**30)


def cut(place: Place, path: str) -> None:
    data = (place / path).read_bytes()
    (place / path).write_bytes(data[: len(data) // 2])


def recode(encoding: str) -> Callable[[Place, str], None]:
    def change(place: Place, path: str) -> None:
        (place / path).write_text((place / path).read_text(), encoding=encoding)

    return change


DEEP = 100_000
DIGITS = b"[" + b"9" * 5000 + b"]\n"
Change = Callable[[Place, str], None]
# name -> change, and the answer where the document is required and where it is optional
DAMAGES: dict[str, tuple[Change, Answer, Answer]] = {
    "nested lists": (write(b"[" * DEEP + b"]" * DEEP + b"\n"), "refused", "refused"),
    "nested objects": (write(b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"\n"), "refused", "refused"),
    "a list": (write(b"[1, 2]\n"), "refused", "refused"),
    "a number": (write(b"17\n"), "refused", "refused"),
    "null": (write(b"null\n"), "refused", "refused"),
    "nothing": (write(b""), "refused", "either"),
    "cut off": (cut, "refused", "either"),
    "no text": (write(b"\xff\xfe\x00\xd8{}\n"), "refused", "refused"),
    "all values null": (
        lambda place, path: change_document(place, path, leaves_as(None)),
        "refused",
        "either",
    ),
    "all values lists": (
        lambda place, path: change_document(place, path, leaves_as([1])),
        "refused",
        "either",
    ),
    "all values objects": (
        lambda place, path: change_document(place, path, leaves_as({})),
        "refused",
        "either",
    ),
    "numbers without an end": (write(DIGITS), "refused", "refused"),
    "five gigabytes": (replace_by(sparse), "refused", "refused"),
    "a FIFO": (replace_by(os.mkfifo), "refused", "either"),
    "a folder": (replace_by(os.mkdir), "refused", "either"),
    "a link to itself": (replace_by(lambda path: path.symlink_to(path)), "refused", "either"),
    "a link to /dev/zero": (
        replace_by(lambda path: path.symlink_to("/dev/zero")),
        "refused",
        "either",
    ),
    "UTF-16": (recode("utf-16"), "either", "either"),
    "a byte order mark": (recode("utf-8-sig"), "either", "either"),
}
# similar to others; `make test` tries them only on the manifest
THOROUGH = ("a number", "null", "all values lists", "nested objects", "no text", "UTF-16")
THOROUGH += ("a link to itself", "numbers without an end")
QUICK = ("manifest", "classes", "results", "provenance", "commit record")


def crossed() -> Iterator[Row]:
    for document in DOCUMENTS:
        for name, (change, required, optional) in DAMAGES.items():
            path, prepare = document.path, document.prepare

            def damage(
                place: Place,
                path: str = path,
                prepare: Callable = prepare,
                change: Change = change,
            ) -> None:
                prepare(place)
                change(place, path)

            answer: Answer = optional if document.optional else required
            # it is rewritten if it is not a record of the shard
            if document.name == "commit record":
                answer = "either"
            yield Row(
                kind="document",
                what=f"{document.name}: {name}",
                words=document.words,
                damage=damage,
                says=[document.says or re.escape(path.rsplit("/", 1)[-1])],
                answer=answer,
                writes=document.writes,
                slow=document.slow or document.name not in QUICK,
                thorough=name in THOROUGH and document.name != "manifest",
            )


def manifest(what: str, says: str, **values: object) -> Row:
    """A row for fields of a manifest, read by an evaluation."""
    return Row(
        kind="document",
        what=f"manifest: {what}",
        words=EVALUATE,
        damage=lambda place: place.edit("shards/test/manifest.json", **values),
        says=["manifest.json", says],
    )


def shard(what: str, says: str, **values: object) -> Row:
    """A row for fields of a manifest's shard."""
    return Row(
        kind="document",
        what=f"manifest: {what}",
        words=EVALUATE,
        damage=lambda place: place.edit_shard(**values),
        says=["manifest.json|index.npz|shard", says],
    )


# other names of a document in a line, instead of its file name
NAMED = {
    "open_clip_config.json": "open_clip_config|clip",
    "training.json": "training|finished run",
    "classes.json": "class",
}


def field(
    document: str,
    what: str,
    *,
    of: str = "",
    words: Sequence[str] = REPORT,
    answer: Answer = "refused",
    before: Callable[[Place], object] = lambda _: None,
    says: str = "",
    slow: bool = False,
    **values: object,
) -> Row:
    """A row for fields of a document, or of the object `of` in it."""

    def damage(place: Place) -> None:
        before(place)
        content = place.read(document)
        inner = content
        for name in filter(None, of.split("/")):
            inner = inner[name]
        inner.update(values)
        place.write(document, content)

    name = document.rsplit("/", 1)[-1]
    return Row(
        kind="document",
        what=f"{document}: {what}",
        words=words,
        damage=damage,
        # JSON has no such number, and a JSON decoder does not know field names
        says=[NAMED.get(name, re.escape(name)), *([f"{says}|valid JSON"] if says else [])],
        answer=answer,
        slow=slow,
    )


def text(document: str, what: str, content: str, words: Sequence[str], answer: Answer) -> Row:
    """A row for a document's text; `{own}` is its content without the braces around it."""

    def damage(place: Place) -> None:
        own = (place / document).read_text().strip()[1:-1]
        (place / document).write_text(content.replace("{own}", own))

    name = document.rsplit("/", 1)[-1]
    kind, says = "document", [re.escape(name)]
    what = f"{document}: {what}"
    return Row(kind=kind, what=what, words=words, damage=damage, says=says, answer=answer)


def metrics(what: str, line: str, answer: Answer = "refused") -> Row:
    """A row for a line of metrics.jsonl."""

    def damage(place: Place) -> None:
        path = place / "run/metrics.jsonl"
        path.write_text(f"{line}\n{path.read_text()}")

    kind, says = "document", [r"metrics\.jsonl", "line 1|row 1|:1"]
    what = f"metrics line: {what}"
    return Row(
        kind=kind, what=what, words=REPORT, damage=damage, says=says, answer=answer, slow=True
    )


def unequal_columns(place: Place) -> None:
    uncommitted(place)
    record = place.read("shards/test/commit/000000.json")
    record["columns"]["label"].pop()
    place.write("shards/test/commit/000000.json", record)


def other_columns(place: Place) -> None:
    uncommitted(place)
    record = place.read("shards/test/commit/000000.json")
    record["columns"]["offset"] = [10**30, -1, "a", None]
    place.write("shards/test/commit/000000.json", record)


def escaping_shard(place: Place) -> None:
    uncommitted(place)
    record = place.read("shards/test/commit/000000.json")
    record["shard"]["name"] = "../../outside.tar"
    place.write("shards/test/commit/000000.json", record)


def is_right(place: Place, _: Any) -> None:
    """The set is unchanged since before the damage, if it exists."""
    path = place / "shards/test/manifest.json"
    if path.exists():
        shards = json.loads(path.read_text())["shards"]
        assert [one["name"] for one in shards] == ["000000.tar"]
        assert [one["samples"] for one in shards] == [4]
        assert len(place.columns()["label"]) == 4


def record(what: str, damage: Callable[[Place], None]) -> Row:
    """A row for a commit record: it is refused, or the shard is rewritten."""
    return Row(
        kind="document",
        what=f"commit record: {what}",
        words=PACK,
        damage=damage,
        says=["000000"],
        answer="either",
        writes=["shards/test/*"],
        holds=is_right,
    )


BIG, HUGE = 2**63, 10**400
OPTIM, METHOD = {"of": "optim", "words": SHOW}, {"of": "method", "words": SHOW}


def particular() -> Iterator[Row]:
    yield manifest("no groups (C4)", "groups", groups=[])
    yield manifest("overlapping groups (C4)", "groups", groups=[[0, 1], [1]])
    yield manifest("a negative class in a group (C4)", "groups", groups=[[0], [-1]])
    yield manifest("a group of texts", "groups", groups=[["0"], ["1"]])
    yield manifest("a group of booleans", "groups", groups=[[False], [True]])
    yield manifest("a class beyond the classes (C4)", "groups", groups=[[0], [2**40]])
    yield manifest("classes are numbers", "classes", classes=[1, 2])
    yield manifest("classes are one text", "classes", classes="red")
    yield manifest("classes and ids of other lengths", "class", classes=["red", "green", "b"])
    yield manifest("schema is a text", "schema", schema="1")
    yield manifest("schema is true", "schema", schema=True)
    yield manifest("a newer schema", "schema", schema=99)
    yield manifest("a negative number of images left out", "quarantined", quarantined=-1)
    yield manifest("an encoding that is a text", "encoding", encoding="pixels")
    yield manifest("an encoding of an unknown kind", "encoding", encoding={"kind": "code"})
    yield manifest("an unknown field", "surprise", surprise=1)
    yield manifest("a sha256 in capitals", "sha256", index_sha256="A" * 64)
    yield manifest("a sha256 that is too short", "sha256", index_sha256="a" * 63)
    yield manifest("a sha256 with a line break behind it", "sha256", index_sha256="a" * 64 + "\n")
    yield manifest("templates without a place for the name", "template", templates=["a square"])
    yield manifest("no shards", "shard", shards=[])
    yield shard("negative samples", "samples", samples=-1)
    yield shard("samples without an end", "samples", samples=HUGE)
    yield shard("samples that are half", "samples", samples=1.5)
    yield shard("samples that are true", "samples", samples=True)
    yield shard("negative bytes", "bytes", bytes=-1)
    yield shard("bytes without an end", "bytes|index.npz", bytes=HUGE)
    yield shard("a sha256 that is a path (C2)", "sha256", sha256="../../outside/precious.txt")
    yield shard("a sha256 that is null (C2)", "sha256", sha256=None)
    yield shard("a sha256 with a folder in it (C2)", "sha256", sha256="a" * 31 + "/" + "b" * 32)
    yield shard("a name that is null", "name", name=None)
    yield shard("a name that is empty", "name", name="")
    yield shard("a name that is a number", "name", name=7)
    yield shard("an unknown field of a shard", "surprise", surprise=1)

    results, sets = "run/results.json", "sets/test"
    yield field(results, "more correct than there are", of=sets, correct=5)
    yield field(results, "negative counts", of=sets, correct=-4, total=-4)
    yield field(results, "counts that are true", of=sets, correct=True)
    yield field(results, "counts that are half", of=sets, correct=1.5)
    yield field(results, "counts as texts", of=sets, correct="4")
    yield field(results, "counts without an end", of=sets, correct=HUGE, total=HUGE)
    yield field(results, "no number", of=sets, correct=float("nan"))
    yield field(results, "sets is a list", sets=[1])
    yield field(results, "a set is null", of="sets", test=None)
    yield field(results, "a schema that is a list", schema=[1])
    yield field(results, "step is a text", step="2")
    yield field(results, "step is negative", step=-2)
    yield field(results, "sha256 is no hash", checkpoint_sha256="best")

    config = "run/config.json"
    yield field(config, "a mask that is misspelt (C8)", mask="objct", says="mask", **METHOD)
    yield field(config, "a mask that is a list", mask=["object"], says="mask", **METHOD)
    yield field(config, "a mask that is an object", mask={}, says="mask", **METHOD)
    yield field(config, "epochs is a text", epochs="10", says="epochs", **OPTIM)
    yield field(config, "epochs is half", epochs=1.5, says="epochs", **OPTIM)
    yield field(config, "epochs is true", epochs=True, says="epochs", **OPTIM)
    yield field(config, "epochs without an end", epochs=HUGE, says="epochs", **OPTIM)
    yield field(config, "lr is a text", lr="1e-5", says="lr", **OPTIM)
    yield field(config, "lr is no number", lr=float("nan"), says="lr", **OPTIM)
    yield field(config, "lr has no end", lr=HUGE, says="lr", **OPTIM)
    yield field(config, "eps is no number", eps=float("nan"), says="eps", **OPTIM)
    yield field(config, "eps is infinite", eps=float("inf"), says="eps", **OPTIM)
    yield field(config, "beta1 is no number", beta1=float("nan"), says="beta1", **OPTIM)
    yield field(
        config, "weight decay is infinite", weight_decay=float("inf"), says="decay", **OPTIM
    )
    yield field(config, "clip norm is no number", clip_norm=float("nan"), says="clip", **OPTIM)
    yield field(config, "an unknown field", words=SHOW, surprise=1, says="surprise")
    yield field(config, "optim is a list", words=SHOW, optim=[], says="optim")
    yield field(config, "data is a number", words=SHOW, data=5, says="data")
    yield field(config, "data is null", words=SHOW, data=None, says="data")
    yield field(config, "train_set is a list", words=SHOW, train_set=["train"], says="train.set")
    yield field(config, "train_set leaves its root", words=SHOW, train_set="../x", says="train.set")
    yield field(config, "seed is a text", words=SHOW, seed="0", says="seed")
    yield field(config, "seed is half", words=SHOW, seed=0.5, says="seed")
    yield field(config, "seed without an end", words=SHOW, seed=HUGE, says="seed")
    yield field(config, "seed is an object", words=SHOW, order_seed={}, says="order_seed")
    yield field(
        config, "a batch of texts", of="loader", words=SHOW, batch_size="4", says="batch_size"
    )
    yield field(config, "no streams", of="loader", words=SHOW, streams=0, says="streams")
    yield field(
        config, "a batch without an end", of="loader", words=SHOW, batch_size=HUGE, says="batch"
    )
    yield field(config, "recipe is a list", words=REPORT, recipe=["a"], says="recipe")
    yield field(config, "recipe is an object", words=WISE, recipe={"a": 1}, says="recipe")
    yield field(config, "recipe is empty", words=REPORT, recipe=" ", says="recipe")
    yield field(config, "seed is true", words=REPORT, seed=True, says="seed")
    yield field(config, "a seed that is a text, merged", words=WISE, seed="0", says="seed")
    yield field(config, "data is a list, merged", words=WISE, data=[1], says="data")
    yield field(config, "train_set is an object, merged", words=WISE, train_set={}, says="train.s")
    yield field(config, "a name of a model that is a list", of="model", clip=[1], answer="either")
    yield field(config, "fields that are as they were written", words=SHOW, answer="accepted")

    progress = {"before": not_ended, "document": "run/progress.json"}
    yield field(what="more steps than there are", step=9, **progress)
    yield field(what="negative steps", step=-1, **progress)
    yield field(what="steps are true", step=True, **progress)
    yield field(what="steps are texts", of="", step="1", **progress)

    training = {"document": "run/training.json", "words": TRAIN}
    yield field(what="inputs is a list", inputs=[1], **training)
    yield field(what="hashes are a text", weights_sha256="abc", **training)
    yield field(what="a hash is a number", weights_sha256={"best.safetensors": 7}, **training)
    yield field(what="the set is a list", manifest_sha256=[1], **training)

    yield field(
        "run/provenance.json", "packages is a list", packages=[1], answer="either", slow=True
    )
    yield field("run/provenance.json", "command is a number", command=7, answer="either", slow=True)

    yield metrics("a number", "7")
    yield metrics("null", "null")
    yield metrics("step is a text", '{"step": "two", "loss": 1.0}')
    yield metrics("step is null", '{"step": null, "loss": 1.0}')
    yield metrics("step is a list", '{"step": [1], "loss": 1.0}')
    yield metrics("a loss is a text", '{"step": 1, "loss": "low"}')
    yield metrics("a loss is an object", '{"step": 1, "loss": {}}')
    yield metrics("a loss is a list", '{"step": 1, "ce": [], "mse": []}')
    yield metrics("a loss without an end", '{"step": 1, "loss": ' + "9" * 400 + "}", "either")
    yield metrics("a loss that is no number", '{"step": 1, "loss": NaN}', "either")
    yield metrics("a loss that is infinite", '{"step": 1, "loss": 1e999}', "either")
    yield metrics("a loss that no axis shows", '{"step": 1, "ce": 1e308}')
    yield metrics("counts of nothing", '{"step": 1, "held_out_correct": 0, "held_out_total": 0}')
    yield metrics("counts that are texts", '{"step": 1, "held_out_correct": "a"}')
    yield metrics("a step without an end", '{"step": ' + "9" * 400 + ', "loss": 1.0}')

    yield text("classes.json", "a key twice", '{"ids": ["x"], {own}}', NEW_CLASSES, "either")
    yield text("run/results.json", "a key twice", '{"step": 7, {own}}', REPORT, "either")
    yield text(
        "run/config.json", "a lone surrogate", r'{"recipe": "\ud800", {own}}', SHOW, "either"
    )
    yield field(
        "classes.json", "a name that is a lone surrogate", words=NEW_CLASSES, names=["\ud800", "b"]
    )
    yield field("classes.json", "a name with a NUL", words=NEW_CLASSES, names=["a\0b", "b"])
    yield field(
        "classes.json",
        "ids that leave the folder",
        words=NEW_CLASSES,
        ids=["../red", "green"],
        says="red",
    )
    yield field("classes.json", "a class twice", words=NEW_CLASSES, ids=["red", "red"])
    yield field("classes.json", "a class that is no text", words=NEW_CLASSES, ids=["red", 7])
    yield field(
        "classes.json", "names is an object", words=NEW_CLASSES, names={"0": "red", "1": "green"}
    )

    yield record("columns of unequal length", unequal_columns)
    yield record("columns of other values", other_columns)
    yield record("a shard that lies elsewhere", escaping_shard)

    card = {"document": "hub/card.json", "words": HUB}
    yield field(what="files is a list", files=[1], **card)
    yield field(what="a file is a number", of="files", **card, **{"head.safetensors": 7})
    yield field(what="architecture is a text", architecture="ViT", **card)
    yield field(what="classes is a number", classes=2, **card)
    yield field(what="classes hold numbers", classes=[1, 2], **card)
    yield field(what="class ids is an object", class_ids={}, **card)
    yield field(what="trained_on is a number", trained_on=7, **card)
    yield field(what="trained_on is a text", trained_on="ab", **card)
    yield field(what="trained_on holds lists", trained_on=[[[1], [2]]], **card)
    yield field(what="means are texts", of="architecture", mean=["a", "b", "c"], **card)
    yield field(
        what="means that are no numbers", of="architecture", mean=[float("nan")] * 3, **card
    )
    yield field(what="deviations of zero", of="architecture", std=[0, 0, 0], **card)

    hub = {"document": "clip/open_clip_config.json", "words": DRY, "says": "", "slow": False}
    yield field(what="a model that is a list", model_cfg=[], **hub)
    yield field(what="no width", of="model_cfg/vision_cfg", width=0, **hub)
    yield field(what="a width that is a text", of="model_cfg/vision_cfg", width="24", **hub)
    yield field(what="a negative number of layers", of="model_cfg/vision_cfg", layers=-1, **hub)
    yield field(what="layers are objects", of="model_cfg/vision_cfg", layers={}, **hub)
    yield field(what="patches of nothing", of="model_cfg/vision_cfg", patch_size=0, **hub)
    yield field(what="no heads", of="model_cfg/text_cfg", heads=0, **hub)
    yield field(what="an unknown field", of="model_cfg/text_cfg", surprise=1, **hub)
    yield field(what="a context that is a text", of="model_cfg/text_cfg", context_length="8", **hub)
    yield field(what="features are a list", of="model_cfg", embed_dim=[16], **hub)
    yield field(what="a mean that is a text", of="preprocess_cfg", mean="grey", **hub)
    yield field(what="a deviation of zero", of="preprocess_cfg", std=[0.0, 0.0, 0.0], **hub)
    yield field(what="pixels is a list", preprocess_cfg=[], **hub)


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    yield from crossed()
    yield from particular()
