"""The table of a measured GPU, in Markdown, from its JSON."""

from collections.abc import Sequence
from typing import Any

from benchmarks import ratios
from benchmarks.method import table
from benchmarks.ratios import NOT_MEASURED

STEPS = {
    "vanilla": "vanilla (open_clip's forward)",
    "vanilla_compiled": "vanilla, compiled",
    "own_vanilla": "rft's own vanilla",
    "step": "**rft**, object-mask single-fill",
    "step_compiled": "rft --compile on",
    "step_triton": "rft, compiled, with the CAM's Triton kernel",
    "textbook": "textbook counterfactual step",
    "textbook_tf32": "textbook, fp32 with TF32",
}
KERNEL_LETTERS = 60  # of a kernel's name, which can have hundreds


def text(document: dict[str, Any]) -> str:
    """Format one result file as a page; a missing part is named with its reason."""
    parts = {name: part["values"] for name, part in document["parts"].items()}
    settings = document["settings"]
    blocks = [
        heading(document, parts.get("chip", {})),
        step_table(parts, settings["models"]),
        *step_lines(parts, settings["models"]),
        trainer_table(parts, settings),
        bullets(parts),
        missing(document["parts"]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def heading(document: dict[str, Any], chip: dict[str, Any]) -> str:
    """Describe the measurement: what, on which hardware, when."""
    where = chip.get("name", "an unknown device")
    if document["driver"]:
        where += f", driver {document['driver']}"
    if chip.get("cuda"):
        where += f", CUDA {chip['cuda']}"
    rehearsal = "" if document["benchmark"] == "gpu" else "A rehearsal on a tiny model. "
    dates = sorted({part["date"][:10] for part in document["parts"].values()}) or ["not measured"]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{rehearsal}{where}, torch {document['versions'].get('torch', '?')}, Python "
        f"{document['python']}; commit {document['commit'] or 'unknown'} (sources "
        f"{document['source_sha256'][:12]}), {when}. Random weights and images, "
        f"{document['settings']['batch_size']} images per step where they fit, bf16 unless a row "
        "says otherwise; medians."
    )


def measured_steps(parts: dict[str, Any], model: str) -> dict[str, Any]:
    """Collect the timed steps of a model, eager and compiled, by name."""
    found: dict[str, Any] = {}
    for kind in ("step", "compiled"):
        found |= parts.get(f"{kind}-{model}", {}).get("steps", {})
    return found


def step_table(parts: dict[str, Any], models: Sequence[str]) -> str:
    """Format one row per model and implementation."""
    rows = []
    for model in models:
        found = measured_steps(parts, model)
        vanilla = found.get("vanilla")
        for name, title in STEPS.items():
            rows.append([f"{model}: {title}", *step_cells(found.get(name), vanilla)])
    header = ["step", "images", "ms", "images/s", "time / vanilla's", "of the matmul ceiling"]
    return table([*header, "peak memory"], rows)


def over(row: dict[str, Any], vanilla: dict[str, Any]) -> str:
    """Format the time per image of one step over that of another, with the extremes of both."""
    if row is vanilla:
        return "1"
    images = vanilla["batch_size"] / row["batch_size"]
    return ratios.shown(
        {
            "median": images * row["seconds"] / vanilla["seconds"],
            "lowest": images * row["fastest"] / vanilla["slowest"],
            "highest": images * row["slowest"] / vanilla["fastest"],
        }
    )


def step_cells(row: dict[str, Any] | None, vanilla: dict[str, Any] | None) -> list[str]:
    """Format the cells of one timed step, which is compared with `vanilla`."""
    if row is None:
        return [NOT_MEASURED, *[""] * 5]
    memory, counted = row.get("peak_memory"), row.get("dry_run_memory")
    share = f" (--dry-run / it: {counted / memory:.2f})" if memory and counted else ""
    return [
        str(row["batch_size"]),
        f"{1000 * row['seconds']:.1f}",
        f"{row['images_per_s']:,.0f}",
        "" if vanilla is None else over(row, vanilla),
        f"{row['mfu']:.0%}",
        "" if memory is None else f"{memory / 1e9:.1f} GB{share}",
    ]


def step_lines(parts: dict[str, Any], models: Sequence[str]) -> list[str]:
    """Format a paragraph per model's step: phases, kernels, waits for the GPU."""
    lines = []
    for model in models:
        values = parts.get(f"step-{model}", {})
        sentences = []
        if phases := values.get("phase_share"):
            sentences.append(f"phases: {shares(phases)}")
        if kernels := values.get("kernels"):
            busy = values.get("busy_share")
            filled = "" if busy is None else f", which fill {busy:.0%} of the step"
            named = shares(shortened(kernels))
            sentences.append(
                f"{values['kernel_launches']:,} kernels{filled}; over 3% of their time: {named}"
            )
        if "host_waits" in values:
            waits = values["host_waits"]
            count = NOT_MEASURED if waits is None else str(sum(waits.values()))
            places = f" ({', '.join(waits)})" if waits else ""
            sentences.append(f"host waits for the GPU per step: {count}{places}")
        if sentences:
            lines.append(f"rft's step, {model}: {'. '.join(sentences)}.")
    return lines


def shares(values: dict[str, float]) -> str:
    """Format shares, largest first."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.1%}" for name, share in ordered)


def shortened(kernels: dict[str, float]) -> dict[str, float]:
    """Shorten the names of kernels, and number those that become equal."""
    found: dict[str, float] = {}
    for name, share in kernels.items():
        short = name.removeprefix("void ").removeprefix("at::native::")[:KERNEL_LETTERS]
        repeated = sum(other.startswith(f"`{short}`") for other in found)
        found[f"`{short}`" + (f" ({repeated + 1})" if repeated else "")] = share
    return found


TRAINED = (  # part, encoding, the step to compare the rate with, words for the row
    ("trainer", "pixels", "step", ""),
    ("compiled-trainer", "pixels", "step_compiled", ", --compile on"),
    ("trainer", "jpeg", "step", ""),
)


def trainer_table(parts: dict[str, Any], settings: dict[str, Any]) -> str:
    """Format one row per model and encoding of the shards."""
    rows = []
    for model in settings["models"]:
        for part, encoding, step, words in TRAINED:
            alone = measured_steps(parts, model).get(step, {}).get("images_per_s")
            row = parts.get(part, {}).get(model, {}).get(encoding)
            cells = [NOT_MEASURED, "", "", ""]
            if row is not None:
                share = "" if alone is None else f"{row['images_per_s'] / alone:.0%}"
                first, last = row["batches_ready"]
                rate, waits = f"{row['images_per_s']:,.0f}", f"{row['waiting_share']:.1%}"
                cells = [rate, waits, f"{first:g} to {last:g}", share]
            rows.append([f"{model}, `{encoding}` shards{words}", *cells])
    title = f"whole trainer, {settings['trainer_steps']} steps"
    title += f", {settings['trainer_workers']} loader processes"
    ready = "batches ready, first to last row"
    return table([title, "images/s", "host waits for data", ready, "of the step's rate"], rows)


def bullets(parts: dict[str, Any]) -> str:
    """List everything else, one line each."""
    lines = [
        *chip_lines(parts.get("chip", {})),
        *large_lines(parts.get("large", {})),
        *mask_lines(parts.get("masks", {})),
        *resume_lines(parts.get("resume", {})),
        *(
            f"Evaluation of {model}, fp32: {row['images_per_s']:,.0f} images/s."
            for model, row in parts.get("evaluation", {}).items()
        ),
    ]
    if tests := parts.get("tests"):
        counts = (f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        lines.append(f"tests/gpu: {', '.join(counts)}.")
    return "\n".join(f"- {line}" for line in lines)


def chip_lines(chip: dict[str, Any]) -> list[str]:
    """Describe the ceilings."""
    lines = []
    if flops := chip.get("matmul_flops"):
        rates = ", ".join(f"{name} {value / 1e12:,.1f} TFLOP/s" for name, value in flops.items())
        lines.append(f"Matrix product ceiling: {rates}.")
    if "copy_bytes_per_s" in chip:
        within, to = chip["copy_bytes_per_s"], chip["host_to_device_bytes_per_s"]
        lines.append(
            f"Copy within the device {within / 1e9:,.0f} GB/s (read and written), to it from "
            f"pinned memory {to / 1e9:,.0f} GB/s."
        )
    return lines


def large_lines(large: dict[str, Any]) -> list[str]:
    """Describe the steps of the large model."""
    lines = []
    for name, title in {"step": "", "recompute": " --recompute"}.items():
        if row := large.get(name):
            batch, ms, rate, _, ceiling, memory = step_cells(row, None)
            lines.append(
                f"{large['model']}{title}: {batch} images fit, {ms} ms, {rate} images/s, {ceiling} "
                f"of the ceiling{f', {memory}' if memory else ''}."
            )
    return lines


def mask_lines(masks: dict[str, Any]) -> list[str]:
    """Describe the agreement of object masks between precisions."""
    lines = []
    for model, thresholds in masks.items():
        if "not_measured" in thresholds:
            lines.append(f"Object masks of {model}: not measured, {thresholds['not_measured']}.")
            continue
        lines += [
            f"Object masks of {model} above {threshold} ({row['masked']:.1%} of patches): TF32 "
            f"equals fp32 in {row['tf32']:.2%}, bf16 in {row['bf16']:.2%}."
            for threshold, row in thresholds.items()
        ]
    return lines


def resume_lines(resume: dict[str, Any]) -> list[str]:
    """Describe the result of one rank under torchrun."""
    lines = []
    if group := resume.get("group"):
        lines.append(
            f"One rank under torchrun, in a group ({group['backend']}): gradients "
            f"{equality(group['gradients'])} to those without it, a step takes "
            f"{group['time_over_without']:.2f} of its time."
        )
    if "two_runs" in resume:
        lines.append(f"The same run twice: weights {equality(resume['two_runs'])}.")
    if "resumed_run" in resume:
        lines.append(
            f"Stopped after step {resume['stopped_after']} and resumed: weights "
            f"{equality(resume['resumed_run'])} to the run without a stop."
        )
    return lines


def equality(found: dict[str, Any]) -> str:
    """Describe whether two sets of tensors are equal."""
    if found["bit_equal"]:
        return "bit-equal"
    return f"equal within {found['largest_of_its_tensor']:.1e} of a tensor's largest entry"


def missing(parts: dict[str, Any]) -> str:
    """Name the parts that were not completely measured, with the reason."""
    lines = [
        f"`{name}` {part['status']}: {part['reason']}"
        for name, part in sorted(parts.items())
        if part["status"] != "done"
    ]
    lines += [
        f"`{name}`, when it was repeated, {part['repeated']}"
        for name, part in sorted(parts.items())
        if "repeated" in part
    ]
    return f"Not measured whole: {'; '.join(lines)}." if lines else ""
