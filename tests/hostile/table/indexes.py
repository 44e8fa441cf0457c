"""Indexes that cannot be correct, with a matching manifest."""

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tests.hostile.rows import Answer, Row
from tests.hostile.table.costs import npz
from tests.hostile.world import DEEP, EVALUATE, SHOW, Place


def changed(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Place], None]:
    """Change the columns of the test set."""

    def damage(place: Place) -> None:
        columns = place.columns()
        change(columns)
        stream = io.BytesIO()
        np.savez(stream, **columns)
        place.publish_index(stream.getvalue())
        (place / "run/results.json").unlink()

    return damage


def cell(name: str, value: object) -> Callable[[Place], None]:
    return changed(lambda columns: columns[name].__setitem__(0, value))


def column(name: str, array: np.ndarray | None) -> Callable[[Place], None]:
    def change(columns: dict[str, np.ndarray]) -> None:
        columns.pop(name, None)
        if array is not None:
            columns[name] = array

    return changed(change)


def raw(data: bytes) -> Callable[[Place], object]:
    return lambda place: place.publish_index(data)


def cut(place: Place) -> None:
    data = (place / "shards/test/index.npz").read_bytes()
    place.publish_index(data[: len(data) // 2])


def encrypted(place: Place) -> None:
    data = bytearray((place / "shards/test/index.npz").read_bytes())
    for mark, skip in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            data[at + skip] |= 1
    place.publish_index(bytes(data))


def unknown_method(place: Place) -> None:
    data = bytearray((place / "shards/test/index.npz").read_bytes())
    for mark, skip in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            data[at + skip] = 99
    place.publish_index(bytes(data))


def changed_bytes(place: Place) -> None:
    path = place / "shards/test/index.npz"
    path.write_bytes(path.read_bytes() + b"x")


def shown_key(key: bytes) -> Callable[[Place], None]:
    """Give all training samples a key with terminal control characters."""

    def damage(place: Place) -> None:
        columns = place.columns("shards/train")
        columns["key"] = np.full(len(columns["key"]), key)
        stream = io.BytesIO()
        np.savez(stream, **columns)
        place.publish_index(stream.getvalue(), "shards/train")

    return damage


def swapped(columns: dict[str, np.ndarray]) -> None:
    for name in columns:
        columns[name] = columns[name][::-1]


def row(
    what: str,
    damage: Callable[[Place], object],
    *says: str,
    words: Sequence[str] = EVALUATE,
    answer: Answer = "refused",
    slow: bool = False,
) -> Row:
    if not says and answer != "accepted":
        says = (r"index\.npz",)
    return Row(
        kind="index", what=what, words=words, damage=damage, says=says, answer=answer, slow=slow
    )


FOUR = np.zeros(4, np.int64)


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    for name in ("offset", "length", "crc32", "label", "width", "height", "key"):
        yield row(f"{name} is missing (C8)", column(name, None))
    yield row("one column more (C8)", column("more", FOUR))
    yield row("offsets are floats", column("offset", FOUR.astype(float)))
    yield row("offsets are signed", column("offset", FOUR))
    yield row("offsets are texts", column("offset", np.array(["a"] * 4)))
    yield row("labels are true and false", column("label", FOUR.astype(bool)))
    yield row("labels are complex", column("label", FOUR.astype(complex)))
    yield row("labels are dates", column("label", FOUR.astype("datetime64[s]")))
    yield row("labels are a table", column("label", np.zeros((4, 1), np.int32)))
    yield row("labels are one number", column("label", np.zeros((), np.int32)))
    yield row("labels are none", column("label", np.zeros(0, np.int32)))
    yield row("labels are three", column("label", np.zeros(3, np.int32)))
    yield row(
        "labels in another byte order",
        column("label", FOUR.astype(">i4")),
        answer="either",
        slow=True,
    )
    yield row("keys are records", column("key", np.zeros(4, [("a", "i4")])))
    yield row("keys are Unicode", column("key", np.array(["a", "b", "c", "d"])))
    yield row("keys are nothing", column("key", np.zeros(4, "S0")), answer="either", slow=True)
    yield row(
        "a key is no ASCII", cell("key", b"\xff\xfe"), "index|key", answer="either", slow=True
    )
    for what, key in (("is no ASCII", b"\xff\x1b[2J"), ("has a zero inside", b"a\0b")):
        says = ("index|key", "printable ASCII")
        yield row(f"a key {what}, shown", shown_key(key), *says, words=SHOW, slow=True)
    yield row("a label is negative (C4)", cell("label", -1))
    yield row("a label is beyond the classes (C4)", cell("label", 2**31 - 1))
    yield row("an offset is beyond the shard", cell("offset", 2**40))
    yield row("an offset wraps around", cell("offset", 2**64 - 512))
    yield row("an offset is in a header", cell("offset", 1), r"index\.npz|\.tar", slow=True)
    yield row("a length is too large", cell("length", 2**31))
    yield row("a length is too small", cell("length", 5), r"index\.npz|\.tar", slow=True)
    yield row("a checksum is wrong", cell("crc32", 0), r"\.tar", "crc32", slow=True)
    yield row(
        "a checksum is wrong, verified",
        cell("crc32", 0),
        r"\.tar",
        "crc32",
        words=DEEP,
        answer="reported",
    )
    yield row("rows in another order", changed(swapped), answer="either", slow=True)
    yield row(
        "two rows are one, verified",
        changed(
            lambda columns: [columns[name].__setitem__(0, columns[name][1]) for name in columns]
        ),
        "overlaps|occurs|does not list",
        words=DEEP,
        answer="reported",
    )
    yield row("it is cut off", cut)
    yield row("it is encrypted", encrypted)
    yield row("it is packed in an unknown way", unknown_method)
    yield row("it is nothing", raw(b""))
    yield row("it is an array and no archive", raw(b"\x93NUMPY\x01\x00"))
    yield row("it is noise", raw(bytes(range(256)) * 9))
    yield row("it is a zip of texts", raw(npz({"offset": b"text"})))
    yield row(
        "it is a zip whose header is code",
        raw(
            npz(
                {
                    "offset": b"\x93NUMPY\x01\x00\x40\x00"
                    + b"__import__('os').system('touch ran')".ljust(64)
                }
            )
        ),
    )
    yield row(
        "it is a zip whose header has no end",
        raw(npz({"offset": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"})),
    )
    yield row("it is not what the manifest says", changed_bytes)
    yield row("nothing is changed", changed(lambda _: None), answer="accepted", slow=True)
