"""Which names may be opened, decided from the text alone: nothing here opens anything.

fsspec opens far more than a data root needs: chains (`simplecache::https://...`), archives in
archives, references whose templates read the reader's environment, other machines' shells. So
`check` is a list of what is open, and what it passes means the same to fsspec and its clients as
it does here. A URL is printed and recorded in many places, so one with credentials is refused
instead of being cleaned in each of them.
"""

import itertools
import posixpath
import re
import unicodedata
from urllib.parse import unquote

import fsspec

from rft.text import printable

PROTOCOLS = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
HIDDEN = "***"  # what an older rft recorded in place of credentials
BEFORE_HOST = "a user, password or token before its host"
WEB, AZURE = ("http", "https"), ("az", "abfs", "abfss")
# hosts and buckets; others read Unicode, escapes or a second "@" in them in different ways
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(:[0-9]{1,5})?")
IN_BRACKETS = re.compile(r"(?<=://)\[[0-9A-Fa-f:.]+\]")
BUCKET = re.compile(r"[A-Za-z0-9._~:-]+")
CONTAINER = re.compile(r"([A-Za-z0-9$-]+@)?[A-Za-z0-9$._-]+")
PORT = re.compile(r":[0-9]{0,5}$")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# one slash is what pathlib leaves of two; no word is tried from its middle, which takes long
START = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]{2,}):/{1,2}")
UNQUOTED = 3  # times: servers behind proxies get names that were escaped more than once
SHOWN = 300  # letters of a URL in a message
# not of a value that was hidden (HIDDEN) before
PARAMETER = re.compile(r"[?&;#]([^?&;#=]+)=(?!\*{3})")
# in a name in lower case with _ for -: what ends it or a part of it (two lines), what ends it,
# what is one of its words, what is all of it
SECRET = re.compile(
    r"""(signature|credentials?|token|secret|password|passwd|passphrase|authorization|bearer
    |accessid)($|\W)
    |(access|account|api|private|secret|shared|subscription)_?key(_?id)?$
    |(^|[_.\W])(sig|sign|sas|key|auth|pass|pw|pwd\d*|passcode|pat|jwt|hmac|t?otp|cookies?|sid)$
    |^(code|policy|session|\w*sess(ion)?_?id|hdn(ts|ea|tl)|x_(amz|goog|ms)_.*)$""",
    re.VERBOSE,
)
INSTEAD = {
    "http": (
        'put a password into ~/.netrc and set FSSPEC_HTTP=\'{"client_kwargs": {"trust_env": '
        "true}}', without which that file is not read"
    ),
    "s3": "the client takes AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "the client takes GOOGLE_APPLICATION_CREDENTIALS or gcloud's login",
    "az": "the client takes AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    "hf": "the client takes HF_TOKEN or the login of `hf auth login`",
}
# protocols that share the client, and so the advice, of another
OWNER = {"https": "http", "s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}


def check(url: str) -> str:
    """Return the protocol of a URL or path that may be opened, `file` for a plain path too.

    Raises:
        ValueError: in one line, without what may be a secret.
    """
    protocol, mark, rest = url.partition("://")
    if f"//{HIDDEN}@" in url or f"={HIDDEN}" in url:
        plain = re.sub(rf"(?<=//){re.escape(HIDDEN)}@", "", url)
        raise ValueError(
            f"{shown(plain)} was recorded without its credentials; name it again, without them, "
            "and give them to the client (docs/storage.md#credentials)"
        )
    if "::" in url and "::" not in IN_BRACKETS.sub("", url):
        raise ValueError(
            f"{shown(url)} has '::', which makes a chain of URLs; write its IPv6 address in full "
            "([0:0:0:0:0:0:0:1] for [::1]), or the name of the host"
        )
    if "::" in url:
        raise ValueError(f"{shown(url)} has '::', which makes a chain of URLs; {_open()}")
    if CONTROL.search(url):
        raise ValueError(f"{shown(url)} has a control character")
    if word := "" if mark else protocol_word(url):
        raise ValueError(
            f"{shown(url)} is no URL of {word}, and no local path: one that begins so needs a "
            f"folder before it; {_open()}"
        )
    if mark and protocol not in PROTOCOLS:
        raise ValueError(f"{shown(url)} is not opened; {_open()}")
    refuse_credentials(url)
    if mark and (fault := _fault(protocol, rest)):
        raise ValueError(f"{shown(url)} {fault}")
    return protocol if mark else "file"


def _open() -> str:
    names = f"{', '.join(PROTOCOLS[:-1])} and {PROTOCOLS[-1]}"
    return f"rft opens local paths and URLs of {names}, in lower case"


def _fault(protocol: str, rest: str) -> str:
    """Name what makes a URL of an open protocol ambiguous, as the end of a sentence."""
    if protocol == "file":
        if not rest.startswith("/") or "://" in rest:
            return "must have three slashes and an absolute path: file:///folder"
        return ""  # the rest is a path, which may hold what a path without file:// may
    elif not _kind(protocol).fullmatch(_authority(rest)):
        what = "host, perhaps with a port," if protocol in WEB else "bucket"
        return f"needs the name of a {what} after {protocol}://, in ASCII (IDN as xn--)"
    if "\\" in rest or not rest.isprintable() or rest != rest.strip():
        return "has a backslash, an unprintable character, or white space at its end"
    if protocol in WEB and "#" in rest:
        return "has a '#', behind which nothing is sent to the server; write %23"
    # unquoted: aiohttp's yarl resolves %2e%2e, S3 does not
    if {"..", "."} & set(re.split(r"[/\\?#]", unquote(rest))):
        return "has '.' or '..' between its slashes, which clients read in different ways"
    return ""


def protocol_word(path: str) -> str:
    """Find the word of a path that stands where a URL has its protocol; empty if it has none.

    `http:/x` and `s3:b` are URLs gone wrong, as are the paths that `pathlib` makes of URLs; fsspec
    reads `file:x` and `data:x` as something else than a path. Other names may have a colon.
    """
    word, mark, rest = path.partition("/")[0].partition(":")
    if not mark:
        return ""
    # pipe: is a shell command where webdataset reads URLs
    known = word.strip().lower() in (*fsspec.available_protocols(), "pipe")
    empty = not rest and path.startswith(f"{word}:/")
    return word.strip() if known or empty else ""


def is_whole(name: str) -> bool:
    """Whether a name is a URL by itself, and not to be read below another."""
    return "://" in name


def place(url: str) -> str:
    """Return the host or bucket of a URL with its protocol; nothing for a local path."""
    protocol, mark, rest = url.partition("://")
    if not mark or protocol == "file":
        return ""
    return f"{protocol}://{_authority(rest)}"


def check_relative(name: str) -> None:
    """Check that a name, joined to a folder, lies in the folder or below it.

    Raises:
        ValueError: if it is absolute, has an empty part, `.` (a second name of the same file) or
            `..`, or what some store or system would read as one of these.
    """
    parts = name.split("/")
    decoded = unquote(name)
    if not all(parts) or {".", ".."} & set(re.split(r"[/\\]", decoded)):
        raise ValueError(f"{name!a} is not a relative name without empty parts, '.' and '..'")
    # an escaped slash would part the name anew where a server decodes it
    if "\\" in decoded or decoded.count("/") != name.count("/") or CONTROL.search(decoded):
        raise ValueError(f"{name!a} has a backslash, an escaped slash or a control character")
    if "::" in name or is_whole(name) or protocol_word(name) or re.match("[A-Za-z]:", name):
        raise ValueError(f"{name!a} looks like a URL or a drive, not like a relative name")


def set_name(name: str, option: str) -> str:
    """Return the name of a packed set as results know it: without what tab completion adds.

    Raises:
        ValueError: naming the option, if the name is not a folder below the data root.
    """
    plain = posixpath.normpath(name)
    try:
        check_relative(plain)
        # normpath has resolved '..' already: a/../b would pass for b
        below = plain.strip(" .") and ".." not in name.split("/")
    except ValueError:
        below = False
    if not below:
        raise ValueError(
            f"{option} is {shown(name)!r}; name a packed set by its folder below --data, e.g. "
            "imagenet-val"
        )
    return plain


def check_shard_name(name: str, folder: str) -> None:
    """Check the name of a shard in a manifest in `folder`.

    It is relative to the folder, or a whole URL. Only a manifest on this machine may name files of
    this machine: they are what `tools/index_shards.py` writes where shards lie in another folder.

    Raises:
        ValueError: naming it.
    """
    if not (is_whole(name) or name.startswith("/")):
        check_relative(name)
        check(f"{folder}/{name}")
    elif check(name) == "file" and check(folder) != "file":
        raise ValueError(f"{name!a} is a file of the reader's machine, the manifest is not on it")


def refuse_credentials(word: str) -> None:
    """Check that no URL in a word of a command line holds a password, token, signature or key.

    Raises:
        ValueError: with what to do instead, and without the secret.
    """
    for url in urls_in(word):
        if what := credential(url):
            protocol, _ = _split(url)
            instead = INSTEAD.get(OWNER.get(protocol, protocol), "give it to the client")
            raise ValueError(
                f"{shown(url)} was given with {what}, which would be printed and recorded; leave "
                f"it out: {instead} (docs/storage.md#credentials)"
            )


def urls_in(text: str) -> list[str]:
    """Return the URLs in a text, each up to the next one or the end."""
    starts = [found.start() for found in START.finditer(text)]
    return [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])]


