"""The samples of a set: hashes and domains that cannot be correct, with a matching manifest."""

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tests.hostile.rows import Answer, Row
from tests.hostile.table.costs import header, npz
from tests.hostile.world import DRY, VERIFY, Place

TEST, TRAIN = "shards/test", "shards/train"


def columns(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def published(data: bytes, name: str = TEST) -> Callable[[Place], None]:
    """Replace a set's file; the test set is then one with which training is compared."""

    def damage(place: Place) -> None:
        place.publish_samples(data, name)
        place.edit(f"{TEST}/manifest.json", ood=True)

    return damage


def gone(place: Place) -> None:
    (place / TEST / "samples.npz").unlink()


def changed_bytes(place: Place) -> None:
    path = place / TEST / "samples.npz"
    path.write_bytes(path.read_bytes() + b"x")


def domains(*numbers: int) -> Callable[[Place], None]:
    """Give the test set two domains, and its samples these numbers of them."""

    def damage(place: Place) -> None:
        source = np.arange(len(numbers), dtype=np.uint64)
        place.publish_samples(columns(source=source, domain=np.array(numbers, np.int32)))
        place.edit(f"{TEST}/manifest.json", domains=["a", "b"])

    return damage


def row(
    what: str,
    damage: Callable[[Place], object],
    *says: str,
    words: Sequence[str] = VERIFY,
    answer: Answer = "reported",
) -> Row:
    return Row(
        kind="samples",
        what=what,
        words=words,
        damage=damage,
        says=says or (r"samples\.npz",),
        answer=answer,
        slow=words is DRY,
    )


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    four = np.arange(4, dtype=np.uint64)
    yield row("they are gone", gone)
    yield row("they are not what the manifest says", changed_bytes)
    bad = {
        "they are noise": bytes(range(256)) * 9,
        "they are nothing": b"",
        "they are three": columns(source=four[:3]),
        "they are signed": columns(source=four.astype(np.int64)),
        "they are texts": columns(source=np.array(["a"] * 4)),
        "they are a table": columns(source=four.reshape(2, 2)),
        "they have a column more": columns(source=four, more=four),
        "they have domains that are not named": columns(source=four, domain=np.zeros(4, np.int32)),
        "they claim 2^40 rows": npz({"source": header((2**40,))}),
        "they are a zip whose header is code": npz(
            {"source": b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').getcwd()".ljust(64)}
        ),
    }
    for what, data in bad.items():
        yield row(what, published(data))
    yield row("a domain is beyond the names", domains(0, 1, 2, 0), "domain 2 is not one of the 2")
    yield row("a domain is negative", domains(0, 1, -1, 0), "domain -1 is not one of the 2")
    # of the training set, which is then compared with the test set
    for what, data in bad.items():
        yield row(f"{what}, trained on", published(data, TRAIN), words=DRY, answer="refused")
    # a damaged test set only causes a warning in training
    yield row(
        "they are noise, beside the training set",
        published(bad["they are noise"]),
        words=DRY,
        answer="accepted",
    )
