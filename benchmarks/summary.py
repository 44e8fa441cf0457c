"""Tables for the docs: `python -m benchmarks.summary` writes benchmarks/results/data.md.

The file is built from saved results of the other benchmarks; `python docs/update_results.py` copies
it into the pages.
"""

from pathlib import Path
from typing import Any

from benchmarks import machine, ratios
from benchmarks.loader import runs
from benchmarks.pack import WORK
from rft import cli
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "data.md"
RATIOS = {
    "loader": {
        "pixels_over_memcpy": "rft on `pixels` / one thread copying random payloads in memory",
        "pixels_over_npy_cls": "rft on `pixels` / webdataset on the same arrays, `npy` + `cls`",
        "jpeg_over_bare": "rft on `original` / {cpus} x one process that only decodes and crops",
        "simd_over_pillow": "rft on `original` with Pillow-SIMD / with Pillow",
    },
    "pack": {
        "original_over_copy_synced": "packing `original` / copying and waiting for the disk",
        "pixels_over_bare": "packing `pixels` / {cpus} x one process that only decodes and crops",
        "jpeg_over_bare": "packing `jpeg` / {cpus} x one process that also compresses",
    },
}


def table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """Return a Markdown table of two columns, the second one of numbers."""
    lines = [f"| {header[0]} | {header[1]} |", "|---|--:|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


def rate(row: dict[str, Any] | None) -> str:
    """Format images per second with the lowest and the highest round, or the reason for none."""
    if row is None:
        return ratios.NOT_MEASURED
    if row["images_per_second"] is None:
        return row["reason"]
    low, middle, high = row["lowest"], row["images_per_second"], row["highest"]
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def ratio_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the meaning of a benchmark's ratios, and their values."""
    return [
        (meaning.format(cpus=result["cpus"]), ratios.shown(result.get(name)))
        for name, meaning in RATIOS[result["benchmark"]].items()
    ]


def page(loader: dict[str, Any], pack: dict[str, Any], simd: dict[str, Any]) -> str:
    """Build the page from the saved results of the three benchmarks.

    Raises:
        ValueError: if they were measured on different machines.
    """
    difference, cores = simd["decoded_and_resized"], simd["cores_compared"]
    parts = [
        f"{loader['cpus']} CPUs, everything in the page cache; {loader['images']:,} photographs of "
        f"about 500 x 375 and 80 to 110 KB. Rates are medians of {loader['rounds']} interleaved "
        "rounds. A ratio is taken round by round, with its lowest and highest round; where these "
        f"are more than a factor of {ratios.WIDEST:g} apart it has no middle.",
        machine.together({"loading": loader, "packing": pack, "Pillow-SIMD": simd}),
        table(("ratio", "value"), ratio_rows(loader) + ratio_rows(pack)),
        table(
            ("loading batches of 224 x 224", "images/s (lowest to highest round)"),
            [(name, rate(loader["rows"].get(name))) for name in runs(loader["cpus"])],
        ),
        "`npy + cls` and `jpg + cls` are tars of two members a sample, as webdataset's users write "
        "them, with the same bytes in each image as rft's; streaming and litdata read their own "
        "formats, open_clip `jpg` + `txt`.",
        table(
            ("packing", "images/s (lowest to highest round)"),
            [(meaning, rate(pack["rows"].get(name))) for name, meaning in WORK.items()],
        ),
        f"Pillow-SIMD {cores['Pillow-SIMD']} and Pillow {cores['Pillow']} differ by at most "
        f"{difference['max_levels']} of 255 grey levels, in {difference['share_differing']:.2%} "
        f"of the values of {simd['images']} images.",
    ]
    return "\n\n".join(parts) + "\n"


def text() -> str:
    """Build the page from benchmarks/results.

    Raises:
        ValueError: if one of the benchmarks has not saved a result.
    """
    names = ("loader_cpu", "pack_cpu", "simd_difference")
    return page(*(files.read_json(str(RESULTS / f"{name}.json")) for name in names))


def main() -> None:
    """Write the page."""
    files.write_bytes(str(PAGE), text().encode())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    cli.run(main)
