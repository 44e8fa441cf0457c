"""Which URLs are opened or refused, and that fsspec interprets accepted ones as we do."""

import json
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.servers.ranges import OddHandler, Oddity, range_server, serving
from benchmarks.tiny_world import LABELS
from rft import cli, config, experiments, recipes
from rft.convert import command as convert
from rft.demo import command as demo_command
from rft.evaluate import command as evaluate_command
from rft.evaluate import localisation as localisation_command
from rft.loading import show as show_command
from rft.loading.dataset import PackedDataset
from rft.merge import choose
from rft.merge import command as merge_command
from rft.packing.foreign.index import index_shards, shard_names
from rft.packing.foreign.rule import Options
from rft.photos import command as photos_command
from rft.predict import command as predict_command
from rft.report import command as report_command
from rft.report.page import write_report
from rft.shards.manifest import Manifest
from rft.storage import documents, files, urls
from rft.train import command as train_command
from tests.report.make_runs import make_run
from tests.tiny import unstamped
from tools import index_shards as index_command
from tools import shard_folder, shard_imagenet, shard_ood
from tools import verify_shards as verify_command

SECRET = "canary"
# what a user or a manifest may contain -> part of the one-line error
REFUSED = {
    "": {},
    "cannot be opened; rft opens local paths and URLs of file, http, https, s3, s3a, gs": [
        *("ftp://h/x", "smb://h/x", "github://o:r@/x", "local:///etc/passwd", "dir:///etc"),
        *("reference://", "zip://x.zip", "tar://x.tar", "simplecache://x", "filecache://x"),
        *("HTTP://h/x", "S3://b/x", "File:///x", "FILE:///x", " http://h/x"),
        *("x://y", "://x", "a/http://h/x", "hxxp://h", "ssh://h/x", "sftp://h/x", "jar://x"),
    ],
    "is neither a URL of": [
        *("http:/h/x", "s3:/b/x", "s3:b/x", "file:/x", "file:x", "FILE:x", "data:text", "Pipe:ls"),
        *("data:,x/y", "local:x", "memory:x", "pipe:cat /etc/passwd", " data:x", "https:h"),
    ],
    "makes a chain of URLs": [
        *("zip://a.tar::https://h/a.zip", "simplecache::s3://b/x", "a::b", "/data/a::b", "::"),
        *("filecache::file:///x", "s3://b/x::http://h", "http://[::1]/a::b", "a::http://[::1]/x"),
    ],
    r"IPv6 address in full \(\[0:0:0:0:0:0:0:1\] for \[::1\]\), or use the host's name": [
        *(
            "http://[::1]:80/x",
            "https://[fe80::1]/x",
            "http://[::ffff:127.0.0.1]:8/x",
            "http://[::]",
        ),
    ],
    "has a control character": [
        "a\0b",
        "ht\ttp://h/x",
        "http://h/a\nb",
        "s3://b/\x1b[2J",
        "/data\r",
        "a\x9bb",
    ],
    "three slashes": ["file://x", "file://host/x", "file://", "file://~/x", "file:///a://b"],
    "needs the name of a": [
        *("http://", "http:///x", "s3://", "hf://", "az://", "http://h:x/", "http://:80/x"),
        *("http://h:999999/x", "http://пример/x", "http://h%2f.example/x", "s3://b\\..\\x"),
        *("http://h\u2044x/y", "https://[fe80]x/y", "http://h /x", "s3://\u212b/x"),
    ],
    "between its slashes": [
        *("http://h/a/../b", "s3://b/../c", "s3://b/%2e%2E/c", "http://h/a%2f..%2fb"),
        *("hf://datasets/x/..", "http://h/a/./b", "http://h/a/%2e%2e"),
    ],
    "a backslash, an unprintable": [
        "s3://b/a\\b",
        "http://h/x ",
        "gs://b/a\u00a0b",
        "s3://b/\u202e",
    ],
    "clients do not send": ["http://h/a#b", "https://h#/x"],
}
CASES = [(url, message) for message, found in REFUSED.items() for url in found]


@pytest.fixture
def product(monkeypatch):
    """The list of protocols as it is outside the tests."""
    monkeypatch.setattr(urls, "PROTOCOLS", tuple(p for p in urls.PROTOCOLS if p != "memory"))


