"""Which URLs and paths may be opened, decided from the text alone: nothing here opens anything.

fsspec supports far more than a data root needs: chains (`simplecache::https://...`), archives in
archives, references whose templates read the environment, shells of other machines. So `check` is
an allowlist, and a URL that passes it means the same to fsspec and its clients as it does here.
URLs are printed and recorded in many places, so one with credentials is refused rather than cleaned
in each of them.
"""

import itertools
import posixpath
import re
import unicodedata
from urllib.parse import unquote

import fsspec

from rft.text import printable

PROTOCOLS = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
HIDDEN = "***"  # recorded by older versions in place of credentials
BEFORE_HOST = "a user, password or token before its host"
WEB, AZURE = ("http", "https"), ("az", "abfs", "abfss")
# hosts and buckets: clients disagree on Unicode, escapes and a second "@" in them
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(:[0-9]{1,5})?")
IN_BRACKETS = re.compile(r"(?<=://)\[[0-9A-Fa-f:.]+\]")
BUCKET = re.compile(r"[A-Za-z0-9._~:-]+")
CONTAINER = re.compile(r"([A-Za-z0-9$-]+@)?[A-Za-z0-9$._-]+")
PORT = re.compile(r":[0-9]{0,5}$")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# pathlib turns two slashes into one; the lookbehind avoids slow matches from the middle of a word
START = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]{2,}):/{1,2}")
UNQUOTED = 3  # times: names that pass through proxies may be escaped more than once
SHOWN = 300  # letters of a URL in a message
# excludes a value that is already hidden (HIDDEN)
PARAMETER = re.compile(r"[?&;#]([^?&;#=]+)=(?!\*{3})")
# matched against a name in lower case with _ for -: endings of the name or of a part of it (two
# lines), endings of the name, one of its words, the entire name
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
        "true}}', or that file is ignored"
    ),
    "s3": "the client reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "the client reads GOOGLE_APPLICATION_CREDENTIALS or gcloud's login",
    "az": "the client reads AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    "hf": "the client reads HF_TOKEN or the login of `hf auth login`",
}
# rft's extra that installs the client
EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure", "hf": "hub"}
# protocols that share a client, and so its advice
OWNER = {"https": "http", "s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}


def check(url: str) -> str:
    """Check that a URL or path may be opened, and return its protocol: `file` for a plain path.

    Raises:
        ValueError: on one line, with possible secrets removed.
    """
    protocol, mark, rest = url.partition("://")
    # refused here: `credential` below does not count the placeholder as a secret
    if f"//{HIDDEN}@" in url or f"={HIDDEN}" in url:
        plain = re.sub(rf"(?<=//){re.escape(HIDDEN)}@", "", url)
        raise ValueError(
            f"{shown(plain)} was recorded without its credentials; pass the URL without them, and "
            "give them to the client (docs/storage.md#credentials)"
        )
    # valid in a URL, but fsspec splits at '::' even inside the brackets of an IPv6 address
    if "::" in url and "::" not in IN_BRACKETS.sub("", url):
        raise ValueError(
            f"{shown(url)} has '::', which makes a chain of URLs; write its IPv6 address in full "
            "([0:0:0:0:0:0:0:1] for [::1]), or use the host's name"
        )
    if "::" in url:
        raise ValueError(f"{shown(url)} has '::', which makes a chain of URLs; {_open()}")
    if CONTROL.search(url):
        raise ValueError(f"{shown(url)} has a control character")
    if word := "" if mark else protocol_word(url):
        raise ValueError(
            f"{shown(url)} is neither a URL of {word} nor a local path; put ./ before a path that "
            f"begins like this; {_open()}"
        )
    if mark and protocol not in PROTOCOLS:
        raise ValueError(f"{shown(url)} cannot be opened; {_open()}")
    refuse_credentials(url)
    if mark and (fault := _fault(protocol, rest)):
        raise ValueError(f"{shown(url)} {fault}")
    return protocol if mark else "file"


def _open() -> str:
    names = f"{', '.join(PROTOCOLS[:-1])} and {PROTOCOLS[-1]}"
    return f"rft opens local paths and URLs of {names}, in lower case (docs/storage.md#urls)"


def _fault(protocol: str, rest: str) -> str:
    """Describe what makes a URL of an allowed protocol ambiguous, as the end of a sentence."""
    if protocol == "file":
        if not rest.startswith("/") or "://" in rest:
            return "must have three slashes and an absolute path: file:///folder"
        return ""  # the rest is a path, with the same rules as one without file://
    elif not _kind(protocol).fullmatch(_authority(rest)):
        what = "host, perhaps with a port," if protocol in WEB else "bucket"
        return f"needs the name of a {what} after {protocol}://, in ASCII (IDN as xn--)"
    if "\\" in rest or not rest.isprintable() or rest != rest.strip():
        return "has a backslash, an unprintable character, or white space at its end"
    if protocol in WEB and "#" in rest:
        return "has a '#', and clients do not send what follows it; write %23"
    # unquoted: aiohttp's yarl resolves %2e%2e, S3 does not
    if {"..", "."} & set(re.split(r"[/\\?#]", unquote(rest))):
        return "has '.' or '..' between its slashes, which clients interpret differently"
    return ""


def protocol_word(path: str) -> str:
    """Find the word of a path that looks like a URL's protocol; empty if it has none.

    `http:/x` and `s3:b` are malformed URLs, as are the paths that `pathlib` makes of URLs. fsspec
    does not read `file:x` and `data:x` as paths. Other names may contain a colon.
    """
    word, mark, rest = path.partition("/")[0].partition(":")
    if not mark:
        return ""
    # webdataset runs pipe: URLs as shell commands
    known = word.strip().lower() in (*fsspec.available_protocols(), "pipe")
    empty = not rest and path.startswith(f"{word}:/")
    return word.strip() if known or empty else ""


def is_whole(name: str) -> bool:
    """Whether a name is a complete URL, rather than relative to a different one."""
    return "://" in name


def place(url: str) -> str:
    """Extract the host or bucket of a URL, with its protocol; empty for a local path."""
    protocol, mark, rest = url.partition("://")
    if not mark or protocol == "file":
        return ""
    return f"{protocol}://{_authority(rest)}"


def check_relative(name: str) -> None:
    """Check that a name, joined to a folder, stays below the folder.

    Raises:
        ValueError: if it is absolute, has an empty part, `.` (a second name of the same file) or
            `..`, or anything that some store or system would interpret as one of these.
    """
    parts = name.split("/")
    decoded = unquote(name)
    if not all(parts) or {".", ".."} & set(re.split(r"[/\\]", decoded)):
        raise ValueError(f"{name!a} is not a relative name without empty parts, '.' and '..'")
    # a server that decodes an escaped slash would split the name differently
    if "\\" in decoded or decoded.count("/") != name.count("/") or CONTROL.search(decoded):
        raise ValueError(f"{name!a} has a backslash, an escaped slash or a control character")
    if "::" in name or is_whole(name) or protocol_word(name) or re.match("[A-Za-z]:", name):
        raise ValueError(f"{name!a} looks like a URL or a drive, not a relative name")


def set_name(name: str, option: str) -> str:
    """Normalise the name of a packed set to its form in results: without a trailing slash.

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

    It is relative to the folder, or a complete URL. Only a local manifest may name local files by
    an absolute path, as `tools/index_shards.py` writes for shards in a different folder.

    Raises:
        ValueError: naming it.
    """
    if not (is_whole(name) or name.startswith("/")):
        check_relative(name)
        check(f"{folder}/{name}")
    elif check(name) == "file" and check(folder) != "file":
        raise ValueError(
            f"{name!a} is a local file, but the manifest is remote: name the shards by URL, or "
            "choose their own folder as --out"
        )


def refuse_credentials(word: str) -> None:
    """Check that no URL in a word of a command line contains a password, token, signature or key.

    Raises:
        ValueError: with the alternative, and without the secret.
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
    """Split a text into its URLs, each up to the next one or the end."""
    starts = [found.start() for found in START.finditer(text)]
    return [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])]


def credential(url: str) -> str:
    """Describe the part of a URL that is a credential; empty if it has none."""
    protocol, rest = _split(url.replace(f"{HIDDEN}@", ""))
    # as a lenient client might: a third slash, an escaped or a full-width "@"
    authority = _authority(rest if protocol == "file" else rest.lstrip("/"))
    authority = unicodedata.normalize("NFKC", unquote(authority))
    user, at, _ = authority.rpartition("@")
    # Azure has a container before the "@"; some servers expect a token without a colon
    if at and (":" in user or protocol not in AZURE):
        return BEFORE_HOST
    # not a port but the start of a password with a slash, as S3's may have
    _, colon, _ = authority.partition(":")
    # [ begins an IPv6 address, whose colons do not separate a password
    if colon and "@" in rest and authority[0] != "[" and not PORT.search(authority):
        return BEFORE_HOST
    for name in PARAMETER.findall(rest):
        plain = _plain(name)
        if SECRET.search(plain.lower().replace("-", "_")):
            return f"a credential in {plain[:SHOWN]!a}"
    return ""


def _plain(name: str) -> str:
    """Decode the name of a parameter as a lenient server might read it."""
    for _ in range(UNQUOTED):
        name = unicodedata.normalize("NFKC", unquote(name)).strip()
    return name


def installation(url: str) -> str:
    """Describe how to install the client of a URL's protocol, as the end of a message."""
    protocol, _ = _split(url)
    extra = EXTRAS.get(OWNER.get(protocol, protocol))
    return f"; in rft's clone: pip install '.[{extra}]'" if extra else ""


def shown(url: str) -> str:
    """Shorten a URL for printing: without possible credentials and unprintable letters."""
    return printable(_without_credential(url), SHOWN)


def _without_credential(url: str) -> str:
    protocol, rest = _split(url)
    if not protocol:
        word = protocol_word(url)
        return f"{word}:{HIDDEN}" if word and re.search("[@?#;=]", url) else url
    # even without a valid host, some clients may read a password in it
    doubtful = CONTROL.search(url) or not _kind(protocol).fullmatch(_authority(rest))
    if any(credential(part) == BEFORE_HOST for part in urls_in(url)) or (doubtful and "@" in rest):
        return f"{protocol}://{HIDDEN}"
    start = url[: len(url) - len(rest)]
    return start + re.split("[?#;]", rest, maxsplit=1)[0]


def redact(text: str) -> str:
    """Remove credentials from the URLs in a text of another library.

    A server may redirect to a signed URL, and clients quote that URL in errors. In such a text a
    URL also ends at a quote or white space, and excludes trailing punctuation.
    """
    found_urls = urls_in(text)
    # the URLs cover everything from the first one on; this is the text before it
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
    """Split the first URL in a text into protocol and rest; without a URL: "" and the text."""
    found = START.search(url)
    return (found[1].lower(), url[found.end() :]) if found else ("", url)
