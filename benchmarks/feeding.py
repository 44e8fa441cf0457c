"""How many cores feed how many GPUs: `python -m benchmarks.feeding [--save]`.

Two measurements on photographs in the page cache (benchmarks/photos.py):

    rates       images per second of CPU time in one process that only reads, for each encoding, and
                with Pillow-SIMD if benchmarks.environments installed it
    simulation  eight ranks on this machine, each with a loader process and a consumer that takes
                batches at a fixed rate and sleeps, as a host does while its GPU computes

The sizing table divides assumed rates of GPUs by the rate of a core: `GPU_RATES` are targets,
because GPU rates have not been measured. The simulation checks the division. Its consumers demand
`LOADS` times the rate that this machine's cores can feed. According to the table they never wait
below 1, and above it for the missing share. The last line is one JSON object.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import environments, machine, photos
from benchmarks.one_rank import SIZE, Answer, Request
from rft import cli, cpus
from rft.shards.images import Kind
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
RANKS = 8
# of the cores' rate
LOADS = (0.7, 1.5)
GPUS = (1, 4, 8)
# target images/s per GPU: assumptions, not measured
GPU_RATES = {"ViT-B-32": 5000.0, "ViT-B-16": 1335.0}
BY_OPERATIONS = {"ViT-L-14": "ViT-B-16"}  # derived from the other by operations of the forward
ENCODINGS: tuple[Kind, ...] = ("pixels", "jpeg", "original")
SIMD = "pillow-simd"
# measured cases: an encoding, and the environment in which it is read
COLUMNS: dict[str, tuple[Kind, str | None]] = {
    "pixels": ("pixels", None),
    "jpeg": ("jpeg", None),
    "jpeg, Pillow-SIMD": ("jpeg", SIMD),
    "original": ("original", None),
    "original, Pillow-SIMD": ("original", SIMD),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure rates per core, and check the sizing table by simulated ranks."""

    images: int = 1000
    """Photographs to generate and to pack in each encoding."""
    rounds: int = 3
    """Measurements per encoding."""
    seconds: float = 3.0
    """Seconds per measurement; a simulation takes three times as long."""
    batch_size: int = 120
    """Images per batch and rank; a quarter for simulated ranks that decode complete photographs."""
    work: Path = Path("build/feeding")
    """Folder for the photographs and their packed sets."""
    save: bool = False
    """Also write the result to benchmarks/results/."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.seconds <= 0:
            raise ValueError("--rounds must be at least 1 and --seconds above 0")
        if not 4 * RANKS <= RANKS * self.batch_size <= self.images:
            raise ValueError(f"--batch-size must be 4 to an {RANKS}th of --images")


class Rank:
    """A child process that answers requests."""

    def __init__(self, environment: str | None, stack: ExitStack) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.one_rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environments.variables(environment), "OMP_NUM_THREADS": "1"},
            cwd=environments.ROOT,
            text=True,
        )
        stack.callback(self._process.communicate)

    def ask(self, request: Request) -> None:
        """Send a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        """Wait for the answer.

        Raises:
            RuntimeError: if the process ended without one; it has printed why.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a rank ended without an answer")
        return Answer(**json.loads(line))


def measure_rates(arguments: Arguments, sets: dict[Kind, str]) -> dict[str, dict[str, Any]]:
    """Measure the read rate of one core, in interleaved rounds, by name of the column."""
    columns = {
        name: (kind, environment)
        for name, (kind, environment) in COLUMNS.items()
        if environment is None or environments.absence(environment) is None
    }
    found: dict[str, list[Answer]] = {name: [] for name in columns}
    with ExitStack() as stack:
        ranks = {name: Rank(environment, stack) for name, (_, environment) in columns.items()}
        for _, (name, (kind, _)) in itertools.product(range(arguments.rounds), columns.items()):
            ranks[name].ask(
                Request(url=sets[kind], batch_size=arguments.batch_size, seconds=arguments.seconds)
            )
            found[name].append(ranks[name].answer())
            print(f"{name}: {rate(found[name][-1]):,.0f} images per CPU second", flush=True)
    return {name: summarise(answers) for name, answers in found.items()}


def rate(answer: Answer) -> float:
    """Return images per second of CPU time; wall time depends on other processes."""
    return answer.images / answer.cpu_seconds


def summarise(answers: list[Answer]) -> dict[str, Any]:
    """Return the median of measurements of one encoding, with the lowest and highest rate."""
    rates = [rate(answer) for answer in answers]
    walls = [answer.images / answer.seconds for answer in answers]
    return {
        "images_per_cpu_second": round(statistics.median(rates), 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
        "images_per_second": round(statistics.median(walls), 1),
        "bytes_per_image": round(sum(a.bytes for a in answers) / sum(a.images for a in answers)),
    }


def simulate(
    arguments: Arguments, sets: dict[Kind, str], rates: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run ranks at loads below and above the limit of the table."""
    rows = []
    with ExitStack() as stack:
        ranks = [Rank(None, stack) for _ in range(RANKS)]
        for kind, load in itertools.product(ENCODINGS, LOADS):
            capacity = cpus.available() * rates[kind]["images_per_cpu_second"]
            for number, rank in enumerate(ranks):
                rank.ask(
                    Request(
                        url=sets[kind],
                        rank=number,
                        ranks=RANKS,
                        # some batches of each rank in the available time
                        batch_size=arguments.batch_size // (4 if kind == "original" else 1),
                        workers=1,
                        images_per_second=load * capacity / RANKS,
                        seconds=3 * arguments.seconds,
                    )
                )
            answers = [rank.answer() for rank in ranks]
            shares = [answer.waited / answer.seconds for answer in answers]
            rows.append(
                {
                    "encoding": kind,
                    "load": load,
                    "wanted_images_per_second": round(load * capacity, 1),
                    "images_per_second": round(sum(a.images / a.seconds for a in answers), 1),
                    "images_per_cpu_second": round(
                        sum(a.images for a in answers) / sum(a.cpu_seconds for a in answers), 1
                    ),
                    "expected_wait": round(max(0.0, 1 - 1 / load), 3),
                    "wait": round(statistics.mean(shares), 3),
                    "highest_wait": round(max(shares), 3),
                }
            )
            print(f"{kind} at {load}: {rows[-1]['wait']:.0%} of the time without data", flush=True)
    return rows