@pytest.mark.parametrize(("url", "message"), [*CASES, ("memory://x", "cannot be opened")])
def test_what_is_not_opened(product, url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        files.open_store(url)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        *(
            (path, "file")
            for path in ("", ".", "..", "../x", "~/x", "/a b", "a:b", "c:\\x", "./s3:x")
        ),
        *((f"file:///{path}", "file") for path in ("a/../b", "./b", "a\\b", "..")),
        *(("file:///data/x", "file"), ("http://h/x", "http"), ("https://h:8080/a%20b", "https")),
        *(
            ("http://[fe80:0:0:0:0:0:0:1]:80/x", "http"),
            ("https://xn--e1afmkfd.example/x", "https"),
        ),
        *(("https://h/x.tar?download=true", "https"), ("https://web/2020/http://h/x", "https")),
        *(("s3://b/a@b/x:y", "s3"), ("s3a://b", "s3a"), ("s3://b/x?versionId=3", "s3")),
        *(("gs://b/x#17", "gs"), ("gcs://b_1/x", "gcs"), ("hf://datasets/x/y@main/z", "hf")),
        *(
            ("az://c/x", "az"),
            ("abfs://c@a.dfs.core.windows.net/x", "abfs"),
            ("abfss://c/x", "abfss"),
        ),
    ],
)
def test_what_is_opened(product, url: str, protocol: str) -> None:
    assert urls.check(url) == protocol
    assert (split_protocol(url)[0] or "file") == protocol
    if protocol == "file":
        fs, path = files.open_store(url)
        assert isinstance(fs, LocalFileSystem)
        if url.startswith(("/", "file:")):
            assert path == url.removeprefix("file://")


PIECES = st.sampled_from(
    [
        *(*urls.PROTOCOLS, "data", "zip", "pipe", "reference", "HTTP", "://", "://", "://", ":"),
        *("/", "//", ":/", "::", "\\", "..", ".", "%2e%2e", "%3a%3a", "@", "?", "#", ";", "="),
        *("&", "sig", "h", "b.example", "a", "[", "]", "80", " ", "\n", "\0", "~", "\u2044"),
    ]
)


def passed(url: str) -> str | None:
    """The protocol of an acceptable URL; None with one line for the rest."""
    try:
        return urls.check(url)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return None


@given(
    st.lists(PIECES, max_size=9).map("".join)
    | st.builds("{}://{}".format, st.sampled_from(urls.PROTOCOLS), st.lists(PIECES).map("".join))
    | st.text(max_size=30)
)
@example("file:///x")
@example("https://h/x")
def test_fsspec_reads_what_passes_as_we_do(url: str) -> None:
    protocol = passed(url)
    if protocol is None:
        return
    assert "::" not in url
    assert protocol in urls.PROTOCOLS
    assert (split_protocol(url)[0] or "file") == protocol
    assert fsspec.utils.get_protocol(url) == protocol
    if protocol == "file":
        # no more is removed than what we see
        fs, path = fsspec.core.url_to_fs(url)
        assert type(fs) is LocalFileSystem
        plain = Path(url.removeprefix("file://")).expanduser() if url[:1] == "~" else None
        absolute = plain or Path.cwd() / url.removeprefix("file://")
        assert Path(path) == absolute
    elif protocol in ("http", "https"):
        from yarl import URL

        with suppress(ValueError):  # a port above 65535 fails at the request
            asked = URL(url)
            assert (asked.scheme, asked.user, asked.password) == (protocol, None, None)
            authority = urls.place(url).removeprefix(f"{protocol}://")
            assert asked.authority.removesuffix(f":{asked.port}") in authority.lower()


# --- credentials --------------------------------------------------------------------------------

