"""A stand-in for the model hub's API, which keeps the pushed files.

Answers have the form that huggingface_hub's own code expects: files with their commit and etag, the
creation of repositories, a commit as lines of JSON with small files inside, large files through the
Git LFS batch API and a PUT.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from benchmarks.servers.loopback import ADDRESS

COMMIT = "c" * 40
LARGE = (".safetensors", ".onnx")  # the patterns of the hub's .gitattributes for LFS


class Hub:
    """Its state, which a test sets and reads."""

    def __init__(self) -> None:
        self.token = "hf_" + "x" * 34
        self.status = 0  # of every answer, if not 0
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by their hash
        self.requests: list[str] = []
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.handle_request()

    do_GET = do_POST = do_PUT = do_HEAD

    def handle_request(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        if hub.status:
            self.answer(hub.status)
        elif "/resolve/" in path:
            self.serve(*path.strip("/").split("/resolve/main/"))
        elif path.startswith("/objects/"):  # a presigned address: without a token
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            self.answer(200)
        elif self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401)
        else:
            self.api(path, body)

    def serve(self, repo: str, name: str) -> None:
        files = self.hub.repositories.get(repo)
        if files is None:
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif name not in files:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            etag = hashlib.sha256(files[name]).hexdigest()
            self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, files[name])

    def api(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            self.answer_json({"name": "someone", "type": "user"})
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.answer_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "someone":
                self.answer(403)
                return
            status = 409 if repo in hub.repositories else 200
            if status == 200:
                hub.repositories[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
                hub.private[repo] = asked.get("visibility") == "private"
            self.answer_json({"url": f"{hub.url}/{repo}"}, status)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer_json({"transfer": "basic", "objects": self.batch(json.loads(body))})
        else:
            kind, _, rest = path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
            self.of_repository(rest, kind, path, body)

    def batch(self, asked: dict) -> list[dict]:
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
        found = []
        for one in asked["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            known = one["oid"] in self.hub.objects
            found.append(one if known else {**one, "actions": action})
        return found

    def of_repository(self, action: str, repo: str, path: str, body: bytes) -> None:
        files = self.hub.repositories.get(repo)
        if files is None:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif action == "preupload":
            asked = json.loads(body)["files"]
            modes = [(one["path"], one["path"].endswith(LARGE)) for one in asked]
            kinds = [
                {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                for name, large in modes
            ]
            self.answer_json({"files": kinds})
        elif action == "commit":
            self.commit(files, [json.loads(line) for line in body.splitlines()])
            self.answer_json({"commitUrl": f"{self.hub.url}/{repo}", "commitOid": COMMIT})
        elif action == "tree":
            self.answer_json([entry(name, data) for name, data in files.items()])
        else:
            raise AssertionError(path)

    def commit(self, files: dict[str, bytes], lines: list[dict]) -> None:
        header, *operations = lines
        assert header["key"] == "header"
        assert header["value"]["summary"]
        for one in operations:
            value = one["value"]
            if one["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert one["key"] == "lfsFile"
                files[value["path"]] = self.hub.objects[value["oid"]]

    def answer_json(self, document: object, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.answer(status, {"Content-Type": "application/json"}, data)

    def answer(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def entry(name: str, data: bytes) -> dict:
    """A file of a repository in the hub's listing."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return found


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a new hub during the body."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    with ThreadingHTTPServer((ADDRESS, 0), handler) as server:
        hub.url = f"http://{ADDRESS}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub that huggingface_hub uses instead of the real one, with an empty cache."""
    with hub_server() as running:
        ask_instead(monkeypatch, running.url, tmp_path)
        yield running


def ask_instead(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path) -> None:
    """Make huggingface_hub, which reads its environment once, use a different server."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "hub-token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "hub-tokens"),
        # its own protocol, which a stand-in does not support; the library falls back to LFS
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    # connections to the server of another test
    close_session()
