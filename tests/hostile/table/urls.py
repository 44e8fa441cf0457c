"""URLs in files and on command lines (C1, C10), and hostile servers."""

import base64
from collections.abc import Iterator

from rft.storage import files
from tests.hostile.rows import Answer, Row
from tests.hostile.sandbox import CANARY
from tests.hostile.world import DRY, EVALUATE, INDEX, PACK, SHOW, VERIFY, Place, Ran

# would read the reader's environment, and execute code in unconfined templates
TEMPLATE = "{{ ''.__class__ }}{{ lipsum.__globals__['os'].system('touch ran') }}"
REFERENCES = {
    "version": 1,
    "templates": {"u": TEMPLATE, "e": "{{ lipsum.__globals__['os'].environ }}"},
    "refs": {
        "manifest.json": "{{u}}",
        "000000.tar": ["{{u}}"],
        "a": base64.b64encode(b"x").decode(),
    },
}
SCHEMES = (
    "reference://::file://{work}/references.json",
    "reference://000000.tar::file://{work}/references.json",
    "simplecache::file://{outside}/precious.txt",
    "filecache::file://{outside}/precious.txt",
    "blockcache::memory://x",
    "zip://manifest.json::file://{work}/archive.zip",
    "tar://x::file://{work}/foreign/0.tar",
    "file::reference://x",
    "dir::file://{outside}",
    "github://a:b@/x",
    "ssh://localhost/etc/passwd",
    "sftp://localhost/x",
    "ftp://localhost/x",
    "smb://localhost/x",
    "pipe:touch ran",
    "data:text/plain;base64,eA==",
    "jupyter://localhost/x",
    "git://./x",
    "async_wrapper::memory://x",
    "generic://x",
    "arrow_hdfs://x/y",
    "unknown://x/y",
    "javascript:alert(1)",
)
SAYS = r"protocol|scheme|opened|::|url|may be|not allowed|relative|chain|password"


def fill(place: Place, text: str) -> str:
    return text.replace("{work}", str(place.work)).replace("{outside}", str(place.outside))


def prepared(place: Place) -> None:
    place.write("references.json", REFERENCES)


def in_manifest(name: str) -> Row:
    def damage(place: Place) -> None:
        prepared(place)
        place.edit_shard(name=fill(place, name))

    return Row(
        kind="url",
        what=f"a shard is called {name} (C1)",
        words=EVALUATE,
        damage=damage,
        says=[r"manifest\.json|shard", SAYS if "//" in name else f"{SAYS}|missing shard"],
    )


def in_config(name: str) -> Row:
    def damage(place: Place) -> None:
        prepared(place)
        place.edit("run/config.json", data=fill(place, name))

    return Row(
        kind="url",
        what=f"the data of a run is {name} (C1)",
        words=SHOW,
        damage=damage,
        says=[SAYS],
        slow=True,
    )


def typed(name: str) -> Row:
    words = ["{url}" if word == "shards" else word for word in EVALUATE]

    return Row(
        kind="url",
        what=f"--data is {name}",
        words=[name if word == "{url}" else word for word in words],
        damage=prepared,
        # without slashes, it may be a folder's name
        says=[SAYS if "//" in name else f"{SAYS}|no packed dataset"],
    )


PLACES = (
    "../train/000000.tar",
    "a/../../train/000000.tar",
    "..",
    "/etc/passwd",
    "{outside}/precious.txt",
    "file:///etc/passwd",
    "~/precious.txt",
    "a\\..\\b",
    "%2e%2e/x.tar",
    "//host/x.tar",
    "x.tar?token=1",
    "a\nb.tar",
    "a\0b.tar",
    "\u202egpj.rat",
    "-rf",
    "local://{outside}/precious.txt",
    "http:///x.tar",
    "http://user:secret@127.0.0.1:9/x.tar",
    "http://127.0.0.1:9/x.tar?sig=secret",
    "s3://",
    "http://127.0.0.1:notaport/x.tar",
    "http://[::1/x.tar",
)


def placed(name: str) -> Row:
    """A row for a shard's name that leaves its folder, or is not a name."""

    def no_secret(_: Place, ran: Ran) -> None:
        assert "secret" not in ran.stdout + ran.stderr

    return Row(
        kind="url",
        what=f"a shard lies at {name.encode('unicode_escape').decode()}",
        words=EVALUATE,
        damage=lambda place: place.edit_shard(name=fill(place, name)),
        # a complete URL, and the path of indexed shards, are permitted and then named
        says=[r"manifest\.json|shard|\.tar|://|/etc/passwd|precious"],
        holds=no_secret,
    )


def served(how: str, name: str, what: str, says: str = "", answer: Answer = "refused") -> Row:
    """A row for a server's treatment of one file of a set."""
    return Row(
        kind="url",
        what=f"{what} in place of {name}",
        words=["{url}/shards" if word == "shards" else word for word in EVALUATE[:4]]
        + list(EVALUATE[4:]),
        damage=lambda place: (place / "run/results.json").unlink(),
        server=f"{how} {name}",
        says=[name.rsplit(".", 1)[0], *([says] if says else [])],
        answer=answer,
        slow=True,
    )


