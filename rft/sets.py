"""The benchmarks, each described once: training and test set of ImageNet, and five that differ.

To add one, add an entry here, its layout to `rft/packing/layouts.py: read_source` if none of those
fits, and its images to the miniature world (`rft/demo/world.py`). Reports take their columns from
here. A set of another name is the user's own, of which nothing is known.
"""

from dataclasses import dataclass
from typing import Literal, get_args

# above the class folders, as the ways of downloading ImageNet leave them
PARENTS = ("", "imagenet/", "ILSVRC2012/", "ILSVRC/Data/CLS-LOC/")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """What is known of a benchmark before any copy of it is looked at."""

    name: str
    """Its folder below a data root, and its name in options, manifests and results."""
    title: str
    """Its column in a table."""
    images: int
    """How many the authors published. A copy that lost some on the way still gives a number."""
    folders: tuple[str, ...]
    """Where it may lie below --source; "." is the folder given itself."""
    archive: str | None = None
    """The tar that it is downloaded as, where that is read without being extracted."""
    class_list: str | None = None
    """timm's list of the classes of a set that has only some of ImageNet's."""
    border: int = 0
    """Pixels to cut from each side before any resize."""


TRAIN_SET = "imagenet-train"
ID_SET = "imagenet-val"
Ood = Literal["imagenet-v2", "imagenet-r", "imagenet-sketch", "objectnet", "imagenet-a"]
OOD_SETS: tuple[Ood, ...] = get_args(Ood)
"""Out-of-distribution, in the order of the paper's tables."""
TEST_SETS = (ID_SET, *OOD_SETS)
ClassScore = Literal["top1", "mean-per-class"]
"""Scores of any set: the share of images that are right, and the mean of that of each class."""
DomainScore = Literal["worst-domain", "mean-over-domains"]
"""Scores of a set whose images lie in domains: the lowest accuracy of one, and their mean."""
Score = Literal[ClassScore, DomainScore]
"""The one number that a set is known by; a benchmark's is top1."""
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
    *("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
    # held out by its authors to choose hyperparameters with, and no part of its average
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
"""Of ImageNet-C: the folders above those of the severities."""
SEVERITIES = ("1", "2", "3", "4", "5")

BENCHMARKS = {
    one.name: one
    for one in (
        ImageSet(
            name=TRAIN_SET,
            title="ImageNet (training)",
            images=1_281_167,
            folders=tuple(f"{parent}train" for parent in PARENTS),
            archive="ILSVRC2012_img_train.tar",
        ),
        ImageSet(
            name=ID_SET,
            title="ImageNet",
            images=50_000,
            # A foldered copy has the name its maker gave it, so it goes before `val`, which in the
            # official archive is flat.
            folders=tuple(
                f"{parent}{name}"
                for parent in PARENTS
                for name in ("val_in_folder", "val_dirs", "val")
            ),
            archive="ILSVRC2012_img_val.tar",
        ),
        ImageSet(
            name="imagenet-v2",
            title="V2",
            images=10_000,
            folders=(
                "imagenetv2-matched-frequency-format-val",
                "imagenetv2-matched-frequency",
                "ImageNetV2-matched-frequency",
                ".",
            ),
        ),
        ImageSet(
            name="imagenet-r",
            title="R",
            images=30_000,
            folders=("imagenet-r", "."),
            class_list="imagenet_r_synsets.txt",
        ),
        ImageSet(
            name="imagenet-sketch",
            title="Sketch",
            images=50_889,
            folders=("sketch", "imagenet-sketch", "."),
        ),
        ImageSet(
            name="objectnet",
            title="ObjectNet",
            images=18_574,  # in the 113 of its 313 folders that overlap ImageNet
            folders=("objectnet-1.0", "objectnet", "."),
            border=2,  # of red frame, which marks its images as test images
        ),
        ImageSet(
            name="imagenet-a",
            title="A",
            images=7_500,
            folders=("imagenet-a", "."),
            class_list="imagenet_a_synsets.txt",
        ),
    )
}
