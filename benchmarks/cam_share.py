"""The CAM's share of a training step, counted instead of timed: `python -m benchmarks.cam_share`.

One step of the training loop runs on tensors without values, in bf16 as on a GPU. Every operator
that is not a view counts: the operations of matrix products and attention, and the bytes of the
tensors that it reads and writes, each counted once. Parts of the CAM:
  backward   the logits' gradient on its way through the layers;
  maps       the relevance computed from it in each layer (rft/method/relevance.py: propagate).
The time of an operator is the maximum of its memory time and compute time at an H100's published
ceilings. No program reaches these ceilings, so the shares of time are estimates. The last line is
one JSON object.
"""

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import rft.train.objective
import rft.train.step
from benchmarks import machine, step
from rft import cli
from rft.method import relevance
from rft.storage import files
from rft.train import memory
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients

# published ceilings of an H100 SXM: bytes and operations per second, dense
BYTES_PER_S = 3.35e12
FLOPS_PER_S = {torch.bfloat16: 989e12, torch.float32: 67e12}


@dataclass(frozen=True)
class Arguments:
    """Count the CAM's share of a step's operations, memory traffic and estimated time."""

    models: tuple[str, ...] = ("ViT-B-16", "ViT-L-14", "ViT-L-14-336")
    """open_clip model names."""
    batch_sizes: tuple[int, ...] = (512, 128)
    save: bool = False
    """Also write the result to benchmarks/results/."""


class Costs(TorchDispatchMode):
    """Adds up the cost of operators per phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.found: dict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator and count it."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            self.count(func, args, kwargs or {}, result)
        return result

    def count(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Add the cost of one operator."""
        read, written = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        # a tensor that is allocated, or a view from reshape, moves no bytes
        if not read or (
            all(_same(tensor, read) for tensor in written) and not func._schema.is_mutable
        ):
            return
        moved = sum(tensor.nbytes for tensor in [*read, *written])
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        seconds = moved / BYTES_PER_S
        if flops:
            seconds = max(seconds, flops / FLOPS_PER_S[read[-1].dtype])
        self.found[self.phase].update({"flops": flops, "bytes": moved})
        self.found[self.phase]["seconds"] += seconds  # pyrefly: ignore[unsupported-operation]

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count calls in the body as `phase`."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before


def _same(tensor: Tensor, others: list[Tensor]) -> bool:
    storage = tensor.untyped_storage()
    return any(storage._cdata == other.untyped_storage()._cdata for other in others)


def count_step(arguments: step.Arguments) -> dict[str, Counter[str]]:
    """Count the costs of one optimizer step, by phase."""
    student = step.build_classifier(arguments.model, arguments.classes)
    job = step.build_job(arguments, torch.device("cpu"), "bf16", student)
    mode, job = memory.without_values(job)
    costs, cam = Costs(), cast(Any, relevance)
    propagate = cam.propagate

    def maps(*tensors: Any) -> None:
        with costs.during("maps"):
            propagate(*tensors)

    modules: tuple[Any, ...] = (rft.train.step, rft.train.objective)
    record_function: Callable[..., Any] = rft.train.step.record_function
    try:
        cam.propagate = maps
        for module in modules:
            module.record_function = costs.during
        with mode:
            optimizer = build_optimizer(job.objective, job.config.optim)
            batch = step.random_batch(arguments, job.device, job.batches.image_size)
            with costs:
                accumulate_gradients(job, job.objective, batch, step=0)
                optimizer.step()
    finally:
        cam.propagate = propagate
        for module in modules:
            module.record_function = record_function
    return costs.found


def shares(found: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Return totals of the step, and the shares of both parts of the CAM."""
    whole = {
        name: sum(cost[name] for cost in found.values()) for name in ("flops", "bytes", "seconds")
    }
    parts = {"backward": found["cam"], "maps": found["maps"]}
    return {
        "step_flops": whole["flops"],
        "step_bytes": whole["bytes"],
        "estimated_step_seconds": round(whole["seconds"], 5),
        "cam_bytes": sum(cost["bytes"] for cost in parts.values()),
        "cam_flops": sum(cost["flops"] for cost in parts.values()),
        "share": {
            part: {name: round(cost[name] / total, 4) for name, total in whole.items()}
            for part, cost in parts.items()
        },
    }


def measure(arguments: Arguments) -> dict[str, Any]:
    """Count every model at every batch size."""
    rows = []
    for model in arguments.models:
        for batch_size in arguments.batch_sizes:
            found = count_step(step.Arguments(model=model, batch_size=batch_size))
            rows.append({"model": model, "batch_size": batch_size, **shares(found)})
            print(json.dumps(rows[-1]), flush=True)
    return {
        "benchmark": "cam_share",
        **machine.describe(),
        "torch": torch.__version__,
        "assumed_bytes_per_s": BYTES_PER_S,
        "assumed_flops_per_s": {str(kind): rate for kind, rate in FLOPS_PER_S.items()},
        "rows": rows,
    }


def main() -> None:
    """Count and print."""
    arguments = cli.parse(Arguments, prog="benchmarks.cam_share")
    result = measure(arguments)
    if arguments.save:
        files.write_json(str(step.RESULTS / "cam_share.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