def credential(url: str) -> str:
    """Name the part of a URL that is a credential, in words; empty if it has none."""
    protocol, rest = _split(url.replace(f"{HIDDEN}@", ""))
    # as a lenient client might: a third slash, an escaped or a full-width "@"
    authority = _authority(rest if protocol == "file" else rest.lstrip("/"))
    authority = unicodedata.normalize("NFKC", unquote(authority))
    user, at, _ = authority.rpartition("@")
    # Azure's has a container before its account; a token alone is what some servers want
    if at and (":" in user or protocol not in AZURE):
        return BEFORE_HOST
    # a password with a slash, as S3's may have, is no port
    _, colon, _ = authority.partition(":")
    # [ begins an IPv6 address, whose colons part no password
    if colon and "@" in rest and authority[0] != "[" and not PORT.search(authority):
        return BEFORE_HOST
    for name in PARAMETER.findall(rest):
        plain = _plain(name)
        if SECRET.search(plain.lower().replace("-", "_")):
            return f"a credential in {plain[:SHOWN]!a}"
    return ""


def _plain(name: str) -> str:
    """Return the name of a parameter as a lenient server might read it."""
    for _ in range(UNQUOTED):
        name = unicodedata.normalize("NFKC", unquote(name)).strip()
    return name


def shown(url: str) -> str:
    """Return as much of a URL as can hold no credential, and as a terminal can show."""
    return printable(_without_credential(url), SHOWN)