KEYS = (
    *("X-Amz-Signature", "x-amz-credential", "X-Amz-Security-Token", "X-Goog-Signature", "sig"),
    *(
        "token",
        "access_token",
        "api_key",
        "apikey",
        "sas",
        "code",
        "Key",
        "auth",
        "password",
        "pwd",
    ),
    *("client_secret", "AWSAccessKeyId", "GoogleAccessId", "subscription-key", "jwt", "%73ig"),
    *("authToken", "Signature", "Authorization", "a.key", "session"),
    *(
        "pw",
        "pwd2",
        "user_pw",
        "passcode",
        "otp",
        "cookie",
        "sid",
        "PHPSESSID",
        "jsessionid",
        "hdnts",
    ),
    # a server, or a proxy before it, may read these as `sig` and `token`
    *("%2573ig", "%252573ig", "\uff33\uff29\uff27", "%EF%BC%B3ig", "to%256ben", "+%20sig"),
)
WITH_SECRET = [
    *(f"https://h/x{mark}{key}={SECRET}" for key in KEYS for mark in ("?", "#", ";", "?a=1&")),
    *(f"{p}://user:{SECRET}@h/x" for p in ("http", "https", "s3", "gs", "hf", "az", "abfs", "s3a")),
    *(f"{p}://{SECRET}@h/x" for p in ("https", "s3", "gs", "hf")),
    *(f"s3://key:{SECRET}/more@b/x", f"s3://key:a:{SECRET}@b/x", f"https://u:{SECRET}@{SECRET}@h"),
    *(f"https:///u:{SECRET}@h/x", f"https://u%3A{SECRET}%40h/x", f"s3://k:{SECRET}\uff20b"),
    *(f"https://h\\@{SECRET}@x", f"abfs://c:{SECRET}@a.dfs.core.windows.net/x"),
    *(
        f"https://web/https://u:{SECRET}@h/x",
        *(f"https://u:{q}{SECRET}@h/x" for q in "'\" <,"),
        f"https://h/x?a='&sig={SECRET}",
        f"https://h/a b?sig={SECRET}",
        f"s3://b/x?versionId=1&sig={SECRET}",
    ),
    f"az://c/x?sv=1&sig={SECRET}",
]


@pytest.mark.parametrize("url", WITH_SECRET)
def test_a_credential_is_refused_with_what_to_do_instead(url: str) -> None:
    for refused in (urls.check, urls.refuse_credentials, files.read_bytes, files.exists):
        with pytest.raises(
            ValueError, match=r"leave it out: .*docs/storage\.md#credentials"
        ) as error:
            refused(url)
        assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"ftp://u:{SECRET}@h/x",
            f"https:/u:{SECRET}@h/x",
            f"s3:key:{SECRET}@b",
            f"data:{SECRET}?a=1",
        ),
        *(
            f"zip://x::https://u:{SECRET}@h",
            f"simplecache::s3://k:{SECRET}@b",
            f"HTTPS://{SECRET}@h",
        ),
        *(
            f"https://u:{SECRET}@h/\n",
            f"ftp://h/?sig={SECRET}",
            f"a/https://u:{SECRET}@h/../x",
            f"https://\tu:{SECRET}@h",
        ),
    ],
)
def test_no_other_refusal_shows_one(url: str) -> None:
    with pytest.raises(ValueError, match=r"opened|neither a URL of|chain|control") as error:
        files.open_store(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a@b.example",
            "user:password",
            "--data=s3://b/a@b",
            "https://h/x?tokenizer=clip&monkey=1",
        ),
        *(
            "abfs://c@a.dfs.core.windows.net/x",
            "http://h:8080/a@b",
            "gs://b/x?versionId=sig",
            "/a?sig=1",
        ),
    ],
)
def test_what_is_no_credential(text: str) -> None:
    urls.refuse_credentials(text)


PLACES = ("{}", "--data={}", "url=URL('{}')", '{{"data": "{}"}}', "no such file: {}, then s3://b/y")


@pytest.mark.parametrize("text", PLACES)
def test_a_foreign_text_loses_credentials_and_nothing_else(text: str) -> None:
    before, after = text.format("|").split("|")
    for url in (url for url in WITH_SECRET if not set(url) & set("'\" <")):
        found = urls.redact(text.format(url))
        assert SECRET not in found
        assert urls.redact(found) == found
        assert found.startswith(before)
        assert found.endswith(after)


class Away(OddHandler):
    """Redirects every request to a signed URL that no web client can follow."""

    def send_head(self) -> None:
        self.remaining = -1
        self.say(302, Location=f"s3://bucket/x?X-Amz-Signature={SECRET}")


