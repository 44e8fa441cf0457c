"""Tar archives with wrong headers (C6, A15)."""

from collections.abc import Callable, Iterator, Sequence

from tests.hostile.rows import Answer, Row
from tests.hostile.table.images import saved
from tests.hostile.world import DEEP, EVALUATE, INDEX, Place

NEW = (*INDEX[:3], "new/test", *INDEX[4:])


def header(
    name: str = "a.jpg",
    size: bytes = b"00000000000",
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    checksum: int | None = None,
    mode: bytes = b"0000644\0",
) -> bytes:
    """The header of a member, with a correct or wrong checksum."""
    block = bytearray(512)
    block[0:100] = name.encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0")
    block[100:108] = mode
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = size.ljust(12, b"\0")[:12]
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = magic
    total = sum(block) if checksum is None else checksum
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def number(value: int) -> bytes:
    """A size in base 256, which may be negative or endless."""
    if value >= 0:
        return b"\x80" + value.to_bytes(11, "big")
    return b"\xff" + (256**11 + value).to_bytes(11, "big")


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    """A PAX header with records."""
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('_', '.')}={value}\n".encode("utf-8", "surrogateescape")
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        lines += str(length).encode() + body
    return header("PaxHeader", b"%011o" % len(lines), b"x") + pad(lines)


def member(name: str, data: bytes, **options: bytes) -> bytes:
    return header(name, b"%011o" % len(data), **options) + pad(data)


def sample(key: str = "s0", label: bytes = b"0") -> bytes:
    return member(f"{key}.jpg", saved("JPEG")) + member(f"{key}.cls", label)