def forward_operations(model: str) -> int:
    """Count the floating-point operations of an image's forward."""
    visual: Any = open_clip.create_model(model, pretrained=None, device="meta").visual
    with FlopCounterMode(display=False) as counter:
        visual(torch.empty(1, 3, SIZE, SIZE, device="meta"))
    return counter.get_total_flops()


def gpu_rates() -> dict[str, float]:
    """Return images/s of one GPU for each model: targets, and rates derived from one of them."""
    derived = {
        model: round(GPU_RATES[other] * forward_operations(other) / forward_operations(model))
        for model, other in BY_OPERATIONS.items()
    }
    return {**GPU_RATES, **derived}


def sizing(result: dict[str, Any]) -> str:
    """Compute the table of cores and bandwidth for a number of GPUs."""
    # in the order of the code: a saved result is sorted alphabetically
    rates = {name: result["rates"][name] for name in COLUMNS if name in result["rates"]}
    each = {model: result["gpu_images_per_second"][model] for model in (*GPU_RATES, *BY_OPERATIONS)}
    lines = [
        f"| model | GPUs | images/s | {' | '.join(f'`{name}`' for name in rates)} |",
        f"|---|--:|--:|{'--:|' * len(rates)}",
    ]
    for model, gpus in itertools.product(each, GPUS):
        wanted = gpus * each[model]
        cells = [need(wanted, column) for column in rates.values()]
        lines.append(f"| {model} | {gpus} | {wanted:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def need(wanted: float, column: dict[str, Any]) -> str:
    """Compute the cores and the bandwidth for so many images per second."""
    cores = wanted / column["images_per_cpu_second"]
    return f"{cores:,.1f} cores, {wanted * column['bytes_per_image'] / 1e6:,.0f} MB/s"


def page(result: dict[str, Any]) -> str:
    """Format a saved result as a page."""
    rates = "\n".join(
        f"| `{name}` | {row['images_per_cpu_second']:,.0f} ({row['lowest']:,.0f} to "
        f"{row['highest']:,.0f}) | {row['bytes_per_image'] / 1000:,.0f} |"
        for name in COLUMNS
        if (row := result["rates"].get(name))
    )
    simulation = "\n".join(
        f"| `{row['encoding']}` | {row['wanted_images_per_second']:,.0f} | "
        f"{row['images_per_second']:,.0f} | {row['load']:.0%} | {row['expected_wait']:.0%} | "
        f"{row['wait']:.0%} ({row['highest_wait']:.0%}) | "
        f"{row['images_per_cpu_second']:,.0f} |"
        for row in result["simulation"]
    )
    assumed = ", ".join(
        f"{model} {result['gpu_images_per_second'][model]:,.0f}" for model in GPU_RATES
    )
    derived = ", ".join(
        f"{model} as {other} by counted operations" for model, other in BY_OPERATIONS.items()
    )
    parts = [
        f"{result['processor']}, everything in the page cache; {result['images']:,} photographs of "
        f"about 500 x 375 and 80 to 110 KB; medians of {result['rounds']} interleaved rounds; "
        f"{result['date'][:10]}. Processes that wanted a core before the start (load average): "
        f"{result['load_before']:.1f}.",
        "| encoding | images per second of one core (lowest to highest round) | kB per image |\n"
        f"|---|--:|--:|\n{rates}",
        "Loader cores and bandwidth of the storage for some GPUs. **The rates of GPUs are "
        f"assumptions, none was measured**: images/s of one GPU, {assumed}; {derived}.",
        sizing(result),
        f"The division, checked by {result['ranks']} simulated ranks on {result['cpus']} cores, "
        "below and above what these feed by their rates:",
        "| encoding | images/s wanted | images/s read | of the cores' rate | time without data, "
        f"expected | measured, mean (highest rank) | images per CPU second |\n"
        f"|---|--:|--:|--:|--:|--:|--:|\n{simulation}",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure and print."""
    arguments = cli.parse(Arguments, prog="benchmarks.feeding")
    load_before, _, _ = os.getloadavg()
    work = arguments.work / str(arguments.images)
    sets = photos.pack_as(ENCODINGS, work, arguments.images)
    sets = {kind: str(Path(url).resolve()) for kind, url in sets.items()}
    rates = measure_rates(arguments, sets)
    result = {
        "benchmark": "feeding",
        **machine.describe(),
        "versions": machine.versions(["torch", "numpy", "pillow"]),
        "cpus": cpus.available(),
        "load_before": round(load_before, 2),
        "ranks": RANKS,
        "images": arguments.images,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "gpu_images_per_second": gpu_rates(),
        "rates": rates,
        "simulation": simulate(arguments, sets, rates),
    }
    print(f"\n{page(result)}")
    if arguments.save:
        files.write_json(str(RESULTS / "feeding_cpu.json"), result)
        files.write_bytes(str(RESULTS / "feeding.md"), page(result).encode())
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
