"""Links, FIFOs, folders and odd names where other users can write (C2, C3, A17)."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.hostile.rows import Answer, Row
from tests.hostile.world import (
    EVALUATE,
    EXPORT,
    FRESH,
    HUB,
    IMPORT,
    INDEX,
    LOCALISE,
    PACK,
    REPORT,
    SHOW,
    TRAIN,
    VERIFY,
    WISE,
    Place,
)

PRECIOUS = "precious.txt"
CACHED = ("--loader.cache-dir", "cache")


def row(
    what: str,
    words: Sequence[str],
    damage: Callable[[Place], object],
    *says: str,
    answer: Answer = "refused",
    **options: Any,
) -> Row:
    return Row(
        kind="path", what=what, words=words, damage=damage, says=says, answer=answer, **options
    )


def link(name: str, target: str = PRECIOUS) -> Callable[[Place], None]:
    """Replace a file or folder, if it exists, by a link to the outside."""

    def damage(place: Place) -> None:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            path.rename(path.with_name(f"{path.name}.old"))
        path.unlink(missing_ok=True)
        path.symlink_to(place.outside / target)

    return damage


def fifo(name: str) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return damage


def remote_cache(damage: Callable[[Place], object]) -> Callable[[Place], object]:
    """Simulate a different user who used the shared cache first."""

    def prepared(place: Place) -> None:
        (place / "cache").mkdir()
        damage(place)

    return prepared


def shard_sha256(place: Place) -> str:
    return place.read("shards/train/manifest.json")["shards"][0]["sha256"]


def cache_link(pattern: str) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        name = pattern.replace("SHA", shard_sha256(place))
        (place / "cache" / name).symlink_to(place.outside / PRECIOUS)

    return damage


def cached_run(what: str, damage: Callable[[Place], None], answer: Answer = "either") -> Row:
    """A row for a training from a server through a prepared cache."""
    words = ["{url}/shards" if word == "shards" else word for word in FRESH]
    return row(
        what,
        (*words, *CACHED),
        remote_cache(damage),
        "cache|folder|link",
        answer=answer,
        server="none",
        writes=["new", "new/*", "cache/*", "cache"],
        slow=True,
    )


def resumed(place: Place) -> None:
    (place / "run/training.json").unlink()
    for name in ("best.safetensors", "last.safetensors"):
        (place / "run/checkpoints" / name).unlink()


def resumed_with(damage: Callable[[Place], None]) -> Callable[[Place], None]:
    """Damage a run before it resumes."""

    def both(place: Place) -> None:
        resumed(place)
        damage(place)

    return both


def all_of_them(place: Place) -> None:
    """Make every input a link into the user's own folder, which is permitted."""
    (place / "shards").rename(place.work / "kept")
    (place / "shards").symlink_to(place.work / "kept")


def photo(name: str, damage: Callable[[Any], object]) -> Callable[[Place], None]:
    return lambda place: damage(place / "photos/red" / name)


