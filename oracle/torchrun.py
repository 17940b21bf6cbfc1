"""Under torchrun: rank 0 drives, and every rank serves as a worker.

``torchrun --nproc-per-node N -m twinmoe.oracle check ...`` starts the program N times.  The
processes are there already, on one host or on several, and their launcher ends them all
when one dies.  So where elsewhere a World starts workers of its own, here it sends each
task over a gloo group to the processes that run, the first of them itself.
"""

import atexit
import ctypes
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from twinmoe.optimized.triton_runtime import INTERPRETED
from twinmoe.oracle import wire
from twinmoe.oracle.breadcrumbs import Footprint, Recorder, Trail
from twinmoe.oracle.failures import Raised, WorkerError, is_secondary, tell
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import Task, World
from twinmoe.reference.config import ConfigError

T = TypeVar("T")

#: What torchrun tells the processes that it starts.
_ENVIRONMENT = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE")

#: Patience of idle workers: judging and compiling on rank 0 take their time.
_IDLE = timedelta(hours=2)


def launched() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in _ENVIRONMENT)


def largest_world() -> int | None:
    """The number of processes that torchrun started; None without it."""
    return int(os.environ["WORLD_SIZE"]) if launched() else None


def open_world(
    size: int, device: str, timeout_s: float, opening: Task | None = None
) -> "World | TorchrunWorld":
    """Return a world of ``size`` ranks: torchrun's processes if there are any, else new ones.

    ``timeout_s`` and ``opening`` are for new ones: nobody watches torchrun's from here.
    """
    return TorchrunWorld(size, device) if launched() else World(size, device, timeout_s, opening)


@dataclass(frozen=True)
class _Order:
    """What rank 0 broadcasts: a task for the first ``size`` ranks, or None to go home."""

    size: int
    device: str
    task: bytes | None


class _Office:
    """This process' groups: one to talk to all ranks, one for each size of world."""

    def __init__(self) -> None:
        if _single_host():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        on_cuda = not INTERPRETED and torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend)
        self.rank = dist.get_rank()
        self.control = dist.new_group(backend="gloo", timeout=_IDLE)
        self._backend = backend
        self._groups: dict[int, dist.ProcessGroup | None] = {1: None}
        self._trail = Trail()
        self.recorder = Recorder(self._trail)
        self.recorder.install()

    def execute(self, order: _Order) -> list[Any] | None:
        """Run one task together with all ranks; the answers, on rank 0."""
        if order.size not in self._groups:
            # A collective over all ranks, members or not.
            self._groups[order.size] = dist.new_group(range(order.size), backend=self._backend)
        answer: Any = None
        if self.rank < order.size and order.task is not None:
            answer = self._attempt(order, order.task)
        answers: list[Any] = [None] * dist.get_world_size()
        footprint = Footprint.read(self._trail)
        told = (wire.dumps(answer), footprint)
        gathered = answers if self.rank == 0 else None
        dist.gather_object(told, gathered, dst=0, group=self.control)
        return answers[: order.size] if self.rank == 0 else None

    def _attempt(self, order: _Order, task: bytes) -> Any:
        ctypes.memset(ctypes.addressof(self._trail), 0, ctypes.sizeof(self._trail))
        self.recorder.begin_task()
        device = torch.device(order.device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        context = RankContext(self.rank, order.size, self._groups[order.size], device)
        try:
            function, args = wire.load_task(task)
            return function(context, *args)
        except Exception as error:  # told to rank 0, which decides what becomes of the run
            return Raised.of(error)


_office: _Office | None = None


def _open() -> _Office:
    global _office  # noqa: PLW0603 - a process joins torchrun's world once
    if _office is None:
        _office = _Office()
        if _office.rank == 0:
            atexit.register(_dismiss)
    return _office


def _single_host() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def serve() -> bool:
    """Work for rank 0 until it lets go; whether this process is a worker at all."""
    if not launched() or int(os.environ["RANK"]) == 0:
        return False
    office = _open()
    while True:
        order = _broadcast(office, None)
        if order.task is None:
            dist.destroy_process_group()
            return True
        office.execute(order)


def _broadcast(office: _Office, order: _Order | None) -> _Order:
    orders = [order]
    dist.broadcast_object_list(orders, src=0, group=office.control)
    received = orders[0]
    assert received is not None
    return received


def _dismiss() -> None:
    """Rank 0 ends: so may the others."""
    if _office is not None and dist.is_initialized():
        _broadcast(_office, _Order(0, "cpu", None))
        dist.destroy_process_group()


class TorchrunWorld:
    """The first ``size`` of torchrun's processes, as a `World`: see there.

    A rank that hangs is ended by torchrun or by a collective's own timeout: these processes
    are not ours to kill.  What they print is torchrun's affair, too.
    """

    printed = ""

    def __init__(self, size: int, device: str = "cpu") -> None:
        available = largest_world() or 0
        if not 1 <= size <= available:
            raise ConfigError(
                f"a world of {size} ranks needs as many processes, but torchrun started "
                f"{available}: use --ep up to {available}, or a larger --nproc-per-node"
            )
        self.size, self.device = size, device

    def run(self, function: Callable[..., T], *args: Any) -> list[T]:
        """Call ``function(rank_context, *args)`` on every rank; return one result per rank.

        Raises WorkerError where a rank raised.
        """
        office = _open()
        order = _Order(self.size, self.device, wire.dump_task((function, args)))
        _broadcast(office, order)
        told = office.execute(order) or []
        answers = [pickle.loads(data) for data, _ in told]
        raised = {rank: x for rank, x in enumerate(answers) if isinstance(x, Raised)}
        if raised:
            prints = {rank: footprint for rank, (_, footprint) in enumerate(told)}
            causes = {r: e for r, e in raised.items() if not is_secondary(e.text)} or raised
            first = next(iter(causes.values()))
            ranks = sorted(rank for rank, cause in causes.items() if str(cause) == str(first))
            finished = [rank for rank in prints if rank not in raised]
            raise WorkerError(ranks, first, prints, tell(prints, finished))
        return answers

    def close(self) -> None:
        """Leave the processes to whoever started them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
