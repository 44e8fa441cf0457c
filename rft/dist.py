"""The only user of torch.distributed, except for its memory tracker.

Everything works the same in one process without torchrun, where nothing is initialised.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rft import cli
from rft.storage import files, urls
from rft.text import short

T = TypeVar("T")

# Environment for ranks on one machine. Without it torchrun sets one thread per rank with a long
# warning, and its usual store listens on every address.
RANKS_HERE = {
    "OMP_NUM_THREADS": "1",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_CONF": "store_type=file",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, and the position of this one among them."""

    rank: int
    size: int
    local_rank: int
    local_size: int = 1
    grouped: bool = field(default=False, compare=False, repr=False)
    """Whether `process_group` is open, so that ranks can exchange tensors."""
    control: Any = field(default=None, compare=False, repr=False)
    """Group of all ranks for values on the CPU; None if the default group handles those."""

    @property
    def ranks_on_node(self) -> range:
        """The ranks on this rank's machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)

    @property
    def alone(self) -> bool:
        """Whether exchanges are no-ops: a single rank without a group."""
        return self.size == 1 and not self.grouped

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0


def world_from_env() -> World:
    """Read the world that torchrun describes in the environment; without torchrun, one process.

    Raises:
        ValueError: naming a variable that is not a number or does not fit such a world.
    """
    size = _number("WORLD_SIZE", 1, range(1, 2**31))
    # only checked here: torch reads it when the ranks meet
    _number("MASTER_PORT", 0, range(2**16))
    return World(
        rank=_number("RANK", 0, range(size)),
        size=size,
        local_rank=_number("LOCAL_RANK", 0, range(size)),
        local_size=_number("LOCAL_WORLD_SIZE", 1, range(1, size + 1)),
    )


def _number(variable: str, default: int, allowed: range) -> int:
    text = os.environ.get(variable, str(default))
    if not re.fullmatch("[0-9]{1,10}", text, re.ASCII) or int(text) not in allowed:
        raise ValueError(
            f"{variable} is {short(text)} in the environment; torchrun sets it to a whole number "
            f"from {allowed[0]} to {allowed[-1]}: start with torchrun, or unset it "
            "(docs/cluster.md)"
        )
    return int(text)


def pick_device(choice: str, world: World) -> torch.device:
    """Choose this rank's device for `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: if `cuda` is requested and absent, or there are more ranks than GPUs.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is cuda, but torch sees no GPU; use cpu (--device cpu, in Python device='cpu')"
        )
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {world.rank} has no GPU: torchrun started more processes on this machine than "
            f"its {torch.cuda.device_count()} GPUs; lower --nproc_per_node"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether `device`, as `pick_device` returned it, is a GPU with native bf16."""
    # by default torch counts emulation too
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def process_group(
    world: World, device: torch.device, timeout: float = 600, *, even_alone: bool = False
) -> Iterator[World]:
    """Join the other ranks (NCCL on GPU, gloo on CPU) for the length of the body.

    A mistake that only this rank meets, such as a damaged shard, is printed here, because `cli.run`
    prints only those of the first rank per node. The group is then not destroyed: that would wait
    for the other ranks, which wait in a collective. torchrun ends them all.

    Yields the world with its control group. Ranks wait `timeout` seconds for a missing one. A
    single rank gets a group with `even_alone`: on a machine with one GPU, only this exercises the
    code of several.

    Raises:
        TimeoutError: naming the ranks that did not answer.
    """
    if world.size == 1 and not even_alone:
        yield world
        return
    if world.size == world.local_size:
        # nothing leaves the machine, and its host name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = datetime.timedelta(seconds=timeout)
    backend, control_backend = _backends(device)
    store = _meeting_place(world, patience)
    try:
        torch.distributed.init_process_group(
            backend,
            # separate from torchrun's own keys and from those of `_who_is_missing`
            store=torch.distributed.PrefixStore("rft", store),
            rank=world.rank,
            world_size=world.size,
            # NCCL would end the process without our message, so the control group times out first
            timeout=2 * patience if control_backend else patience,
        )
        control: Any = None
        if control_backend:
            control = torch.distributed.new_group(backend=control_backend, timeout=patience)
        yield dataclasses.replace(world, grouped=True, control=control)
        # gloo can abort if a peer leaves before all have finished
        torch.distributed.barrier(group=control)
    except (ValueError, OSError) as error:  # a user's mistake, as defined in `cli.run`
        _tell(world, error)
        raise
    except RuntimeError as error:
        # another rank is gone or silent; gloo has no error class, so its path in the text decides
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        # a rank that died is noticed by all at once; timeouts expire rank by rank
        seconds = 10 if "Timed out" in str(error) else 3
        told = TimeoutError(_who_is_missing(world, store, min(timeout, seconds)))
        _tell(world, told)
        raise told from error
    torch.distributed.destroy_process_group()


def _backends(device: torch.device) -> tuple[str, str | None]:
    """Choose the backend for tensors of `device`, and the control group's if it needs its own."""
    return ("nccl", "gloo") if device.type == "cuda" else ("gloo", None)


