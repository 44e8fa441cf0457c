"""A tiny world for tests: coloured squares in the official layouts, and a random CLIP for them."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft import cli
from rft.packing.pack import Options, pack
from rft.shards.label_space import LabelSpace
from rft.storage import files
from tests.forked import Request

SIZE = 16
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (90,) * 3}
LABELS = LabelSpace(
    ids=tuple(f"n0000000{n}" for n in range(len(COLOURS))),
    names=tuple(COLOURS),
    templates=("a {c} square", "{c}"),
)
WORDS = ("", "<start>", "a", "square", *COLOURS, "<end>")
# odd sizes on purpose: none divides by two or three
COUNTS = {"imagenet-train": 19, "imagenet-val": 7, "imagenet-r": 5, "imagenet-a": 3}


def write_images(root: Path, dataset: str, per_class: int) -> None:
    folder = {"imagenet-train": "imagenet/train", "imagenet-val": "imagenet/val"}
    rng = np.random.default_rng(len(dataset))
    for wnid, colour in zip(LABELS.ids, COLOURS.values(), strict=True):
        classes = root / folder.get(dataset, dataset) / wnid
        classes.mkdir(parents=True)
        for n in range(per_class):
            pixels = np.array(colour) + rng.normal(0, 60, (SIZE, SIZE, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(classes / f"{wnid}_{n}.png")


def shards(root: Path) -> Path:
    """The data root of `write_data`'s world."""
    return root / "shards"


def write_data(root: Path) -> Path:
    """Images and shards of four small sets; returns the data root."""
    for dataset, per_class in COUNTS.items():
        write_images(root / "images", dataset, per_class)
        options = Options(encoding="pixels", size=SIZE, shard_mb=0.02, workers=1)
        pack(dataset, str(root / "images"), str(shards(root)), LABELS, options)
    return shards(root)


def clip_name(folder: Path) -> str:
    """The --model.clip of `write_clip`'s CLIP."""
    return f"local-dir:{folder}"


def write_clip(folder: Path) -> str:
    """A random CLIP in open_clip's folder form; returns its name for --model.clip."""
    # here, because processes that start and end in a test import this module for other things
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "layers": 2,
            "width": 24,
            "head_width": 8,
            "patch_size": 4,
            "image_size": SIZE,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": len(WORDS),
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**config)
    document = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return clip_name(folder)


STAMP = re.compile(
    r"^20[0-9]{2}-[01][0-9]-[0-3][0-9] [0-2][0-9](?::[0-5][0-9]){2} \[[0-9]+\] (?:INFO: )?", re.M
)


def unstamped(printed: str) -> str:
    """Output without times and ranks: a line of INFO is its text, others keep their level."""
    return STAMP.sub("", printed)


def complaints(errors: str) -> list[str]:
    """The lines of a stderr that are no line of INFO: warnings, less their time, and an error."""
    lines = [line for line in errors.splitlines() if "] INFO: " not in line]
    return [unstamped(line) for line in lines]


def call(command, *arguments: object) -> None:
    """Run a command's `main` in this process, as a rank if a test has set RANK."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rft", *map(str, arguments)])
        cli.run(command.main, ranks="RANK" in os.environ)


def training(
    recipe: str, data: Path | str, clip: str, run: Path | str, *options: object
) -> list[str]:
    """The command line after `rft.train`: one short epoch on the tiny world, less `options`."""
    small = ("--scale", "miniature", "--loader.batch-size", 6, "--loader.held-out", 8)
    small += ("--loader.workers", 0, "--optim.epochs", 1)
    named = ("--data", data, "--run-dir", run, "--model.clip", clip)
    return [recipe, *map(str, (*named, *small, *options))]


def train(
    recipe: str, data: Path | str, clip: str, run: Path, *options: object, ranks: int = 1
) -> Path:
    """Train on the tiny world, one rank in this process; returns the run folder."""
    # here, because processes that start and end in a test import this module for other things
    from rft.train import command

    words = training(recipe, data, clip, run, *options)
    if ranks == 1:
        call(command, *words)
    else:
        torchrun(ranks, "rft.train", *words)
    return run


def environment(**extra: str) -> dict[str, str]:
    """This process's environment on one thread, as torchrun sets it for several ranks."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **extra}


def torchrun_command(ranks: int, *module_and_options: str) -> list[str]:
    """One process is started without torchrun: the same code, and the faster test."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "-m", *module_and_options]


def torchrun(
    ranks: int, *module_and_options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a module on so many ranks to its end, as torchrun does but sooner (tests/forked.py)."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        output.touch()
        errors.touch()
        request = Request(
            ranks=ranks,
            words=module_and_options,
            environment=environment(**variables),
            folder=str(Path.cwd()),
            output=str(output),
            errors=str(errors),
        )
        server = rank_server()
        server.stdin.write(request.to_line())
        server.stdin.flush()
        code = int(server.stdout.readline())
        result = subprocess.CompletedProcess(
            module_and_options, code, output.read_text(), errors.read_text()
        )
    # gloo can abort in teardown when all work is done: callers judge by the files that are there
    if code:
        print(result.stdout[-3000:], result.stderr[-6000:])
    return result


@functools.cache
def rank_server() -> subprocess.Popen[str]:
    """Return the process that ranks are forked from; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.forked"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def forget_weights(run: Path) -> None:
    """Let a finished run folder be one of an older rft: it does not know the hashes of its weights.

    What a test then puts in their place is noticed by other means, or used.
    """
    for path in (run / "training.json", run / "provenance.json"):
        if path.is_file():
            record = json.loads(path.read_text())
            record.pop("weights_sha256", None)
            path.write_text(json.dumps(record))


def weights(run: Path) -> list[str]:
    """The hashes of a finished run's selected and last weights."""
    # what their names are is in a module that imports open_clip
    names = ("best.safetensors", "last.safetensors")
    return [files.sha256_file(run / "checkpoints" / name) for name in names]


def kill_when(command: list[str], reached: callable) -> None:
    """Start a command in its own session; SIGKILL all of it as soon as `reached()` holds."""
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not reached():
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        # torchrun starts every rank in a session of its own
        for pid in children(process.pid):
            kill(pid)
        kill(process.pid)
        process.wait()


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            listed = task.read_text().split()
        except OSError:  # it ended between listing and reading
            continue
        for child in map(int, listed):
            found += [child, *children(child)]
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