END = bytes(1024)
SPARSE = {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_realsize": "9" * 20}
BROKEN: dict[str, Callable[[], bytes]] = {
    "a negative size (C6)": lambda: header(size=number(-512)) + END,
    "a size that leads back to the start (C6)": lambda: sample() + header(size=number(-1536)) + END,
    "a size without an end (C6)": lambda: header(size=number(2**80)) + END,
    "a size of 2^63 (C6)": lambda: header(size=number(2**63)) + END,
    "an octal size of eight gigabytes (C6)": lambda: header(size=b"77777777777") + END,
    "a size that is no number": lambda: header(size=b"abcdefghijk") + END,
    "a size of nothing but spaces": lambda: header("a.jpg", size=b" " * 11) + sample() + END,
    "a negative octal size": lambda: header(size=b"-0000001000") + END,
    "a PAX size that is negative (C6)": lambda: pax(size="-1024") + header() + END,
    "a PAX size without an end (C6)": lambda: pax(size="9" * 30) + header() + END,
    "a PAX size of 5,000 digits (C6)": lambda: pax(size="9" * 5000) + header() + END,
    "a PAX size that is a text": lambda: pax(size="many") + header() + END,
    "a PAX size that is no number": lambda: pax(size="nan") + header() + END,
    "a PAX record that is shorter than it says": lambda: (
        header("x", b"%011o" % 9, b"x") + pad(b"99 size=1") + END
    ),
    "a PAX record of no length (C6)": lambda: (
        header("x", b"%011o" % 9, b"x") + pad(b"0 size=1\n") + END
    ),
    "a PAX record of negative length (C6)": lambda: (
        header("x", b"%011o" % 10, b"x") + pad(b"-5 size=1\n") + END
    ),
    "a PAX header of negative size (C6)": lambda: header("x", number(-512), b"x") + END,
    "a PAX header without an end (C6)": lambda: header("x", number(2**62), b"x") + END,
    "PAX headers one behind the other (C6)": lambda: pax(comment="x") * 3000 + header() + END,
    "global PAX headers one behind the other": lambda: (
        member("x", b"11 size=-9\n", kind=b"g") * 2000 + END
    ),
    "PAX names that are no text": lambda: pax(path="a\udcff.jpg") + header() + END,
    "a sparse member (C6)": lambda: header(kind=b"S", size=b"00000001000") + bytes(512) + END,
    "a sparse member of PAX (C6)": lambda: pax(**SPARSE) + header() + END,
    "a sparse map without an end (C6)": lambda: (
        pax(GNU_sparse_map="0," * 5000 + "9") + header() + END
    ),
    "a long name without an end": lambda: header("././@LongLink", number(2**40), b"L") + END,
    "a long name of negative size (C6)": lambda: header("././@LongLink", number(-512), b"L") + END,
    "long names one behind the other": lambda: (
        member("././@LongLink", b"a" * 200, kind=b"L") * 3000 + END
    ),
    "a symbolic link": lambda: header(kind=b"2") + END,
    "a hard link": lambda: header(kind=b"1") + END,
    "a device": lambda: header(kind=b"3") + END,
    "a FIFO": lambda: header(kind=b"6") + END,
    "a kind nobody knows": lambda: header(kind=b"Z", size=b"00000001000") + bytes(512) + END,
    "a checksum that is wrong": lambda: header(checksum=1) + END,
    "no end": lambda: sample(),
    "half an end": lambda: sample() + bytes(512),
    "something behind its end": lambda: sample() + END + b"x" * 512,
    "a member that is cut off": lambda: (sample() + END)[:700],
    "nothing": lambda: b"",
    "zeros": lambda: bytes(10**6),
    "noise": lambda: bytes(range(256)) * 100,
    "a gzip": lambda: b"\x1f\x8b\x08" + bytes(1000),
    "a zip": lambda: b"PK\x03\x04" + bytes(1000),
    "a member twice": lambda: sample() + sample() + END,
    "no label": lambda: member("s.jpg", saved("JPEG")) + END,
    "a label that is no number": lambda: sample(label=b"\xff\xfe") + END,
    "a label of 10^5 digits": lambda: sample(label=b"9" * 10**5) + END,
    "a negative label": lambda: sample(label=b"-1") + END,
    "a label beyond the classes": lambda: sample(label=b"7") + END,
    "a label that is half": lambda: sample(label=b"0.5") + END,
    "a name of no letters": lambda: header("") + END,
    "an old tar whose size is not a number": lambda: (
        header(size=b"\xc3" * 11, magic=bytes(8)) + END
    ),
}
FINE: dict[str, Callable[[], bytes]] = {
    "names that leave the folder": lambda: sample("../../outside/s") + END,
    "an absolute name": lambda: sample("/etc/s") + END,
    "a device's name in a folder": lambda: sample("dev/null") + END,
}


def json_label(text: str) -> Callable[[], bytes]:
    return lambda: member("s.jpg", saved("JPEG")) + member("s.json", text.encode()) + END


LABELS = {
    "is deep": "[" * 10**5 + "]" * 10**5,
    "is a list": "[1]",
    "is true": '{"label": true}',
    "is null": '{"label": null}',
    "is half": '{"label": 0.5}',
    "is no number": '{"label": NaN}',
    "is infinite": '{"label": 1e999}',
    "has no end": '{"label": ' + "9" * 400 + "}",
    "has 5,000 digits": '{"label": ' + "9" * 5000 + "}",
    "is there twice": '{"label": 1, "label": 0}',
    "is an object": '{"label": {}}',
    "is a lone surrogate": '{"label": "\\ud800"}',
    "is a text with a line break": '{"label": "a\\nb"}',
}


def row(
    what: str,
    make: Callable[[], bytes],
    *says: str,
    words: Sequence[str] = NEW,
    answer: Answer = "refused",
    name: str = "foreign/0.tar",
) -> Row:
    return Row(
        kind="tar",
        what=what,
        words=words,
        damage=lambda place: (place / name).write_bytes(make()),
        says=says,
        answer=answer,
    )


def vouched(make: Callable[[], bytes]) -> Callable[[Place], object]:
    return lambda place: place.publish_shard(make())


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    for name, make in BROKEN.items():
        yield row(f"{name}, indexed", make, r"0\.tar")
    for name, make in FINE.items():
        yield row(f"{name}, indexed", make, r"0\.tar", answer="either")
    yield row("two samples", lambda: sample("a") + sample("b", b"1") + END, answer="accepted")
    for what, text in LABELS.items():
        words = (*NEW, "--label-field", "label")
        yield row(f"a label that {what}", json_label(text), r"0\.tar", words=words)
    for name in (
        "a negative size (C6)",
        "a size that leads back to the start (C6)",
        "a PAX size that is negative (C6)",
        "a sparse member of PAX (C6)",
        "noise",
        "nothing",
    ):
        yield Row(
            kind="tar",
            what=f"{name}, verified",
            words=DEEP,
            damage=vouched(BROKEN[name]),
            says=[r"000000\.tar"],
            answer="reported",
        )
        yield Row(
            kind="tar",
            what=f"{name}, evaluated",
            words=EVALUATE,
            damage=vouched(BROKEN[name]),
            says=[r"000000\.tar|index\.npz"],
            slow=True,
        )
