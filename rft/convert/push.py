"""Uploads the folder of an export to a model hub repository, through huggingface_hub.

The login is that of huggingface_hub: HF_TOKEN in the environment, or `hf auth login`. No option
takes a token, because other users of the machine can see command lines.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import get_session, validate_repo_id

from rft.clip import hub, weights
from rft.convert.model_card import NAME as PAGE
from rft.storage import files

SCHEME = "hf://"
KINDS = ("datasets", "spaces", "models", "buckets", "kernels")  # first part of other hub addresses
SECONDS = 60.0  # timeout without a byte from the hub
HINTS = {
    401: "the token is not valid: `hf auth login`, or HF_TOKEN in the environment",
    403: "the token may not write there: it needs the role write, and USER must be you or an "
    "organisation of yours",
    404: "no such repository, or the token may not see it",
}

WITHOUT = (
    "without a network: export without --push, then rerun with it on a machine that has one "
    "(docs/export.md)"
)

log = logging.getLogger(__name__)


def repository(url: str) -> str:
    """Parse the value of --push to a repository, USER/NAME.

    Raises:
        ValueError: if it does not name a model's repository.
    """
    name = url.removeprefix(SCHEME)
    user, _, rest = name.partition("/")
    if not url.startswith(SCHEME) or not user or not rest or "/" in rest or user in KINDS:
        raise ValueError(f"--push is {url!r}; it must be {SCHEME}USER/NAME, a model repository")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push is {url!r}: {files.reason(error)}") from error
    return name


def require_login(repo: str) -> None:
    """Check that the hub answers and accepts the login, before the export is made.

    Raises:
        ValueError: if there is no token, or the hub refuses it.
    """
    if get_token() is None:
        raise ValueError(
            f"cannot push to {repo}: no login; `hf auth login`, or HF_TOKEN in the environment "
            "(docs/export.md)"
        )
    with _errors(repo):
        get_session().timeout = hub.SECONDS  # the default is to wait for ever
        _api().whoami()


def push(folder: Path, names: Set[str], repo: str, *, private: bool) -> str:
    """Upload files of an export's folder; return the address of the repository.

    A repository that holds the same model is updated, except for its page, which its owner may have
    edited. Other files in it are kept.

    Args:
        folder: the folder of the export.
        names: its files to upload; other files in the folder are not.
        repo: USER/NAME.
        private: whether a repository that is made here is private.

    Raises:
        ValueError: if the repository holds a different model, or the hub refuses the files.
    """
    api = _api()
    with _errors(repo):
        get_session().timeout = SECONDS
        # None takes the default of the organisation
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = {one.path: one for one in api.list_repo_tree(repo, recursive=True)}
    _require_same_model(repo, there, folder, names)
    if PAGE in there:
        log.info(f"{repo} has a page, {PAGE}, which is kept unchanged")
    with _errors(repo):
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=sorted(names - ({PAGE} & there.keys())),
            commit_message="Export of rft",
        )
    return f"{constants.ENDPOINT}/{repo}"


def _api() -> HfApi:
    return HfApi(endpoint=constants.ENDPOINT, library_name="rft")


def _require_same_model(repo: str, there: Mapping[str, Any], folder: Path, names: Set[str]) -> None:
    """Check that a repository is empty, or holds this export or a part of it."""
    for name in (one for one in (weights.HUB_WEIGHTS, weights.HUB_HEAD) if one in there):
        # the hub stores .safetensors as large files, which have this hash
        theirs = getattr(getattr(there[name], "lfs", None), "sha256", "")
        ours = files.sha256_file(folder / name)
        if theirs != ours:
            raise ValueError(
                f"{repo} holds a different model: its {name} is {theirs[:12] or 'no large file'}, "
                f"this one {ours[:12]}; push to a new name"
            )
    # the hub itself makes .gitattributes
    others = there.keys() - {".gitattributes", PAGE, *names}
    if others and weights.HUB_WEIGHTS not in there:
        raise ValueError(f"{repo} holds other files ({min(others)}); push to a new name")


@contextlib.contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Turn any error of the hub's library into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # its HTTP client raises types of its own
        status = hub.status_of(error)
        hint = f": {HINTS[status]}" if status in HINTS else ""
        reason = f"{constants.ENDPOINT} answers {status}{hint}" if status else files.reason(error)
        refusal = ValueError(f"cannot push to {repo}: {reason}")
        if not status:  # the hub could not be reached
            refusal.add_note(
                f"the hub is {constants.ENDPOINT}: check the network, a proxy (HTTPS_PROXY) and "
                "HF_ENDPOINT"
            )
            refusal.add_note(WITHOUT)
        raise refusal from error
