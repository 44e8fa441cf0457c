"""Files of the model hub: out of its cache without a request, or fetched once the hub answers.

open_clip and huggingface_hub repeat a request for minutes before they report that there is no
network. Here one request with a deadline comes first.
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

SECONDS = 5.0  # that the hub has for its first answer, all tries together
TRIES = 3
PAUSE = 1.0  # between them
SERVER_ERRORS = 500  # HTTP: these and above may pass, those below are the hub's decision


def fetch_tag(tag: Mapping[str, Any]) -> Path:
    """Return the weights file of one of open_clip's tags, by its entry in open_clip's list.

    Raises:
        ValueError: as `fetch`.
    """
    repo, _, name = str(tag.get("hf_hub", "")).rpartition("/")
    return fetch(repo, name) if repo else Path(download_pretrained(dict(tag)))


def fetch(repo: str, name: str = "") -> Path:
    """Return a file of a model of the hub, by default its weights.

    Raises:
        ValueError: if it is neither in the cache nor to be had from the hub; the error's notes name
            what works without a network.
    """
    name = name or HF_WEIGHTS_NAME
    # what open_clip prefers to a pickle
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


def _unreachable(repo: str, name: str, reason: str) -> ValueError:
    where = constants.ENDPOINT
    error = ValueError(f"cannot get {name} of {repo} from {where}: {reason}; without the hub, use")
    download = f"hf download {repo} --include 'open_clip_*'"
    for way in (
        f"a cache: on another machine `{download}`, copy its ~/.cache/huggingface to this machine, "
        "and set HF_HOME to the copy",
        f"or a weights file: --model.pretrained FILE, with both towers, from {where}/{repo}",
        f"or a folder: --model.clip {weights.LOCAL}FOLDER, made on another machine by `{download} "
        "--local-dir FOLDER`",
    ):
        error.add_note(way)
    return error


def _refusal(url: str) -> str:
    """Return why the hub does not give a file; empty if it would."""
    answer: Queue[str] = Queue()
    # a thread that is left behind: looking up a host's name has no deadline
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
            return ""  # the hub answers; open_clip looks for other names
        except Exception as error:  # the HTTP client that the hub's library uses has its own
            status = status_of(error)
            reason = f"it answers {status}" if status else files.reason(error)
            if 0 < status < SERVER_ERRORS or isinstance(error, OfflineModeIsEnabled):
                break
        else:
            # a proxy's or a hotel's page, which answers for any address
            return "" if found.commit_hash else "what answers is no model hub"
    return reason


def status_of(error: Exception) -> int:
    """Return the HTTP status that an error of huggingface_hub carries, or 0."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))
