"""Report the libraries that are really in use: `python -m rft.env`.

Pillow and Pillow-SIMD install into the same folder and overwrite each other: the package list may
name both, or one while the files belong to the other. That is reported as one error line, with exit
code 1.
"""

import importlib.metadata
import logging
import os
import platform
import re
import sys
from pathlib import Path

import fsspec
import open_clip
import PIL
import torch
import webdataset
from PIL import Image, features
from rich.console import Console
from rich.table import Table

from rft import __version__, cli, cpus
from rft.storage import files
from rft.storage.documents import document

IMAGE_PACKAGES = ("pillow", "pillow-simd")
# lower bound of Pillow in pyproject.toml, which pip does not apply to Pillow-SIMD
FIXED = "13.0.0"
# vpmaddwd: VEX prefix of two bytes, whose second ends in 101 (256 bits, prefix 66), then the opcode
MULTIPLY_256_BITS = re.compile(rb"\xc5[" + re.escape(bytes(range(5, 256, 8))) + rb"]\xf5")

log = logging.getLogger(__name__)


@document(name="--")
class Arguments:
    """Print the libraries in use; exit code 1 if Pillow and Pillow-SIMD are mixed."""


def image_core() -> str:
    """Describe the imported image library: its version and the JPEG library behind it."""
    # Pillow-SIMD is imported as PIL too; only its version's suffix differs
    name = "Pillow-SIMD" if ".post" in PIL.__version__ else "Pillow"
    compiled = Path(Image.core.__file__).read_bytes()
    avx2 = "with AVX2" if uses_avx2(compiled) else "without AVX2"
    jpeg = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    library = features.version("libjpeg_turbo") or features.version("jpg")
    webp = "" if features.check("webp") else ", cannot read WebP"
    return f"{name} {PIL.__version__} {avx2}, {jpeg} {library}{webp}"


def uses_avx2(code: bytes) -> bool:
    """Whether a library was compiled to resize with AVX2.

    Neither package records it. Pillow-SIMD's resizing multiplies 16-bit numbers pairwise in 256-bit
    registers; that instruction occurs dozens of times or, except by chance, never.
    """
    return len(MULTIPLY_256_BITS.findall(code)) > 16


def installed_image_packages() -> dict[str, str]:
    """Look up the versions of Pillow and Pillow-SIMD in the package list."""
    found = {}
    for name in IMAGE_PACKAGES:
        for distribution in importlib.metadata.distributions(name=name):
            found[name] = distribution.version
    return found


def image_core_problem(imported: str, installed: dict[str, str]) -> str | None:
    """Describe a broken installation of the image library; None if it is sound.

    Args:
        imported: version that `import PIL` gives.
        installed: version of each package that provides PIL.
    """
    if len(installed) > 1:
        both = " and ".join(f"{name} {version}" for name, version in installed.items())
        return (
            f"{both} are installed over each other, PIL is {imported}; uninstall both, then "
            "install one (as make simd does)"
        )
    if imported not in installed.values():
        named = ", ".join(f"{name} {version}" for name, version in installed.items()) or "none"
        return f"PIL is {imported}, but the package list has {named}; uninstall and reinstall it"
    return None


def lacks_fixes(imported: str) -> str | None:
    """Warn if the image library lacks the latest security fixes; None if it has them.

    Args:
        imported: version that `import PIL` gives.
    """
    # first three numbers: Pillow-SIMD appends one (12.1.1.post0) to the release that it follows
    release, fixed = ([int(n) for n in re.findall(r"\d+", v)[:3]] for v in (imported, FIXED))
    if release >= fixed:
        return None
    return (
        f"PIL {imported} lacks the security fixes of Pillow {FIXED}; use it only for images that "
        "you trust (docs/security.md)"
    )


def has_avx2() -> str:
    """Whether the processor has AVX2, for which `make simd` builds: yes or no."""
    return "yes" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "no"


def rows() -> list[tuple[str, str]]:
    """List the name and value of each library, and of the hardware."""
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
    revision = files.git_revision()
    return [
        ("rft", __version__ + (f", git {revision}" if revision else "")),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        (
            "cores",
            f"{cpus.available()} of {os.cpu_count()} for this process, AVX2: {has_avx2()}",
        ),
        ("image core", image_core()),
        ("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}"),
        ("GPUs", f"{len(gpus)}: {', '.join(sorted(set(gpus)))}" if gpus else "none"),
        ("cuDNN", str(torch.backends.cudnn.version()) if cuda else "not in use"),
        ("NCCL", ".".join(map(str, torch.cuda.nccl.version())) if cuda else "not in use"),
        ("open_clip", open_clip.__version__),
        ("webdataset", webdataset.__version__),
        ("fsspec", fsspec.__version__),
    ]


def main() -> None:
    """Parse and print."""
    cli.parse(Arguments, prog="rft.env")
    show()


def show() -> None:
    """Print the table and any problem; exit with 1 if Pillow and Pillow-SIMD are mixed."""
    table = Table(show_header=False, box=None)
    for name, value in rows():
        table.add_row(name, value)
    # a file has no width, and rich would wrap its lines at 80 columns
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, emoji=False).print(table)
    if warning := lacks_fixes(PIL.__version__):
        log.warning(warning)
    problem = image_core_problem(PIL.__version__, installed_image_packages())
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
