"""The pages of the method's cost: `python -m benchmarks.method` writes method.md and counted.md.

method.md is made of what benchmarks.step and benchmarks.cam_memory saved, with a row for every case
that the table wants and a word where one was not measured; counted.md of what was counted on
tensors without values, by benchmarks.memory and benchmarks.cam_share. benchmarks.gpu writes a GPU's
page.
"""

from pathlib import Path
from typing import Any

from rft import cli
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "method.md"
COUNTED = RESULTS / "counted.md"
STEPS = {"step_ViT-B-32_cpu": "ViT-B/32, CPU"}
COMPILED = "step_compiled_ViT-B-32_cpu"
CAM = "cam_memory_ViT-L-14-336_cpu"
MEMORY = ("memory_ViT-B-32_cpu", "memory_ViT-B-16_cpu", "memory_ViT-L-14_cpu")
NOT_MEASURED = "not measured"


def step_row(result: dict[str, Any] | None) -> list[str]:
    """Return the cells of one saved result of the step."""
    if result is None:
        return [NOT_MEASURED, *[""] * 6]
    return [
        f"{result['batch_size']} images, {result['precision']}",
        f"{result['images_per_second']['vanilla']:.1f}",
        f"{result['images_per_second']['textbook']:.1f}",
        f"{result['images_per_second']['step']:.1f}",
        ratio(result, "step_over_vanilla"),
        ratio(result, "textbook_over_step"),
        f"{result['mfu']['step']:.0%}",
    ]


def ratio(result: dict[str, Any], name: str) -> str:
    """Return a ratio, and its range over the processes if there were several."""
    text = f"{result[name]:.2f}"
    if "of_all_processes" not in result:
        return text
    low, *_, high = result["of_all_processes"][name]
    return f"{text} ({low:.2f} to {high:.2f})"


def phase_lines(result: dict[str, Any]) -> str:
    """Return the shares of a step's phases as one sentence."""
    shares = sorted(result["phase_share"].items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.1%}" for name, share in shares)


def alternatives(result: dict[str, Any]) -> str:
    """Return what was measured of the choices that rft made, as ratios."""
    seconds = result["alternatives_seconds"]
    over = {
        "AdamW by single operations / fused": ("adamw_foreach", "adamw_fused"),
        "patch embedding by convolution / matrix product": ("patches_conv", "patches_matmul"),
        "the same channels-last / matrix product": ("patches_conv_channels_last", "patches_matmul"),
    }
    ratios = (f"{name}: {seconds[a] / seconds[b]:.2f}" for name, (a, b) in over.items())
    return f"Time of {'; '.join(ratios)}."


def cam_row(result: dict[str, Any], case: str) -> list[str]:
    """Return the cells of one case of the CAM's memory."""
    whole = result["bytes"][case]
    fits = f"{whole / 1e9:.1f} GB" if whole else f"not in {result['limit_bytes'] / 1e9:.0f} GB"
    return [f"{result['bytes_per_image'][case] / 1e6:.0f} MB", fits]


def memory_row(row: dict[str, Any]) -> list[str]:
    """Return the cells of one case of the dry run's memory."""
    line, real = row["line"], row["real"]
    compared = [NOT_MEASURED, ""]
    if real:
        low, high = real["dry_run_over_real"]
        few, more = real["images"]
        compared = [
            f"{low:.3f} ({few} images), {high:.3f} ({more})",
            f"{real['per_image_over_real']:.3f}",
        ]
    return [
        f"{row['model']}, {row['name']}, {row['precision']}",
        f"{row['dry_run_bytes'] / 1e9:.1f} GB",
        f"{line['over_tracker']:.3f} ({line['ranks']} ranks)" if line else "",
        *compared,
    ]


def share_table(result: dict[str, Any]) -> str:
    """Return the table of the CAM's counted share, with what it assumes."""
    header = ["CAM / whole step, bf16, counted", "operations", "memory traffic", "time, estimated"]
    header += ["of it the maps", "the backward pass"]
    rows = []
    for row in result["rows"]:
        maps, backward = row["share"]["maps"], row["share"]["backward"]
        cells = [f"{maps[name] + backward[name]:.1%}" for name in ("flops", "bytes", "seconds")]
        cells += [f"{maps['seconds']:.1%}", f"{backward['seconds']:.1%}"]
        rows.append([f"{row['model']}, {row['batch_size']} images", *cells])
    rates = ", ".join(
        f"{rate / 1e12:,.0f} TFLOP/s {name.removeprefix('torch.')}"
        for name, rate in result["assumed_flops_per_s"].items()
    )
    how = (
        "The time of an operator is estimated as the longer one of its bytes at "
        f"{result['assumed_bytes_per_s'] / 1e12:.2f} TB/s and its operations at {rates}, an H100's "
        "published ceilings; nothing was timed."
    )
    return f"{table(header, rows)}\n\n{how}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, all columns but the first of numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text() -> str:
    """Return the page for what benchmarks/results holds."""
    found = {name: load(name) for name in STEPS}
    measured = [result for result in found.values() if result]
    header = ["", "step of", "vanilla img/s", "textbook img/s", "rft img/s"]
    header += ["rft / vanilla time", "textbook / rft time", "of the matmul ceiling"]
    rows = [[STEPS[name], *step_row(result)] for name, result in found.items()]
    parts = [table(header, rows)]
    for result in measured:
        where = f"{result['processor']}, {result['threads']} threads"
        parts.append(
            f"{result['model']} on {where}, torch {result['torch']}, {result['date'][:10]}: "
            f"medians of {result['rounds']} interleaved rounds, of the middle one of several "
            "processes where a range is given. Time of a step: "
            f"{phase_lines(result)}. Counted operations, textbook / rft: "
            f"{result['flops_textbook_over_step']:.2f}. {alternatives(result)}"
        )
    if compiled := load(COMPILED):
        share = compiled["compiled_over_step"]
        where = f"{compiled['model']}, {compiled['device'].upper()}"
        cold = f", after {compiled['cold_seconds']:.0f} s of compiling"
        parts.append(f"With --compile on a step takes {share:.2f} of its time ({where}{cold}).")
    if cam := load(CAM):
        header = [f"clean forward and CAM, {cam['model']}, fp32, CPU", "an image"]
        names = {
            "textbook": "textbook: all maps and their gradients stored",
            "step": "rft: one layer's map at a time",
            "recompute": "rft --recompute",
        }
        rows = [[meaning, *cam_row(cam, case)] for case, meaning in names.items()]
        parts.append(table([*header, f"{cam['images']} images"], rows))
    return "\n\n".join(parts) + "\n"


def counted() -> str:
    """Return the page of what was counted and not timed."""
    parts = []
    if found := [result for name in MEMORY if (result := load(name))]:
        header = [f"`--dry-run`, {found[0]['rows'][0]['images']} images on one rank", "its figure"]
        header += ["a row on a line / torch's tracker", "dry run / real step, CPU", "per image"]
        rows = [memory_row(row) for result in found for row in result["rows"]]
        parts.append(table(header, rows))
    if share := load("cam_share"):
        parts.append(share_table(share))
    return "\n\n".join(parts) + "\n"


def load(name: str) -> dict[str, Any] | None:
    """Return a saved result, or None if there is none."""
    path = RESULTS / f"{name}.json"
    return files.read_json(str(path)) if path.is_file() else None


def main() -> None:
    """Write the pages."""
    for page, content in ((PAGE, text()), (COUNTED, counted())):
        files.write_bytes(str(page), content.encode())
        print(f"wrote {page}")


if __name__ == "__main__":
    cli.run(main)
