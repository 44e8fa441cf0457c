"""Difference between Pillow and Pillow-SIMD: `python -m benchmarks.simd_difference --save`.

Both compute CLIP's input (decode, resize, centre crop) from the same photographs, and the grey
levels are compared entry by entry. A second comparison starts from equal pixels, to separate the
effect of resizing from that of the JPEG libraries. Needs `python -m benchmarks.environments --names
pillow-simd`. The last line is one JSON object.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import environments, machine, photos
from rft import cli
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
CORES = {"Pillow": None, "Pillow-SIMD": "pillow-simd"}
SIZE = 224
# run in a separate process, because a process can import only one of the two
PIXELS = """
import sys
from pathlib import Path
import numpy as np
import PIL
from PIL import Image
from rft.shards.images import clip_pixels, load_image
folder, decoded, out, size = sys.argv[1:]
paths = sorted(Path(folder).glob("*/*.JPEG"))
whole = [load_image(path.read_bytes(), str(path)) for path in paths]
both = np.stack([clip_pixels(image, int(size)) for image in whole])
if not Path(decoded).exists():
    np.savez(decoded, *[np.asarray(image) for image in whole])
same = np.load(decoded)
images = [Image.fromarray(same[name]) for name in same.files]
resized = np.stack([clip_pixels(image, int(size)) for image in images])
np.savez(out, decoded_and_resized=both, resized=resized)
print(PIL.__version__)
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare the two image libraries on photographs."""

    images: int = 200
    """Photographs to compare on."""
    work: Path = Path("build/simd")
    """Folder for the photographs and the pixels."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def pixels(core: str, work: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Return a library's version and its pixels, uint8 (N, 3, 224, 224) by stage."""
    out = work / f"{core}.npz"
    arguments = [work / "photos" / "train", work / "decoded.npz", out, SIZE]
    result = subprocess.run(
        [sys.executable, "-c", PIXELS, *map(str, arguments)],
        env=environments.variables(CORES[core]),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise ValueError(f"{core} failed: {result.stderr.strip().splitlines()[-1]}")
    with np.load(out) as stages:
        return result.stdout.strip(), {name: stages[name] for name in stages.files}


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Return the largest difference in grey levels and the share of entries that differ."""
    levels = np.abs(first.astype(np.int16) - second)
    return {
        "max_levels": int(levels.max()),
        "share_differing": round(float((levels > 0).mean()), 6),
        "share_above_one_level": round(float((levels > 1).mean()), 6),
    }


def main() -> None:
    """Measure and print."""
    arguments = cli.parse(Arguments, prog="benchmarks.simd_difference")
    if absence := environments.absence("pillow-simd"):
        raise ValueError(f"pillow-simd: {absence}")
    photos.write(arguments.work / "photos", arguments.images)
    versions, found = {}, {}
    for core in CORES:
        versions[core], found[core] = pixels(core, arguments.work)
    stages = {
        name: difference(found["Pillow"][name], found["Pillow-SIMD"][name])
        for name in found["Pillow"]
    }
    result = {
        "benchmark": "simd_difference",
        "images": arguments.images,
        "size": SIZE,
        **machine.describe(),
        "cores_compared": versions,
        **stages,
    }
    for name, values in stages.items():
        print(f"{name}: {values}")
    if arguments.save:
        files.write_json(str(RESULTS / "simd_difference.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
