"""The folder of an export to a repository of the model hub, through huggingface_hub.

Who pushes is the login of huggingface_hub: HF_TOKEN in the environment, or `hf auth login`. No
token is on a command line, which others on the machine can see.
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
KINDS = ("datasets", "spaces", "models", "buckets", "kernels")  # first in an address of the hub's
SECONDS = 60.0  # without a byte from the hub
HINTS = {
    401: "its token is not valid: `hf auth login`, or HF_TOKEN in the environment",
    403: "its token may not write there: it needs the role write, and USER must be you or an "
    "organisation of yours",
    404: "no such repository, or none that its token may see",
}

WITHOUT = (
    "without a network: export without --push, and run the same command with it where there is one"
)

log = logging.getLogger(__name__)


def repository(url: str) -> str:
    """Return the repository, USER/NAME, that the value of --push means.

    Raises:
        ValueError: if it means none.
    """
    name = url.removeprefix(SCHEME)
    user, _, rest = name.partition("/")
    if not url.startswith(SCHEME) or not user or not rest or "/" in rest or user in KINDS:
        raise ValueError(f"--push is {url!r}; it must be {SCHEME}USER/NAME, a model's repository")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push is {url!r}: {files.reason(error)}") from error
    return name


def require_login(repo: str) -> None:
    """Check that the hub answers and knows its user, before there is anything to push.

    Raises:
        ValueError: if there is no token, or the hub does not take it.
    """
    if get_token() is None:
        raise ValueError(
            f"cannot push to {repo}: no login; `hf auth login`, or HF_TOKEN in the environment"
        )
    with _errors(repo):
        get_session().timeout = hub.SECONDS  # by itself it waits for ever
        _api().whoami()


def push(folder: Path, names: Set[str], repo: str, *, private: bool) -> str:
    """Upload files of an export's folder; return the address of the repository.

    A repository that holds the same model is brought up to date, but for its page, which its owner
    may have edited; other files in it stay.

    Args:
        folder: of the export.
        names: its files; others in the folder stay here.
        repo: USER/NAME.
        private: whether a repository that is made here is seen by its owner alone.

    Raises:
        ValueError: if the repository holds a different model, or the hub does not take the files.
    """
    api = _api()
    with _errors(repo):
        get_session().timeout = SECONDS
        # None is what the organisation has chosen
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = {one.path: one for one in api.list_repo_tree(repo, recursive=True)}
    _require_same_model(repo, there, folder, names)
    if PAGE in there:
        log.info(f"{repo} has a page, {PAGE}, which stays as it is")
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
        # large files are known by this hash, and these names are large files there
        theirs = getattr(getattr(there[name], "lfs", None), "sha256", "")
        ours = files.sha256_file(folder / name)
        if theirs != ours:
            raise ValueError(
                f"{repo} holds a different model: its {name} is {theirs[:12] or 'no large file'}, "
                f"this one {ours[:12]}; push to a new name"
            )
    # the hub makes the first of these
    others = there.keys() - {".gitattributes", PAGE, *names}
    if others and weights.HUB_WEIGHTS not in there:
        raise ValueError(f"{repo} holds other files ({min(others)}); push to a new name")


@contextlib.contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Make one line of what the hub's library raises."""
    try:
        yield
    except Exception as error:  # its HTTP client has errors of its own
        status = hub.status_of(error)
        hint = f": {HINTS[status]}" if status in HINTS else ""
        reason = f"{constants.ENDPOINT} answers {status}{hint}" if status else files.reason(error)
        refusal = ValueError(f"cannot push to {repo}: {reason}")
        if not status:  # the hub was not reached
            refusal.add_note(
                f"the hub is {constants.ENDPOINT}: check the network, a proxy (HTTPS_PROXY) and "
                "HF_ENDPOINT"
            )
            refusal.add_note(WITHOUT)
        raise refusal from error
