"""One rank of a world: a process that runs the driver's tasks until its pipe closes."""

import contextlib
import ctypes
import faulthandler
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from twinmoe.optimized.communication import pool_setup
from twinmoe.optimized.communication.cpu_symmetric_memory import remove_leftovers
from twinmoe.optimized.triton_runtime import kernels_run_on
from twinmoe.oracle import descendants, last_words, printed, wire
from twinmoe.oracle.breadcrumbs import Recorder, Trail
from twinmoe.oracle.failures import Raised
from twinmoe.oracle.side_effects import watch_for_starts

#: Sent by the driver in place of a task: leave the group and end.
GOODBYE = b""
#: Makes a worker write its Python stack into its stack file, even inside native code.
STACK_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class RankContext:
    """What a task knows of its place: ``group`` is None in a world of one rank."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    device: torch.device

    def release_pools(self) -> None:
        """Let go of all symmetric memory, that of layers on this rank alone included.

        No peer may be reading it: see :func:`pool_setup.release_pools`.
        """
        for group in {self.group, None}:
            pool_setup.release_pools(group)


@dataclass(frozen=True)
class Post:
    """Where a worker stands: its rank, its device type and its world's private directory."""

    rank: int
    world_size: int
    device: str
    directory: Path

    @property
    def stack_file(self) -> Path:
        """Receives this rank's Python stack upon ``STACK_SIGNAL``."""
        return self.directory / f"stack-{self.rank}"


def serve(
    post: Post,
    connection: Connection,
    output: Connection,
    trails: "ctypes.Array[Trail]",
    environment: dict[str, str],
) -> None:
    """Answer the joining of the group, then each task, with a result or ``Raised``.

    ``output`` becomes standard output and error.
    """
    printed.take_over(output)
    # Ctrl-C reaches the whole terminal; the driver alone decides what becomes of the world.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _adopt(environment)
    descendants.adopt_orphans()
    watch_for_starts()
    owner = os.getpid()
    torch.set_num_threads(1)
    recorder = Recorder(trails[post.rank])
    tasks: SimpleQueue[bytes] = SimpleQueue()
    with post.stack_file.open("w") as stack_file, last_words.written_to(stack_file):
        faulthandler.register(STACK_SIGNAL, stack_file, all_threads=False)
        threading.Thread(target=_listen, args=(post, connection, tasks), daemon=True).start()
        context = _attempt(lambda: _join(post))
        recorder.install()
        connection.send_bytes(wire.dumps(context if isinstance(context, Raised) else None))
        while (data := tasks.get()) != GOODBYE:
            recorder.begin_task()
            answer = _answer(data, context)
            if os.getpid() != owner:  # a copy, forked by the task, answers for nobody
                os._exit(0)
            connection.send_bytes(answer)
        faulthandler.unregister(STACK_SIGNAL)
    if dist.is_initialized():
        dist.destroy_process_group()


def _adopt(environment: dict[str, str]) -> None:
    """Take the driver's environment; the fork server's dates from its own start."""
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)


def _listen(post: Post, connection: Connection, tasks: SimpleQueue[bytes]) -> None:
    """Hand tasks on; end the process with its driver, whatever the main thread is doing."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.put(connection.recv_bytes())
    shutil.rmtree(post.directory, ignore_errors=True)
    remove_leftovers(os.getpid())
    os._exit(1)


def _join(post: Post) -> RankContext:
    device = torch.device(post.device)
    if not kernels_run_on(device):
        raise RuntimeError(
            f"a worker for {device} cannot run kernels there: this program had started its fork "
            "server before; start Python with TRITON_INTERPRET=1, or judge before that"
        )
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", post.rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    group = None
    if post.world_size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # A file in the world's own directory: no port and no name that another world may hold.
        store = f"file://{post.directory}/store"
        dist.init_process_group(backend, store, rank=post.rank, world_size=post.world_size)
        group = dist.group.WORLD
    return RankContext(post.rank, post.world_size, group, device)


def _answer(data: bytes, context: Any) -> bytes:
    def run() -> Any:
        function, args = wire.load_task(data)
        return function(context, *args)

    answer = _attempt(run)
    try:
        return wire.dumps(answer)
    except Exception as error:  # a value may be of anyone's making
        raised = Raised.of(error)
        text = f"the task's result cannot be sent to the driver: {raised.text}"
        return wire.dumps(replace(raised, text=text))


def _attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except BaseException as error:  # SystemExit too is the task's answer
        return Raised.of(error)
