"""Files of the model hub: from its cache without a request, or downloaded if the hub answers.

open_clip and huggingface_hub retry for minutes before they report a missing network. Here a request
with a deadline comes first.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled, RemoteEntryNotFoundError
from open_clip.constants import HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

from rft.clip import weights
from rft.storage import files

SECONDS = 5.0  # deadline of the hub's first answer, for all tries together
TRIES = 3
PAUSE = 1.0  # between tries
SERVER_ERRORS = 500  # HTTP: from here on errors may be temporary, below they are final


class UnreachableError(ValueError):
    """A file that is neither in the cache nor available from the hub."""


def fetch_tag(tag: Mapping[str, Any]) -> Path:
    """Fetch the weights file of an open_clip tag, by its entry in open_clip's list.

    Raises:
        UnreachableError: as for `fetch`.
    """
    repo, _, name = str(tag.get("hf_hub", "")).rpartition("/")
    return fetch(repo, name) if repo else Path(download_pretrained(dict(tag)))


def fetch(repo: str, name: str = "") -> Path:
    """Fetch a file of a model on the hub, by default its weights.

    Raises:
        UnreachableError: if it is neither in the cache nor available from the hub; the error's
            notes list ways that work without a network.
    """
    name = name or HF_WEIGHTS_NAME
    # open_clip prefers safetensors to a pickle
    safe = weights.HUB_WEIGHTS if name == HF_WEIGHTS_NAME else f"{Path(name).stem}.safetensors"
    for one in (safe, name) if name.endswith((".bin", ".pth")) else (name,):
        if isinstance(cached := try_to_load_from_cache(repo, one), str):
            return Path(cached)
    if refusal := _refusal(hf_hub_url(repo, name)):
        raise _unreachable(repo, name, refusal)
    try:
        return Path(download_pretrained_from_hf(repo, filename=name))
    except FileNotFoundError as error:
        raise _unreachable(repo, name, files.reason(error)) from error


def _unreachable(repo: str, name: str, reason: str) -> UnreachableError:
    where = constants.ENDPOINT
    error = UnreachableError(
        f"cannot get {name} of {repo} from {where}: {reason}; without the hub, use"
    )
    download = f"hf download {repo} --include 'open_clip_*'"
    for way in (
        f"a cache: on another machine `{download}`, copy its ~/.cache/huggingface to this machine, "
        "and set HF_HOME to the copy",
        f"or a weights file: --model.pretrained FILE, with both towers, from {where}/{repo}",
        f"or a folder: --model.clip {weights.LOCAL}FOLDER, made on another machine by `{download} "
        "--local-dir FOLDER` (docs/export.md#without-a-network)",
    ):
        error.add_note(way)
    return error


def _refusal(url: str) -> str:
    """Ask the hub for a file: the reason why it cannot be downloaded, empty if it can."""
    answer: Queue[str] = Queue()
    # an abandoned daemon thread, because looking up a host name has no deadline
    Thread(target=lambda: answer.put(_ask(url)), daemon=True).start()
    try:
        return answer.get(timeout=SECONDS)
    except Empty:
        return f"no answer within {SECONDS:g} seconds"


def _ask(url: str) -> str:
    reason = ""
    for tried in range(TRIES):
        time.sleep(PAUSE if tried else 0)
        try:
            found = get_hf_file_metadata(url, timeout=SECONDS)
        except RemoteEntryNotFoundError:
            return ""  # the hub answers, and open_clip will look for other file names
        except Exception as error:  # the hub library's HTTP client has its own errors
            status = status_of(error)
            reason = f"it answers {status}" if status else files.reason(error)
            if 0 < status < SERVER_ERRORS or isinstance(error, OfflineModeIsEnabled):
                break
        else:
            # without a commit it is the page of a proxy or a login portal, which answers any
            # address
            return "" if found.commit_hash else "the server is not a model hub"
    return reason


def status_of(error: Exception) -> int:
    """Extract the HTTP status of an error of huggingface_hub; 0 if it has none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))
