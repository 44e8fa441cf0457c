"""The only user of torch.distributed (but for its memory tracker): who am I, sum this, wrap that.

Works the same in one process without torchrun; then nothing is initialised.
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

# variables for ranks on one machine: torchrun would choose one thread for each with a long warning,
# and its usual store listens on every address
RANKS_HERE = {
    "OMP_NUM_THREADS": "1",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_CONF": "store_type=file",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    local_rank: int
    local_size: int = 1
    grouped: bool = field(default=False, compare=False, repr=False)
    """Whether `process_group` is open, so that ranks can exchange tensors."""
    control: Any = field(default=None, compare=False, repr=False)
    """Group of all ranks for numbers that live on the CPU; None where the tensors' own serves."""

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
    """Return the world that torchrun describes in the environment; alone without torchrun.

    Raises:
        ValueError: naming the variable that is no number, or not one of such a world.
    """
    size = _number("WORLD_SIZE", 1, range(1, 2**31))
    # only checked: torch reads it where the ranks meet
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
            f"from {allowed[0]} to {allowed[-1]}: start with torchrun, or unset it"
        )
    return int(text)


def pick_device(choice: str, world: World) -> torch.device:
    """Return this rank's device for `auto`, `cpu` or `cuda`.

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
    """Whether `device`, as `pick_device` returned it, has native bf16; no CPU counts."""
    # by default torch says yes for emulation too
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def process_group(
    world: World, device: torch.device, timeout: float = 600, *, even_alone: bool = False
) -> Iterator[World]:
    """Join the other ranks (NCCL on GPU, gloo on CPU) for the length of the body.

    A mistake that only this rank meets, such as a damaged shard, is printed here: `cli.run` prints
    those of the first rank of each node alone. The group is left as it is then, because taking it
    down waits for the others, who wait in a collective; torchrun ends them all.

    Yields the world with its control group. Ranks wait `timeout` seconds for one of them. A single
    rank gets a group if it is opened `even_alone`: on one GPU nothing else runs what several run.

    Raises:
        TimeoutError: naming the ranks that the others waited for in vain.
    """
    if world.size == 1 and not even_alone:
        yield world
        return
    if world.size == world.local_size:
        # nothing leaves the machine, and its name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = datetime.timedelta(seconds=timeout)
    backend, control_backend = _backends(device)
    store = _meeting_place(world, patience)
    try:
        torch.distributed.init_process_group(
            backend,
            # apart from torchrun's own keys and from those of `_who_is_missing`
            store=torch.distributed.PrefixStore("rft", store),
            rank=world.rank,
            world_size=world.size,
            # NCCL ends the process without a message of ours, so the control group times out first
            timeout=2 * patience if control_backend else patience,
        )
        control: Any = None
        if control_backend:
            control = torch.distributed.new_group(backend=control_backend, timeout=patience)
        yield dataclasses.replace(world, grouped=True, control=control)
        # gloo can abort when a peer is gone before everyone has finished
        torch.distributed.barrier(group=control)
    except (ValueError, OSError) as error:  # a user's mistake, as `cli.run` has it
        _tell(world, error)
        raise
    except RuntimeError as error:
        # another rank is gone or silent; gloo has no error class of its own
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        # ranks that lose one that died notice at once, those that wait for one began one by one
        seconds = 10 if "Timed out" in str(error) else 3
        told = TimeoutError(_who_is_missing(world, store, min(timeout, seconds)))
        _tell(world, told)
        raise told from error
    torch.distributed.destroy_process_group()


def _backends(device: torch.device) -> tuple[str, str | None]:
    """Choose the backend for tensors of `device`, and one for the control group if it needs one."""
    return ("nccl", "gloo") if device.type == "cuda" else ("gloo", None)


def _meeting_place(world: World, wait: datetime.timedelta) -> Any:
    """Return the store in which the ranks meet: torchrun's, or a file where it keeps none.

    A TCP store listens on every address of the machine. Where torchrun is told to keep none
    (docs/cluster.md), ranks on one machine meet in a file beside its own, new for each start.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # torchrun's file is .../attempt_N/RANK/error.json; [1] is the folder of all ranks of a start
    folders = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    if agents or len(folders) < 2 or world.size > world.local_size:
        if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError(
                f"WORLD_SIZE is {world.size}, but MASTER_ADDR and MASTER_PORT in the environment "
                "do not say where ranks meet: start with torchrun, or unset WORLD_SIZE and RANK"
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
    """Name the ranks which do not answer within `seconds`, in a line for the error.

    Ranks that wait record it in the store they met in, which none of them holds.
    """
    names = [f"rft/waits/{rank}" for rank in range(world.size)]
    missing = [rank for rank in range(world.size) if rank != world.rank]
    deadline = time.monotonic() + seconds
    try:
        store.set(names[world.rank], "")
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([names[rank]])]
            time.sleep(0.1)
    except torch.distributed.DistError:  # the store ended with the torchrun that held it
        return "lost contact with the other ranks, and with torchrun, which started them"
    if not missing:
        return "a message between ranks was lost, but all of them answer: look at the network"
    return (
        f"no answer from {'rank' if len(missing) == 1 else 'ranks'} "
        f"{', '.join(map(str, missing))} of {world.size}: hung or gone. See what was last said "
        "there; the same command goes on from the newest checkpoint"
    )