def _without_credential(url: str) -> str:
    protocol, rest = _split(url)
    if not protocol:
        word = protocol_word(url)
        return f"{word}:{HIDDEN}" if word and re.search("[@?#;=]", url) else url
    # without a host at its beginning, some clients may still read a password in it
    doubtful = CONTROL.search(url) or not _kind(protocol).fullmatch(_authority(rest))
    if any(credential(part) == BEFORE_HOST for part in urls_in(url)) or (doubtful and "@" in rest):
        return f"{protocol}://{HIDDEN}"
    start = url[: len(url) - len(rest)]
    return start + re.split("[?#;]", rest, maxsplit=1)[0]


def redact(text: str) -> str:
    """Return a foreign library's text with its URLs cut where they hold credentials.

    A server may redirect to a signed URL, and clients repeat in errors where they were sent. There,
    a URL ends at a quote or white space too, and not in a sentence's punctuation.
    """
    found_urls = urls_in(text)
    # the URLs reach from the first one to the end, so the text before them is the rest
    parts = [text[: len(text) - sum(map(len, found_urls))]]
    for found in found_urls:
        url = re.split(r"""[\s"'<>]""", found, maxsplit=1)[0].rstrip(".,:)]}")
        if credential(url):
            cut = shown(url)
            parts.append(cut if cut.endswith(HIDDEN) else f"{cut}?{HIDDEN}")
            parts.append(found[len(url) :])
        else:
            parts.append(found)
    return "".join(parts)


def _kind(protocol: str) -> re.Pattern[str]:
    return HOST if protocol in WEB else CONTAINER if protocol in AZURE else BUCKET


def _authority(rest: str) -> str:
    return re.split(r"[/?#]", rest, maxsplit=1)[0]


def _split(url: str) -> tuple[str, str]:
    """Return protocol and the rest of the first URL in a text; nothing and the text without one."""
    found = START.search(url)
    return (found[1].lower(), url[found.end() :]) if found else ("", url)