def test_where_a_server_sends_us_is_told_without_its_signature(tmp_path: Path) -> None:
    """Why third-party texts are cut: the user never typed this URL. The redirect is refused."""
    handler = partial(Away, Oddity("plain", ".tar"), directory=str(tmp_path))
    with (
        serving(handler) as port,
        pytest.raises(
            ValueError, match=r"redirects to s3://bucket/x\?\*\*\*, which rft does not follow"
        ) as error,
    ):
        files.read_bytes(f"http://127.0.0.1:{port}/x")
    assert SECRET not in str(error.value)
    assert SECRET in str(error.value.__cause__.__cause__)


COMMANDS = (
    *(train_command, evaluate_command, localisation_command, show_command, merge_command, convert),
    *(report_command, predict_command, experiments, demo_command, index_command, verify_command),
    *(shard_folder, shard_imagenet, shard_ood, choose, photos_command),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_no_command_starts_with_a_credential_on_its_line(refused, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--data", f"s3://k:{SECRET}@b"], [f"--out=https://h/x?sig={SECRET}"]):
        line = refused(command, "x", *words)
        assert "leave it out: the client reads AWS" in line or "~/.netrc" in line
        assert SECRET not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("piece", ["a", "a:/", "?", "&x", "@", "https://h/", "s3:", "a@"])
def test_a_long_word_takes_no_long_time(piece: str) -> None:
    """A word of a command line can have 128 KiB: quadratic work would take minutes."""
    begun = time.process_time()
    with suppress(ValueError):
        urls.check(f"s3://b/{piece * (2**17 // len(piece))}")
    assert time.process_time() - begun < 5


def test_what_was_recorded_without_credentials_must_be_named_again(refused, tmp_path):
    (weights := tmp_path / "x.safetensors").touch()
    for url in ("https://***@host/data", "https://host/data?sig=***", "s3://***@b/x?a=1&token=***"):
        urls.refuse_credentials(url)  # they do not exist
        line = refused(evaluate_command, weights, "--data", url)
        assert "was recorded without its credentials; pass the URL without them" in line


@pytest.mark.parametrize("name", ["config.json", "provenance.json"])
def test_a_report_does_not_publish_what_a_run_folder_holds(tmp_path: Path, name: str) -> None:
    """A run of an rft that recorded the typed URL, or a hostile one."""
    run = make_run(tmp_path, "vanilla", 0)
    path = run / name
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**document, "command": ["--data", f"https://u:{SECRET}@h/x"]}))
    with pytest.raises(ValueError, match=f"{name} has a URL with a credential, which") as error:
        write_report([run], tmp_path / "report")
    assert SECRET not in str(error.value)
    assert not (tmp_path / "report").exists()


def test_a_traceback_and_a_line_show_no_foreign_credential(capsys, monkeypatch):
    def main() -> None:
        raise kind(f"cannot read https://user:{SECRET}@host/a") from OSError(f"s3://k:{SECRET}@b")

    monkeypatch.setattr(sys, "argv", ["rft"])
    kind = ValueError
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "error: cannot read https://***\n"

    kind = AssertionError
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # restored after the test
    with pytest.raises(AssertionError) as bug:
        cli.run(main)
    sys.excepthook(bug.type, bug.value, bug.tb)  # as in the interpreter
    shown = capsys.readouterr().err
    assert "AssertionError: cannot read https://***" in shown
    assert "s3://***" in shown
    assert SECRET not in shown


# --- names --------------------------------------------------------------------------------------

OUTSIDE = (
    *("../x", "a/../x", "..", "a//x", "", "a/", "a\\x", "..\\x", "%2e%2e/x", "a/%2E%2e/x", "a%2fx"),
    *("..%2fx", "a\0x", "a\nx", "C:x", "C:\\x", "c:/x", "a::b", "data:x", "file:x", "http:/h/x"),
    *("%5c..%5cx", "%00", "./x", "a/./x", "a/.", ".", "%2e/x"),
)
TIDIED = ("a//x", "a/", "./x", "a/./x", "a/.")  # on a command line, by tab completion
ELSEWHERE = ("file:///etc/passwd", "/etc/passwd", "//etc/passwd")
WHOLE = ("https://other.example/0.tar", "s3://b/0.tar", "hf://datasets/x/y/0.tar")