def step_aside(world: World) -> NoReturn:
    """End this rank silently, where the main rank reports why all of them end.

    The main rank must not take part in anything after that: its end is waited for, because torchrun
    ends all ranks when the first one is gone, and it may still have a checkpoint to write.

    Raises:
        SystemExit: always; code 2, as after an error.
    """
    with contextlib.suppress(RuntimeError):  # the main rank ends: its barrier never comes
        torch.distributed.barrier(group=world.control)
    raise SystemExit(2)


def on_main(world: World, work: Callable[[], T]) -> T | None:
    """Return what `work` returns on the main rank, None elsewhere; all ranks wait for its end.

    However long it takes, it is not mistaken for a rank that hangs. If it raises, the others step
    aside.
    """
    if world.alone:
        return work()
    # in a thread of its own, so that this one can keep the others waiting meanwhile
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if world.is_main else None
        # a broadcast each second, so that no collective waits longer than its timeout
        while not from_main(world, future and bool(wait([future], timeout=1).done)):
            continue
    # where `work` raised, the main rank raises it below
    failed = from_main(world, future and future.exception() is not None)
    if failed and not world.is_main:
        step_aside(world)
    return future.result() if future else None


def largest(world: World, value: int) -> int:
    """Return the largest of all ranks' `value`, on every rank; nothing waits for a GPU."""
    if world.alone:
        return value
    # on the CPU, where the control group is; without one, gloo serves all tensors
    number = torch.tensor(value)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=world.control)
    return int(number)


def from_main(world: World, value: Any) -> Any:
    """Return the main rank's `value` on every rank."""
    if world.alone:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, group=world.control)
    return values[0]


def gather_objects(world: World, value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if world.alone:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value, group=world.control)
    return values


def gather_on_main(world: World, value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on the main rank; nothing elsewhere."""
    if world.alone:
        return [value]
    values: list[Any] = [None] * world.size if world.is_main else []
    torch.distributed.gather_object(value, values or None, dst=0, group=world.control)
    return values


def meet(world: World) -> None:
    """Wait for all ranks before they wait in NCCL, which cannot name a missing one."""
    if world.control is not None:
        torch.distributed.barrier(group=world.control)


def sum_over_ranks(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over all ranks; exact for int64 counts."""
    if not world.alone:
        meet(world)
        tensor = tensor.clone()  # all_reduce works in place
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_rows(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Return all ranks' `tensor`, equally shaped, one after the other in rank order."""
    if world.alone:
        return tensor
    meet(world)
    # one tensor for all ranks: the call fills it, first dimension by rank
    rows = tensor.new_empty((world.size * len(tensor), *tensor.shape[1:]))
    torch.distributed.all_gather_into_tensor(rows, tensor.contiguous())
    return rows


class _GatherRows(torch.autograd.Function):
    """`gather_rows`, whose gradient is the sum of what all ranks did with this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        return gather_rows(world, tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = sum_over_ranks(ctx.world, gradients[0].contiguous())
        return summed.chunk(ctx.world.size)[ctx.world.rank], None


def gather_rows_with_gradient(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Return what `gather_rows` does; a backward through it must be run by all ranks alike."""
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
    """Wrap `module` so that backward averages its gradients over the ranks."""
    if world.alone:
        return module
    # constants, the same everywhere: broadcast in each step they make all ranks wait for the first
    constants = [name for name, _ in module.named_buffers()]
    # private: torch has no public call for it yet (pytorch issue 43690)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constants)
    meet(world)  # DistributedDataParallel compares shapes and sends weights through NCCL at once
    device_ids = [device.index] if device.type == "cuda" else None
    # gradients share the memory of the exchanged buckets: no second copy
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


def is_parallel(module: nn.Module) -> bool:
    """Whether ranks compute with `module` together: what `data_parallel` wrapped."""
    return isinstance(module, DistributedDataParallel)


def skip_sync(module: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which backward keeps gradients local if `skip` is true."""
    if skip and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def start_ranks(module: str, options: Sequence[str], ranks: int) -> int:
    """Start `python -m MODULE OPTION...` as so many ranks on this machine, as torchrun does.

    Returns:
        The exit code: 0, that of the rank that failed first, which printed why, or 128 + the number
        of the signal that this process got.

    Raises:
        ChildProcessError: if a rank was ended by a signal.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # its own account of a failure is a page, below the one line that says all
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
        # it had no time for a line of its own
        raise ChildProcessError(
            f"rank {rank} was ended by {signal.Signals(-first.exitcode).name}; SIGKILL often means "
            "that the machine's memory was used up"
        ) from error
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
