"""The record of a model choice on held-out images (rft/merge/choose.py). No torch."""

from pathlib import Path

from rft.runs.folder import checkpoint_path
from rft.storage import files
from rft.storage.documents import Name, Positive, Schema, Sha256, Text, Whole, document

BYTES = 2**20  # limit of a document of candidates


@document(name="candidate")
class Candidate:
    """A model that was evaluated for the choice."""

    path: Text
    sha256: Sha256
    correct: Whole


@document(name="choice")
class Choice:
    """The counts of all candidates, the images that they are of, and the chosen model."""

    schema: Schema = 1
    train_set: Name
    manifest_sha256: Sha256
    images: Positive
    """Held-out images that each candidate was evaluated on."""
    candidates: tuple[Candidate, ...]
    chosen: Text
    """Path of the run folder."""

    def __post_init__(self) -> None:
        best = max((one.correct for one in self.candidates), default=0)
        if not any(one.path == self.chosen and one.correct == best for one in self.candidates):
            raise ValueError(f"chosen is {self.chosen}, which is not the best of the candidates")


def read(path: Path) -> Choice:
    """Read the document of a choice; raises ValueError if it is absent or malformed."""
    return files.read_document(str(path), Choice, BYTES)


def is_current(found: Choice) -> bool:
    """Whether every candidate is still on disk with the weights that were evaluated."""
    weights = [(checkpoint_path(Path(one.path)), one.sha256) for one in found.candidates]
    return all(path.is_file() and files.sha256_file(path) == known for path, known in weights)