@pytest.mark.parametrize("name", ["0.tar", "train/0.tar", "a~b", "a b.tar", "10:30.tar", "%20.tar"])
def test_names_below_a_folder(name: str) -> None:
    for folder in ("/data", "s3://b", "https://h/x"):
        urls.check_shard_name(name, folder)
        assert files.resolve(folder, name) == f"{folder}/{name}"


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("folder", ["/data", "https://h/x"])
def test_names_that_leave_their_folder(name: str, folder: str) -> None:
    with pytest.raises(ValueError, match=r"relative name|a backslash, an escaped"):
        urls.check_shard_name(name, folder)


@pytest.mark.parametrize("name", [n for n in (*OUTSIDE, *ELSEWHERE, *WHOLE) if n not in TIDIED])
def test_names_that_are_no_sets(name: str) -> None:
    with pytest.raises(ValueError, match=r"--sets is .*; name a packed set by its folder"):
        urls.set_name(name, "--sets")


@pytest.mark.parametrize("folder", ["https://h/x", "s3://b/x", "hf://datasets/x/y"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_remote_manifest_names_no_file_of_the_reader(name: str, folder: str) -> None:
    with pytest.raises(ValueError, match="is a local file"):
        urls.check_shard_name(name, folder)
    urls.check_shard_name(name, "/data/set")  # as written by tools/index_shards.py


@pytest.mark.parametrize("folder", ["https://h/x", "/data", "s3://b/x"])
def test_a_manifest_names_whole_urls_of_the_list(product, folder: str) -> None:
    for name in WHOLE:
        urls.check_shard_name(name, folder)
    for name, _ in CASES:
        if "://" in name:
            with pytest.raises(ValueError, match=r"opened|three|chain|control|needs|between|has "):
                urls.check_shard_name(name, folder)
    for name in WITH_SECRET:
        with pytest.raises(ValueError, match="leave it out"):
            urls.check_shard_name(name, folder)


@given(
    st.lists(PIECES, max_size=6).map("".join), st.sampled_from(["/data", "s3://b/x", "http://h/x"])
)
def test_a_name_stays_below_its_folder_or_is_a_url(name: str, folder: str) -> None:
    try:
        urls.check_shard_name(name, folder)
    except ValueError:
        return
    where = files.resolve(folder, name)
    if where == name:
        assert urls.check(name) != "file" or folder == "/data"
    else:
        assert where.startswith(f"{folder}/")
        assert ".." not in where.split("/")
        if folder != "/data" and not set("?#&;=") & set(name):
            assert urls.check(where) == urls.check(folder)


def test_the_recorded_set_of_a_strangers_run_is_one_below_its_data_root(tmp_path: Path) -> None:
    document = recipes.build("vanilla", data="/data", run=str(tmp_path)).to_dict()
    for name in ("../other", "/etc", "s3://b/x", "%2e%2e/x", "a\\b", "a\nb"):
        with pytest.raises(ValueError, match="--train-set is"):
            documents.convert({**document, "train_set": name}, config.Config, "config")


# --- manifests with shards elsewhere ------------------------------------------------------------


def with_names(folder: Path, *names: str) -> Path:
    """Rename a shard in a manifest."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    for shard, name in zip(document["shards"], names, strict=False):
        shard["name"] = name
    path.write_text(json.dumps(document))
    return folder


@pytest.fixture
def copied(tiny_data: Path, tmp_path: Path) -> Path:
    """The packed set imagenet-val in the test's own folder."""
    (tmp_path / "imagenet-val").mkdir()
    for path in (tiny_data / "imagenet-val").iterdir():
        if path.is_file():
            (tmp_path / "imagenet-val" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "imagenet-val"


@pytest.mark.parametrize("name", [*OUTSIDE[:-1], "ftp://h/0.tar", "reference://x", "a::s3://b/x"])
def test_a_manifest_with_such_a_name_is_refused(copied: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{copied}/manifest.json: shards\[0\]\.name"):
        PackedDataset(str(with_names(copied, name)))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_served_manifest_opens_no_local_file(
    copied: Path, refused, name: str, tmp_path: Path
) -> None:
    (weights := tmp_path / "x.safetensors").touch()
    with range_server(with_names(copied, name).parent) as url:
        line = refused(evaluate_command, weights, "--data", url, "--sets", "imagenet-val")
    assert f"shards[0].name: {name!r} is a local file" in line


def test_other_stores_are_named_before_they_are_asked(copied: Path, tmp_path: Path, capsys) -> None:
    """Two servers: one has the manifest and the later shards, the other the first."""
    other = Oddity("plain", ".tar")
    names = [shard.name for shard in Manifest.load(str(copied)).shards]
    assert len(names) > 1
    expected = PackedDataset(str(copied)).image(0, 16)
    (tmp_path / "elsewhere").mkdir()
    (copied / names[0]).rename(tmp_path / "elsewhere" / names[0])
    handler = partial(OddHandler, other, directory=str(tmp_path / "elsewhere"))
    with serving(handler) as port, range_server(tmp_path) as url:
        place = f"http://127.0.0.1:{port}"
        with_names(copied, f"{place}/{names[0]}")
        capsys.readouterr()
        data = PackedDataset(f"{url}/imagenet-val")
        asked, said = other.requests.total(), unstamped(capsys.readouterr().err)
        assert (data.image(0, 16) == expected).all()
        assert (asked, said) == (
            0,
            f"shards of imagenet-val ({url}/imagenet-val) are read from {place} as well\n",
        )
        assert other.requests.total() > 0
        assert capsys.readouterr().err == ""


def test_only_the_main_rank_names_them(copied: Path, capsys, monkeypatch) -> None:
    names = [f"https://{n}.example/0.tar" for n in range(9)]
    manifest = Manifest.load(str(with_names(copied, *names)))
    count = len(manifest.shards)
    assert manifest.other_stores(str(copied)) == [urls.place(name) for name in names[:count]]
    assert manifest.other_stores("https://0.example/x") == [
        urls.place(name) for name in names[1:count]
    ]
    monkeypatch.setenv("RANK", "1")
    PackedDataset(str(copied))
    assert capsys.readouterr().err == ""


def test_index_shards_writes_names_that_readers_take(tiny_data: Path, tmp_path: Path) -> None:
    shard = f"{tiny_data}/imagenet-val/000000.tar"
    assert shard_names([shard], f"{tiny_data}/imagenet-val") == ["000000.tar"]
    assert shard_names([shard], str(tmp_path)) == [shard]
    # once written as "/000000.tar", which is a different file
    assert shard_names([shard.replace("/0", "//0")], f"{tiny_data}/imagenet-val") == [
        shard.replace("/0", "//0")
    ]
    with pytest.raises(ValueError, match="is a local file"):
        index_shards([shard], "memory://index-of-local", LABELS, Options(dataset="own"))


# --- folders that are written piece by piece ----------------------------------------------------

OUTS = {
    "report": (report_command, ("run", "--out")),
    "merge": (merge_command, ("uniform-soup", "a", "b", "--out")),
    "import": (convert, ("import", "x.pt", "--out")),
    "export": (convert, ("export", "run", "--to", "open-clip", "--out")),
    "train": (train_command, ("vanilla", "--data", "x", "--run-dir")),
    "cache": (train_command, ("vanilla", "--data", "x", "--run-dir", "r", "--loader.cache-dir")),
    "experiments": (experiments, ("--data", "x", "--runs")),
    "experiments report": (experiments, ("--data", "x", "--runs", "r", "--report")),
    "evaluate": (evaluate_command, ("--data", "x", "--checkpoints")),
    "demo": (demo_command, ("--out",)),
    "pretrain": (demo_command, ("pretrain", "--out")),
}


@pytest.mark.parametrize("url", ["s3://bucket/out", "https://h/x", "file:///x", "FTP://h/x"])
@pytest.mark.parametrize("name", OUTS)
def test_what_is_opened_by_its_path_is_local(refused, tmp_path, monkeypatch, name, url):
    """pathlib would make a local folder named after its protocol."""
    monkeypatch.chdir(tmp_path)
    command, words = OUTS[name]
    if words[-1] == "--checkpoints":
        words = words[:-1]
    line = refused(command, *words, url)
    assert "; it must be a local folder or file: copy it yourself before or afterwards" in line
    assert f"{OUTS[name][1][-1]} is {url.partition(':')[0]}:/" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_text_of_many_urls_is_read_once():
    def seconds(count: int) -> float:
        text = " ".join(f"http://a:b@h{n}.x" for n in range(count))
        began = time.process_time()
        assert f"h{count - 1}.x" not in urls.redact(text)
        return time.process_time() - began

    seconds(100)
    # 64 times as long, if each URL were searched in the complete text
    assert seconds(16_000) < 24 * seconds(2_000)
