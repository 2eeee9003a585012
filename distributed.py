"""The processes that train one model together, on torch.distributed. In a single process, nothing here does anything.

torchrun starts the processes and tells each one, in its environment, its rank and their number. They communicate
through gloo on a CPU and nccl on CUDA. Only the first process (rank 0) prints and writes files.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from messages import UserError

LONGEST_WAIT = timedelta(minutes=30)  # for another process; longer than any step, validation or save
LONGEST_DOWNLOAD = timedelta(days=1)
# Joins the processes that a cluster starts, one on each machine with these variables set, into one group
AS_TORCHRUN = (
    "torchrun --nnodes=$WORLD_SIZE --node_rank=$RANK --nproc_per_node=1 --master_addr=$MASTER_ADDR "
    "--master_port=$MASTER_PORT"
)
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")  # gloo, nccl

_store: dist.Store | None = None  # torchrun's own: what is written there outlives a restart of the processes


# --- The group of processes ------------------------------------------------------------------------------------------


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for the length of the block.

    Only the first process prints. An exception in one process ends all of them. It is raised in that process only: in
    the others, which then fail with the same error or a lost connection, it is not reported again.
    """
    global _store
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        if size() == 1:
            refuse_processes(f"start each as {AS_TORCHRUN} train.py ...")
        yield
        return
    ours = not dist.is_initialized()
    if ours:
        _store = _join()
    try:
        with nullcontext() if is_first() else open(os.devnull, "w") as nowhere, redirect_stdout(nowhere or sys.stdout):
            yield
    except Exception as error:
        if _reported_elsewhere():
            time.sleep(1)  # time for the report: torchrun kills all processes as soon as one has ended
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        if any(words in str(error) for words in LOST):
            raise UserError(
                "lost another process of the run, which was killed or lost its connection; continue with --resume, or "
                "let torchrun do so: --max-restarts=3"
            ) from error
        raise
    if ours:  # not after an exception: this may wait for the others
        dist.destroy_process_group()


def refuse_processes(remedy: str) -> None:
    """Refuse to be one of several processes that know nothing of each other.

    Some clusters set RANK and WORLD_SIZE and start a plain `python train.py` on each machine. Without torchrun, each of
    them would do the whole work by itself.

    Raises:
        UserError: the environment says that this is one of several processes.
    """
    count, number = _from_environment("WORLD_SIZE"), _from_environment("RANK")
    if (count or 1) > 1 or (number or 0) >= (count or 1):
        raise UserError(
            f"the environment says that this is one of several processes (RANK={number}, WORLD_SIZE={count}), and each "
            f"would do the whole work by itself: {remedy}, or unset both for a single process"
        )


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a whole number; correct or unset it")
    return int(text) if text else None


def _join() -> dist.Store:
    """Join the group of processes that the environment describes. Returns torchrun's store."""
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=number == 0 and not served, multi_tenant=True)
    # Restarted processes must not find the addresses of those before, which torch left under the same names
    names = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']} of {count}", store)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=names, rank=number, world_size=count, timeout=LONGEST_WAIT)
    return store


def _reported_elsewhere() -> bool:
    """Whether another process of this start has met an error before."""
    if _store is None:  # the caller made the group
        return False
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    try:
        return _store.compare_set(f"failed first in start {start}", "", str(rank())).decode() != str(rank())
    except RuntimeError:  # torchrun itself is gone
        return False


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on CUDA, each one has a card of its own.

    Raises:
        UserError: there are too few cards, or the device is neither CUDA nor a CPU.
    """
    if size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"device: several processes train on cuda or cpu, not on {device.type}; add --device cpu")
    number, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= cards:
        raise UserError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {cards} CUDA cards; "
            f"start torchrun with --nproc_per_node={cards}, or train with --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


# --- Waiting for each other ------------------------------------------------------------------------------------------


def barrier() -> None:
    if size() > 1:
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block, which may download, in the first process, then in the first one of every other machine, then in
    all others.

    So the later ones find the files that the block downloads, whether the disk is shared or each machine has its own.
    They wait up to LONGEST_DOWNLOAD.
    """
    if size() == 1:
        yield
        return
    patient = dist.new_group(backend="gloo", timeout=LONGEST_DOWNLOAD)
    turn = 0 if is_first() else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for _ in range(turn):
        dist.barrier(patient)
    yield
    for _ in range(3 - turn):
        dist.barrier(patient)


# --- Exchange --------------------------------------------------------------------------------------------------------


def replicate(model: nn.Module) -> nn.Module:
    """The model for training: its backward pass averages the gradients over all processes."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if size() > 1 else model


def no_sync(model: nn.Module) -> Any:
    """Within the block, a model from `replicate` adds up gradients in this process without exchanging them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def all_reduce(values: Tensor) -> None:
    """Replace the values by their sum over the processes; on CUDA, without waiting for the result."""
    if size() > 1:
        dist.all_reduce(values)


def gather(value: Any) -> list[Any]:
    """In the first process, the values of all processes in the order of their ranks; in the others, []."""
    if size() == 1:
        return [value]
    values = [None] * size() if is_first() else None
    dist.gather_object(value, values)
    return values or []


def all_gather(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks, in each of them; they wait up to LONGEST_DOWNLOAD."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value, dist.new_group(backend="gloo", timeout=LONGEST_DOWNLOAD))
    return values


def broadcast(function: Callable[..., Any], *args: Any) -> Any:
    """Call the function in the first process; all processes get what it returns."""
    if size() == 1:
        return function(*args)
    result = [function(*args) if is_first() else None]
    dist.broadcast_object_list(result)
    return result[0]


# --- Restarts --------------------------------------------------------------------------------------------------------


def remember(name: str, text: str) -> None:
    """Keep a text for the processes that torchrun starts instead of these if one of them fails."""
    if _store:
        _store.set(name, text)


def recall(name: str) -> str | None:
    """What the processes of an earlier start of this launch remembered."""
    return _store.get(name).decode() if _store and _store.check([name]) else None


def is_started_again() -> bool:
    """Whether torchrun would restart the processes if they ended with a status other than 0."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and dist.is_torchelastic_launched()


def launcher() -> str:
    """The command, up to the script, that starts as many processes as are running now."""
    if size() == 1:
        return "python"
    several = int(os.environ["LOCAL_WORLD_SIZE"]) < size()
    return "torchrun ..." if several else f"torchrun --standalone --nproc_per_node={size()}"