def _meeting_place(world: World, wait: datetime.timedelta) -> Any:
    """Open the store in which the ranks meet: torchrun's, or a file if torchrun keeps none.

    A TCP store listens on every address of the machine. If torchrun is configured to keep none
    (docs/cluster.md), ranks on one machine meet in a file beside torchrun's own, new for each
    start.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # torchrun's file is .../attempt_N/RANK/error.json; [1] is attempt_N, shared by all ranks
    folders = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    if agents or len(folders) < 2 or world.size > world.local_size:
        if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError(
                f"WORLD_SIZE is {world.size}, but MASTER_ADDR and MASTER_PORT are not set in the "
                "environment: start with torchrun, or unset WORLD_SIZE and RANK (docs/cluster.md)"
            )
        try:
            store, _, _ = next(torch.distributed.rendezvous("env://", timeout=wait))
        except torch.distributed.DistError as error:
            where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise OSError(f"the ranks cannot meet at {where}: {files.reason(error)}") from error
        return store
    store = torch.distributed.FileStore(str(folders[1] / "store"), world.size)
    store.set_timeout(wait)
    return store


def _tell(world: World, error: Exception) -> None:
    if cli.is_quiet_rank():
        print(f"error on rank {world.rank}: {urls.redact(str(error))}", file=sys.stderr, flush=True)


def _who_is_missing(world: World, store: Any, seconds: float) -> str:
    """Write the error line that names the ranks which do not answer within `seconds`.

    Each waiting rank notes that in the store they met in, which no rank hosts.
    """
    names = [f"rft/waits/{rank}" for rank in range(world.size)]
    missing = [rank for rank in range(world.size) if rank != world.rank]
    deadline = time.monotonic() + seconds
    try:
        store.set(names[world.rank], "")
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([names[rank]])]
            time.sleep(0.1)
    except torch.distributed.DistError:  # the store ended with the torchrun that hosted it
        return "lost contact with the other ranks, and with torchrun, which started them"
    if not missing:
        return "a message between ranks was lost, but all of them answer: check the network"
    return (
        f"no answer from {'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))} "
        f"of {world.size}: hung or gone. Check their last output; the same command resumes from "
        "the newest checkpoint (docs/cluster.md)"
    )


def step_aside(world: World) -> NoReturn:
    """End this rank silently, because the main rank reports why all of them end.

    The main rank must not join any collective afterwards. This rank waits for its end, because
    torchrun ends all ranks when the first one exits, and the main rank may still have a checkpoint
    to write.

    Raises:
        SystemExit: always, with code 2 as after an error.
    """
    with contextlib.suppress(RuntimeError):  # the main rank exits without reaching this barrier
        torch.distributed.barrier(group=world.control)
    raise SystemExit(2)


def on_main(world: World, work: Callable[[], T]) -> T | None:
    """Run `work` on the main rank and return its result, None elsewhere; all ranks wait for it.

    Long work is not mistaken for a hanging rank. If it raises, the other ranks step aside.
    """
    if world.alone:
        return work()
    # in a separate thread, so that this one can answer the waiting ranks meanwhile
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if world.is_main else None
        # one broadcast per second, so that no collective waits longer than its timeout
        while not from_main(world, future and bool(wait([future], timeout=1).done)):
            continue
    # where `work` raised, the main rank raises it below
    failed = from_main(world, future and future.exception() is not None)
    if failed and not world.is_main:
        step_aside(world)
    return future.result() if future else None


def largest(world: World, value: int) -> int:
    """Compute the largest `value` of all ranks, on every rank, without waiting for a GPU."""
    if world.alone:
        return value
    # on the CPU, for the control group; without one, the default group is gloo
    number = torch.tensor(value)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=world.control)
    return int(number)


def from_main(world: World, value: Any) -> Any:
    """Broadcast the main rank's `value` to every rank."""
    if world.alone:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, group=world.control)
    return values[0]


