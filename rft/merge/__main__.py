"""Average fine-tuned weights: `python -m rft.merge wise START END --alpha 0.5 --out DIR`."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from rft import cli, files
from rft.clip.classifier import SELECTED, checkpoint_path, load_state, save_state
from rft.method.averaging import interpolate

USAGE = """Average the weights of fine-tuned models.

usage: python -m rft.merge wise ZERO_SHOT FINE_TUNED --out DIR [--alpha 0.5]

wise  WiSE-FT: (1 - alpha) x zero-shot + alpha x fine-tuned; `wise --help` tells more
"""


@dataclass(frozen=True)
class Wise:
    """WiSE-FT: (1 - alpha) x zero-shot + alpha x fine-tuned, over every weight, head included."""

    start: tyro.conf.Positional[Path]
    """The zero-shot model: a run folder or a .safetensors file."""
    end: tyro.conf.Positional[Path]
    """The fine-tuned model: a run folder or a .safetensors file."""
    out: Path
    """Run folder to make."""
    alpha: float = 0.5
    """Share of the fine-tuned model, in [0, 1]."""


def main() -> None:
    """Parse and merge."""
    kind, *options = sys.argv[1:] or ["--help"]
    if kind in ("-h", "--help"):
        print(USAGE)
    elif kind != "wise":
        raise cli.unknown("merge", kind, ["wise"])
    else:
        wise(cli.parse(Wise, args=options, prog="rft.merge wise"))


def wise(arguments: Wise) -> None:
    """Write the run folder of an interpolated model.

    Raises:
        ValueError: if alpha is out of range or the two models are not alike.
    """
    if not 0 <= arguments.alpha <= 1:
        raise ValueError(f"--alpha is {arguments.alpha}; it must lie in [0, 1]")
    files.require_local(arguments.out, "--out")
    start, architecture, _ = load_state(checkpoint_path(arguments.start))
    end, other, metadata = load_state(checkpoint_path(arguments.end))
    if changed := files.difference(asdict(architecture), asdict(other)):
        raise ValueError(f"the models have other architectures: {changed[0]}")
    state = interpolate(start, end, arguments.alpha)
    recipe = f"wise-ft-{arguments.alpha:g}"
    config = {
        "recipe": recipe,
        "seed": _seed(arguments.end),
        "alpha": arguments.alpha,
        "merged_from": [
            {"path": str(path), "sha256": files.sha256_file(checkpoint_path(path))}
            for path in (arguments.start, arguments.end)
        ],
    }
    out = str(arguments.out)
    _require_same(arguments.out / "config.json", config)
    save_state(f"{out}/{SELECTED}", state, architecture, {**metadata, "recipe": recipe})
    files.write_json(f"{out}/config.json", config)
    files.write_json(f"{out}/provenance.json", files.provenance())
    print(f"merged: {out}\nnext: python -m rft.evaluate {out} --data URL")


def _seed(path: Path) -> int:
    config = path / "config.json"
    return files.read_json(str(config))["seed"] if config.is_file() else 0


def _require_same(path: Path, config: dict) -> None:
    if path.is_file() and "merged_from" not in files.read_json(str(path)):
        raise ValueError(f"{path.parent} holds a training run; choose another --out")
    if path.is_file() and (changed := files.difference(files.read_json(str(path)), config)):
        raise ValueError(
            f"{path.parent} holds another merge: {'; '.join(changed)}; choose another --out"
        )


if __name__ == "__main__":
    cli.run(main)
