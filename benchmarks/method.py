"""The page of the method's cost on a CPU: `python -m benchmarks.method` writes results/method.md.

It is made of what benchmarks.step and benchmarks.cam_memory saved, with a row for every case that
the table wants and a word where one was not measured. benchmarks.gpu writes a GPU's page.
"""

from pathlib import Path
from typing import Any

from rft import cli
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "method.md"
STEPS = {"step_ViT-B-32_cpu": "ViT-B/32, CPU"}
COMPILED = "step_compiled_ViT-B-32_cpu"
CAM = "cam_memory_ViT-L-14-336_cpu"
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


def load(name: str) -> dict[str, Any] | None:
    """Return a saved result, or None if there is none."""
    path = RESULTS / f"{name}.json"
    return files.read_json(str(path)) if path.is_file() else None


def main() -> None:
    """Write the page."""
    files.write_bytes(str(PAGE), text().encode())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    cli.run(main)