def gather_objects(world: World, value: Any) -> list[Any]:
    """Gather every rank's `value`, in rank order, on every rank."""
    if world.alone:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value, group=world.control)
    return values


def gather_on_main(world: World, value: Any) -> list[Any]:
    """Gather every rank's `value`, in rank order, on the main rank; an empty list elsewhere."""
    if world.alone:
        return [value]
    values: list[Any] = [None] * world.size if world.is_main else []
    torch.distributed.gather_object(value, values or None, dst=0, group=world.control)
    return values


def meet(world: World) -> None:
    """Wait for all ranks before a call to NCCL, which cannot name a missing rank."""
    if world.control is not None:
        torch.distributed.barrier(group=world.control)


def sum_over_ranks(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks; exact for int64 counts."""
    if not world.alone:
        meet(world)
        tensor = tensor.clone()  # all_reduce works in place
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_rows(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the equally shaped `tensor` of all ranks, in rank order."""
    if world.alone:
        return tensor
    meet(world)
    # one tensor for all ranks, which the call fills along the first dimension
    rows = tensor.new_empty((world.size * len(tensor), *tensor.shape[1:]))
    torch.distributed.all_gather_into_tensor(rows, tensor.contiguous())
    return rows


class _GatherRows(torch.autograd.Function):
    """`gather_rows` with a gradient: the sum of all ranks' gradients for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        return gather_rows(world, tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = sum_over_ranks(ctx.world, gradients[0].contiguous())
        return summed.chunk(ctx.world.size)[ctx.world.rank], None


def gather_rows_with_gradient(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """`gather_rows` with a gradient; all ranks must run the backward through it together."""
    return tensor if world.alone else _GatherRows.apply(tensor, world)


def require_agreement(
    world: World, what: str, value: Any, advice: str = "do all nodes see the same files?"
) -> None:
    """Check that every rank computed the same `value`.

    Raises:
        ValueError: naming the ranks that differ from rank 0.
    """
    values = gather_objects(world, value)
    if different := [rank for rank, other in enumerate(values) if other != values[0]]:
        if not world.is_main:
            step_aside(world)
        raise ValueError(
            f"ranks {different} have a different {what} than rank 0: "
            f"{values[different[0]]!r} against {values[0]!r}; {advice}"
        )


def data_parallel(world: World, module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap `module` so that its backward averages gradients over the ranks."""
    if world.alone:
        return module
    # buffers are constants, equal on all ranks: broadcasting them per step would only cost a wait
    constants = [name for name, _ in module.named_buffers()]
    # private: torch has no public call for this yet (pytorch issue 43690)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constants)
    meet(world)  # DistributedDataParallel compares shapes and sends weights through NCCL at once
    device_ids = [device.index] if device.type == "cuda" else None
    # gradients share the memory of the exchanged buckets: no second copy
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


def is_parallel(module: nn.Module) -> bool:
    """Whether `data_parallel` wrapped `module`, so that ranks compute with it together."""
    return isinstance(module, DistributedDataParallel)


def skip_sync(module: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
    """Context in which backward keeps gradients local if `skip` is true."""
    if skip and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def start_ranks(module: str, options: Sequence[str], ranks: int) -> int:
    """Start `python -m MODULE OPTION...` as `ranks` processes on this machine, like torchrun.

    Returns:
        The exit code: 0, or that of the rank that failed first and printed why, or 128 + the number
        of the signal received.

    Raises:
        ChildProcessError: if a signal ended a rank.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun's own report of a failure fills a page below our one line
    logging.disable(logging.CRITICAL)
    for name, value in RANKS_HERE.items():
        os.environ.setdefault(name, value)
    words = ["--nproc_per_node", str(ranks), "-m", module, *options]
    try:
        run.run(run.parse_args(words))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        # a killed rank could not print its own line
        raise ChildProcessError(
            f"rank {rank} was ended by {signal.Signals(-first.exitcode).name}; SIGKILL often means "
            "that the machine's memory was used up"
        ) from error
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