NEW = tuple("packed" if word == "shards" else word for word in PACK)
SOURCES = (
    ("the manifest", "shards/test/manifest.json", EVALUATE),
    ("the index", "shards/test/index.npz", EVALUATE),
    (
        "a shard",
        "shards/test/000000.tar",
        (*EVALUATE[:1], "zero/checkpoints/last.safetensors", *EVALUATE[2:]),
    ),
    ("the weights", "run/checkpoints/best.safetensors", EVALUATE),
    ("the weights that are merged", "run/checkpoints/best.safetensors", WISE),
    ("the weights that are exported", "run/checkpoints/best.safetensors", EXPORT),
    ("the weights that are imported", "model.pt", IMPORT),
    ("the weights in a hub folder", "hub/open_clip_model.safetensors", HUB),
    ("the vocabulary", "clip/vocab.txt", FRESH),
    ("a mask", "masks/red3.png", LOCALISE),
    ("a tar", "foreign/0.tar", (*INDEX[:3], "new/test", *INDEX[4:])),
    ("the class list", "classes.json", NEW),
    ("a photo", "photos/red/red0.png", NEW),
    ("the verified shard", "shards/test/000000.tar", (*VERIFY, "--deep")),
)


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    for what, name, words in SOURCES:
        answer: Answer = "reported" if words[0].endswith("verify_shards.py") else "refused"
        slow = words[0] not in ("tools/shard_folder.py", "tools/verify_shards.py", "rft.evaluate")
        says = name.rsplit("/", 1)[-1].rsplit(".", 1)[0].replace(".", r"\.")
        # present, but no process needs to read it
        spare = what in ("the vocabulary", "a mask", "a photo")
        writes = ["new/*", "new", "packed", "packed/*"]
        common = {"writes": writes, "slow": slow}
        kind: Answer = "either" if spare else answer
        yield row(f"{what} is a FIFO", words, fifo(name), says, answer=kind, **common)

        def folder(place: Place, name: str = name) -> None:
            (place / name).unlink()
            (place / name).mkdir()

        yield row(f"{what} is a folder", words, folder, answer=kind, **common)

        def device(place: Place, name: str = name) -> None:
            (place / name).unlink()
            (place / name).symlink_to("/dev/zero")

        yield row(f"{what} is /dev/zero", words, device, answer=kind, **common)

    yield cached_run("the cache is empty", lambda _: None, "accepted")
    yield cached_run("a link waits as a part in the cache (C3)", cache_link(".SHA.part"))
    yield cached_run("a link waits as a shard in the cache (C3)", cache_link("SHA.tar"))
    yield cached_run("a link waits as the lock of the cache (C3)", cache_link(".lock"))
    yield cached_run("a link with a part's name lies in the cache (C3)", cache_link("x.part"))
    yield cached_run("a link with a shard's name lies in the cache (C3)", cache_link("x.tar"))
    yield cached_run("a FIFO lies in the cache", lambda place: os.mkfifo(place / "cache/x.part"))
    yield cached_run(
        "a folder with a shard's name lies in the cache",
        lambda place: (place / f"cache/{shard_sha256(place)}.tar").mkdir(),
    )

    for what, name, target in (
        ("tensorboard", "run/tensorboard", ""),
        ("checkpoints", "run/checkpoints", ""),
        ("metrics.jsonl", "run/metrics.jsonl", PRECIOUS),
        ("progress.json", "run/progress.json", PRECIOUS),
        ("provenance.json", "run/provenance.json", PRECIOUS),
        ("the lock", "run/.lock", PRECIOUS),
        ("profile", "run/profile", ""),
    ):
        yield row(
            f"{what} of a run that is resumed is a link (C3)",
            (*TRAIN, *(["--profile"] if what == "profile" else [])),
            resumed_with(link(name, target)),
            what.rsplit(" ", 1)[-1].split(".")[0],
            answer="either",
            writes=["run/*"],
            slow=True,
        )
    for what, name, words in (
        ("results.json", "run/results.json", (*EVALUATE, "--batch-size", "2")),
        ("localisation.json", "run/localisation.json", LOCALISE),
    ):
        yield row(
            f"{what} is a link", words, link(name), answer="either", writes=["run/*"], slow=True
        )
    for name in ("index.html", "table.csv", "scatter.png"):
        yield row(
            f"the report's {name} is a link",
            REPORT,
            link(f"report/{name}"),
            answer="either",
            writes=["report/*"],
            slow=True,
        )
    yield row(
        "a commit folder that is a link",
        PACK,
        lambda place: [
            link("shards/test/commit", "")(place),
            (place / "shards/test/manifest.json").unlink(),
        ],
        answer="either",
        writes=["shards/*"],
    )
    yield row("the data is a link to a folder", EVALUATE, all_of_them, answer="accepted", slow=True)

    for what, words in (
        ("an evaluation", (*EVALUATE[:1], "no\0run", *EVALUATE[2:])),
        ("a report", ("rft.report", "run", "--out", "a\0b")),
        ("a data root", (*EVALUATE[:3], "sha\0rds", *EVALUATE[4:])),
        ("a packing", tuple("pho\0tos" if word == "photos" else word for word in NEW)),
        ("an import", (*IMPORT[:2], "mod\0el.pt", *IMPORT[3:])),
        ("an indexing", (*INDEX[:1], "fore\0ign/0.tar", *INDEX[2:])),
        ("a merge", (*WISE[:2], "ze\0ro", *WISE[3:])),
        ("a verification", (VERIFY[0], "sha\0rds/test")),
        ("a training", tuple("ne\0w" if word == "new" else word for word in FRESH)),
        ("a step", ("rft.data.show", "ru\0n", "--step", "0")),
    ):
        # a shell cannot pass it; a program that calls the command in its own process can
        yield row(
            f"NUL in a path of {what}",
            words,
            lambda _: None,
            answer="reported" if what == "a verification" else "refused",
            slow=what == "a training",
        )
    for what, length in (
        ("a long name", 300),
        ("a long path", 5000),
        ("a path of 10^6 letters", 10**6),
    ):
        name = "a" * 300 if what == "a long name" else "/".join(["a" * 99] * (length // 100))
        for words in (
            (*EVALUATE[:1], name, *EVALUATE[2:]),
            (*EVALUATE[:3], name, *EVALUATE[4:]),
            ("rft.report", "run", "--out", name),
            tuple(name if word == "photos" else word for word in NEW),
            tuple(name if word == "new" else word for word in FRESH),
            ("rft.merge", "wise", "zero", "run", "--out", name),
            (*IMPORT[:2], name, *IMPORT[3:]),
        ):
            yield row(
                f"{what}: {words[0]} {words.index(name)}",
                words,
                lambda _: None,
                slow=words[0] in ("rft.train", "rft.report") or length > 300,
                writes=["a*"],
            )

    if os.geteuid():  # root can read everything
        for what, name, words in SOURCES:
            yield row(
                f"{what} must not be read",
                words,
                lambda place, name=name: (place / name).chmod(0),
                "permission",
                answer="reported" if words[0].endswith("verify_shards.py") else "refused",
                slow=True,
            )
    yield row(
        "a photo that is a broken link", NEW, photo("x.png", lambda p: p.symlink_to("y")), "x.png"
    )
    yield row(
        "a photo that is a link to itself", NEW, photo("x.png", lambda p: p.symlink_to(p)), "x.png"
    )
    yield row(
        "class folders that lead back to their parent",
        NEW,
        lambda place: (place / "photos/red/up").symlink_to(place / "photos"),
        answer="either",
        writes=["packed", "packed/*"],
    )
    yield row(
        "a class folder whose name is no UTF-8",
        NEW,
        lambda place: (place / os.fsdecode(b"photos/\xff\xfe")).mkdir(),
        "UTF-8",
    )
    yield row(
        "--out inside --source",
        (*NEW[:3], "--out", "photos/packed", *NEW[5:]),
        lambda _: None,
        "--out",
    )
    yield row(
        "a run folder that is a file",
        tuple("classes.json" if w == "new" else w for w in FRESH),
        lambda _: None,
        r"classes\.json",
    )
    yield row(
        "a report into a file",
        ("rft.report", "run", "--out", "classes.json"),
        lambda _: None,
        r"classes\.json",
        slow=True,
    )
    for what, put in (("FIFO", fifo("new.json")), ("folder", lambda p: (p / "new.json").mkdir())):
        yield row(
            f"a verification into a {what}",
            (*VERIFY, "--report", "new.json"),
            put,
            rf"new\.json is a {what} and cannot be replaced",
        )
    yield row("a merge into a file", (*WISE[:5], "classes.json"), lambda _: None, r"classes\.json")
    yield row(
        "a run folder that holds data",
        tuple("shards" if w == "new" else w for w in FRESH),
        lambda _: None,
        "shards",
    )
    yield row(
        "runs that lead in a circle",
        ("rft.report", "runs", "--out", "report"),
        lambda place: [(place / "runs").mkdir(), (place / "runs/a").symlink_to(place / "runs")],
        "runs",
    )
    yield row(
        "a step of a run that is gone",
        ("rft.data.show", "gone", "--step", "0"),
        lambda _: None,
        "gone",
    )
    yield row(
        "a run without weights",
        EVALUATE,
        lambda place: (place / "run/checkpoints/best.safetensors").unlink(),
        "best",
    )
    yield row(
        "a step that lies in the future",
        (*SHOW[:2], "--step", "99"),
        lambda _: None,
        "99",
        slow=True,
    )