def stores() -> Iterator[Row]:
    s3 = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_DEFAULT_REGION": "eu-north-1"}
    no_keys = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for what, words, variables in (
        ("read by evaluate", (*EVALUATE[:3], "s3://bucket/shards", *EVALUATE[4:]), s3),
        ("read by show", (*SHOW, "--data", "s3://bucket/shards"), s3),
        ("verified", (VERIFY[0], "s3://bucket/shards/test"), s3),
        ("read by train", tuple("s3://bucket/x" if w == "shards" else w for w in DRY), s3),
        ("packed to", tuple("s3://bucket/x" if w == "shards" else w for w in PACK), s3),
        ("indexed", (INDEX[0], "s3://bucket/{0..1}.tar", *INDEX[2:]), s3),
        ("without keys", (*SHOW, "--data", "s3://bucket/shards"), {**s3, **no_keys}),
        ("of another kind", (*SHOW, "--data", "gs://bucket/shards"), {}),
        ("that is a host", (*SHOW, "--data", "http://127.0.0.1:9/shards"), {}),
        ("with a name that none has", (*SHOW, "--data", "http://no-such-host.invalid/x"), {}),
    ):
        reported = what == "verified"
        yield Row(
            kind="url",
            what=f"a store out of reach {what} (C10)",
            words=words,
            variables=variables,
            says=[r"bucket|127\.0\.0\.1|invalid"],
            answer="reported" if reported else "refused",
            slow=True,
        )
    out = tuple("s3://bucket/log" if word == "masks" else word for word in DRY)
    yield Row(
        kind="url",
        what="checkpoints go to a store out of reach (C10)",
        words=(*[w for w in out if w != "--dry-run"], "--log.checkpoints", "s3://bucket/x"),
        variables=s3,
        says=["s3://bucket"],
        writes=["new", "new/*"],
        slow=True,
    )


def elsewhere(place: Place) -> None:
    """Let the shards of a served manifest lie at a second address."""
    shard = place.read("shards/test/manifest.json")["shards"][0]["name"]
    # the same server under a different name
    place.edit_shard(name=f"{place.url.replace('127.0.0.1', 'localhost')}/shards/test/{shard}")
    (place / "run/results.json").unlink()


def names_the_host(_: Place, ran: Ran) -> None:
    assert "localhost" in ran.stdout + ran.stderr, "it asks a second host and does not say which"


def memory_shard(place: Place) -> None:
    place.edit_shard(name="memory://x/000000.tar")


def vouched(place: Place) -> None:
    """A manifest that names a file outside of the set as its shard."""
    data = (place.outside / "precious.txt").read_bytes()
    name = str(place.outside / "precious.txt")
    place.edit_shard(name=name, bytes=len(data), sha256=files.sha256_bytes(data))


def with_credentials(place: Place) -> None:
    place.edit("run/config.json", data=f"http://user:{CANARY}@127.0.0.1:9/x")


def query(name: str) -> Row:
    return Row(
        kind="url",
        what=f"credentials in {name} are not shown",
        words=(*SHOW, "--data", f"http://127.0.0.1:9/x{name}{CANARY}"),
        slow=True,
    )


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    yield from map(in_manifest, SCHEMES)
    yield from map(in_config, SCHEMES[:9])
    yield from map(typed, SCHEMES)
    yield from map(placed, PLACES)
    yield from stores()
    yield served("endless", "manifest.json", "a list without an end (C7)")
    yield served("bomb", "manifest.json", "a gzip bomb (C7)")
    yield served("loop", "manifest.json", "redirects without an end")
    yield served("file", "manifest.json", "a redirect to a file of the reader")
    yield served("short", "manifest.json", "less than the length that it tells")
    yield served("claims", "manifest.json", "a terabyte (C7)")
    yield served("escape", "manifest.json", "a status with escape sequences")
    yield served("silence", "manifest.json", "silence")
    yield served("garbage", "manifest.json", "no HTTP")
    yield served("headers", "manifest.json", "a header without an end")
    yield served("endless", "index.npz", "an answer without an end (C7)")
    yield served("claims", "index.npz", "a terabyte (C7)")
    yield served("bomb", "index.npz", "a gzip bomb (C7)")
    yield served("endless", "000000.tar", "an answer without an end (C7)")
    yield served("loop", "000000.tar", "redirects without an end")
    yield served("short", "000000.tar", "less than the length that it tells")
    yield served("none", "", "nothing odd", answer="accepted")
    yield Row(
        kind="url",
        what="a manifest of one host names shards of another",
        words=["{url}/shards" if word == "shards" else word for word in EVALUATE],
        damage=elsewhere,
        server="none",
        answer="accepted",
        holds=names_the_host,
        slow=True,
    )
    yield Row(
        kind="url",
        what="a manifest vouches for a file of the reader's own",
        words=EVALUATE,
        damage=vouched,
        says=[r"manifest\.json|shard"],
    )
    yield Row(
        kind="url",
        what="the recorded URL of a run holds credentials",
        words=SHOW,
        damage=with_credentials,
        slow=True,
    )
    yield from map(query, ("?sas=", "?code=", ";token=", "?sig=", "#token=", "?X-Amz-Signature="))
    yield Row(
        kind="url",
        what="a file of the home folder is named by a tilde",
        words=(*SHOW, "--data", "~/no-such-folder"),
        says=["no-such-folder"],
        slow=True,
    )
