"""The benchmarks: training and test set of ImageNet, and five out-of-distribution test sets.

To add one, add an entry here, its layout to `rft/packing/layouts.py: read_source` if none fits, and
its images to the miniature world (`rft/demo/world.py`). Reports take their columns from here. Sets
with other names are the user's own, about which nothing is assumed.
"""

from dataclasses import dataclass
from typing import Literal, get_args

# folders above the class folders, which depend on where ImageNet was downloaded
PARENTS = ("", "imagenet/", "ILSVRC2012/", "ILSVRC/Data/CLS-LOC/")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Facts about a benchmark that hold for any copy of it."""

    name: str
    """Its folder below a data root, and its name in options, manifests and results."""
    title: str
    """Its column title in tables."""
    images: int
    """Number of published images. A copy that lacks some still gives a score."""
    folders: tuple[str, ...]
    """Possible folders below --source; "." is the source folder itself."""
    archive: str | None = None
    """Name of the downloaded tar, if it can be read without extracting it."""
    class_list: str | None = None
    """timm's class list, for a set with only some of ImageNet's classes."""
    border: int = 0
    """Pixels to cut from each side before any resize."""


TRAIN_SET = "imagenet-train"
ID_SET = "imagenet-val"
Ood = Literal["imagenet-v2", "imagenet-r", "imagenet-sketch", "objectnet", "imagenet-a"]
OOD_SETS: tuple[Ood, ...] = get_args(Ood)
"""Out-of-distribution, in the order of the paper's tables."""
TEST_SETS = (ID_SET, *OOD_SETS)
ClassScore = Literal["top1", "mean-per-class"]
"""Scores of any set: the share of correct images, and the mean of the classes' accuracies."""
DomainScore = Literal["worst-domain", "mean-over-domains"]
"""Scores of a set with domains: the lowest accuracy of a domain, and the mean over domains."""
Score = Literal[ClassScore, DomainScore]
"""The score reported for a set; benchmarks use top1."""
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
    *("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
    # its authors keep these for choosing hyperparameters, outside its average
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
"""Corruption folders of ImageNet-C, which contain the severity folders."""
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
            # A copy with class folders has various names, all tried before `val`, which is flat in
            # the official archive.
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
            border=2,  # red frame, which marks its images as test images
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
