"""Pages on the method's cost: `python -m benchmarks.method` writes method.md and counted.md.

method.md is built from saved results of benchmarks.step and benchmarks.cam_memory, with a row for
every case of the table, marked if it was not measured. counted.md has counts on tensors without
values, by benchmarks.memory and benchmarks.cam_share. benchmarks.gpu writes a GPU's page.
"""

from pathlib import Path
from typing import Any

from benchmarks import machine, ratios
from benchmarks.ratios import NOT_MEASURED
from rft import cli
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "method.md"
COUNTED = RESULTS / "counted.md"
RATES = {  # columns of images per second
    "vanilla": "vanilla img/s",
    "own_vanilla": "rft vanilla img/s",
    "textbook": "textbook img/s",
    "step": "rft img/s",
}
RATIOS = {  # columns of time
    "step_over_vanilla": "rft / vanilla time",
    "step_over_own_vanilla": "rft / rft vanilla time",
    "textbook_over_step": "textbook / rft time",
}
COMPILED_RATIOS = {
    "compiled_over_step": "compiled / as it is, rft",
    "vanilla_compiled_over_vanilla": "compiled / as it is, vanilla",
    "step_compiled_over_vanilla_compiled": "rft / vanilla, both compiled",
}
STEPS = {"step_ViT-B-32_cpu": "ViT-B/32, CPU"}
COMPILED = "step_compiled_ViT-B-32_cpu"
CAM = "cam_memory_ViT-L-14-336_cpu"
MEMORY = ("memory_ViT-B-32_cpu", "memory_ViT-B-16_cpu", "memory_ViT-L-14_cpu")


def step_row(result: dict[str, Any] | None) -> list[str]:
    """Format the cells of one saved result of the step."""
    if result is None:
        return [NOT_MEASURED, *[""] * (len(RATES) + len(RATIOS) + 1)]
    rates = result["images_per_second"]
    return [
        f"{result['batch_size']} images, {result['precision']}",
        *(f"{rates[name]:.1f}" if name in rates else NOT_MEASURED for name in RATES),
        *(ratios.shown(result.get(name)) for name in RATIOS),
        f"{result['mfu']['step']:.0%}",
    ]


def phase_lines(result: dict[str, Any]) -> str:
    """Format the shares of a step's phases as one sentence."""
    shares = sorted(result["phase_share"].items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.1%}" for name, share in shares)


def alternatives(result: dict[str, Any]) -> str:
    """Format the measured ratios of rft's design choices."""
    words = {
        "adamw": "AdamW by single operations / fused",
        "patches_conv": "patch embedding by convolution / matrix product",
        "patches_conv_channels_last": "the same channels-last / matrix product",
    }
    found = (f"{words[name]}: {ratios.shown(r)}" for name, r in result["alternatives"].items())
    return f"Time of {'; '.join(found)}."


def cam_row(result: dict[str, Any], case: str) -> list[str]:
    """Format the cells of one case of the CAM's memory."""
    whole = result["bytes"][case]
    fits = f"{whole / 1e9:.1f} GB" if whole else f"not in {result['limit_bytes'] / 1e9:.0f} GB"
    return [f"{result['bytes_per_image'][case] / 1e6:.0f} MB", fits]


def memory_row(row: dict[str, Any]) -> list[str]:
    """Format the cells of one case of the dry run's memory."""
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
    """Format the table of the CAM's counted share, with its assumptions."""
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
    """Format a Markdown table whose columns after the first are numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text() -> str:
    """Build the page from benchmarks/results.

    Raises:
        ValueError: if the results are of different machines.
    """
    found = {name: load(name) for name in STEPS}
    measured = [result for result in found.values() if result]
    header = ["", "step of", *RATES.values(), *RATIOS.values(), "of the matmul ceiling"]
    rows = [[STEPS[name], *step_row(result)] for name, result in found.items()]
    parts = [table(header, rows)]
    parts += [
        f"{result['model']}, {result['threads']} threads, torch {result['torch']}: medians of "
        f"{result['rounds']} interleaved rounds; vanilla is cross-entropy through open_clip's "
        "forward, rft vanilla the training loop's own step of that recipe. Ratios are taken "
        "round by round, in parentheses their range over all rounds of all processes. Time of "
        f"a step: {phase_lines(result)}. Counted operations, textbook / rft: "
        f"{result['flops_textbook_over_step']:.2f}. {alternatives(result)}"
        for result in measured
    ]
    if compiled := load(COMPILED):
        header = [f"time under --compile, {compiled['model']}, CPU", "ratio"]
        rows = [[words, ratios.shown(compiled.get(n))] for n, words in COMPILED_RATIOS.items()]
        parts.append(table(header, rows))
        parts.append(f"The first step with --compile on takes {compiled['cold_seconds']:.0f} s.")
    if cam := load(CAM):
        header = [f"clean forward and CAM, {cam['model']}, fp32, CPU", "an image"]
        names = {
            "textbook": "textbook: all maps and their gradients stored",
            "step": "rft: one layer's map at a time",
            "recompute": "rft --recompute",
        }
        rows = [[meaning, *cam_row(cam, case)] for case, meaning in names.items()]
        parts.append(table([*header, f"{cam['images']} images"], rows))
    names = {**STEPS, COMPILED: "under --compile", CAM: "clean forward and CAM"}
    joined = {words: result for name, words in names.items() if (result := load(name))}
    return "\n\n".join([*parts, *([machine.together(joined)] if joined else [])]) + "\n"


def counted() -> str:
    """Build the page of counts."""
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
    """Load a saved result, or None if there is none."""
    path = RESULTS / f"{name}.json"
    return files.read_json(str(path)) if path.is_file() else None


def main() -> None:
    """Write the pages."""
    for page, content in ((PAGE, text()), (COUNTED, counted())):
        files.write_bytes(str(page), content.encode())
        print(f"wrote {page}")


if __name__ == "__main__":
    cli.run(main)
