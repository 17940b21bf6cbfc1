"""The processes of a world: started together, killed together."""

import ctypes
import multiprocessing
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from twinmoe.optimized import launch
from twinmoe.optimized.communication.cpu_symmetric_memory import remove_leftovers
from twinmoe.optimized.triton_runtime import environment_for
from twinmoe.oracle import breadcrumbs, worker
from twinmoe.oracle.breadcrumbs import Footprint, Trail
from twinmoe.oracle.interrupts import held_back

#: Time for workers to leave on their own before they are killed.
_GOODBYE_S = 5.0
#: Time for a signalled worker to write its stack.
_STACK_S = 0.5


class Crew:
    """One process per rank, each with a pipe and a trail, and one private directory."""

    def __init__(self, size: int, device: str) -> None:
        context = _context(device)
        self._directory = tempfile.TemporaryDirectory(
            prefix="twinmoe-world-", ignore_cleanup_errors=True
        )
        directory = Path(self._directory.name)
        self._trails = context.RawArray(Trail, size)
        self._posts = [worker.Post(rank, size, device, directory) for rank in range(size)]
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        try:
            for post in self._posts:
                self._start(context, post)
        except BaseException:
            self.kill()
            raise

    def _start(self, context: ForkServerContext | SpawnContext, post: worker.Post) -> None:
        post.stack_file.touch()
        ours, theirs = context.Pipe()
        with theirs, held_back(), _environment(environment_for(post.device)):
            process = context.Process(
                target=worker.serve,
                args=(post, theirs, self._trails, dict(os.environ)),
                name=f"twinmoe-rank-{post.rank}",
                daemon=True,
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def start_task(self, data: bytes) -> None:
        """Send a task to every rank, with all trails erased: the workers are idle."""
        ctypes.memset(ctypes.addressof(self._trails), 0, ctypes.sizeof(self._trails))
        self._send(data)

    def _send(self, data: bytes) -> None:
        """Send ``data`` to every rank; a dead rank is found out by its sentinel, not here."""
        for pipe in self.pipes:
            try:
                pipe.send_bytes(data)
            except OSError:
                continue

    def departed(self) -> list[int]:
        """Find the ranks that died since their last answer: an idle pipe has nothing to read."""
        return [
            rank
            for rank, process in enumerate(self.processes)
            if self.pipes[rank].poll() or not process.is_alive()
        ]

    def footprints(self) -> dict[int, Footprint]:
        """Read what every rank last did."""
        return {rank: Footprint.read(trail) for rank, trail in enumerate(self._trails)}

    def progress(self) -> int:
        """Count the operations started on all ranks."""
        return sum(trail.sequence for trail in self._trails)

    def places(self, ranks: list[int]) -> dict[int, str]:
        """Ask ``ranks`` where their Python code stands; one that cannot say is left out."""
        for rank in ranks:
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                os.kill(pid, worker.STACK_SIGNAL)
        files = {rank: self._posts[rank].stack_file for rank in ranks}
        patience = time.monotonic() + _STACK_S
        while time.monotonic() < patience and not all(f.stat().st_size for f in files.values()):
            time.sleep(0.01)
        stacks = {rank: file.read_text() for rank, file in files.items()}
        return {rank: place for rank, stack in stacks.items() if (place := _innermost(stack))}

    def exit_code(self, rank: int) -> int | None:
        """Wait for a rank whose pipe or sentinel says that it ended; return its exit code."""
        self.processes[rank].join(_GOODBYE_S)
        return self.processes[rank].exitcode

    def dismiss(self) -> None:
        """End idle workers in good order, then whatever is left of them."""
        self._send(worker.GOODBYE)
        patience = time.monotonic() + _GOODBYE_S
        for process in self.processes:
            process.join(max(0.0, patience - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every worker at once and remove the directory, and what a rendezvous had named."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            pid = process.pid
            process.join(_GOODBYE_S)
            if pid is not None:
                remove_leftovers(pid)
            if process.exitcode is not None:
                process.close()
        for pipe in self.pipes:
            pipe.close()
        self._directory.cleanup()


def _context(device: str) -> ForkServerContext | SpawnContext:
    if torch.device(device).type == "cuda":
        # CUDA does not survive a fork, not even of a process that only counted devices.
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The first dispatch mode of a process, a capture's, imports dynamo: seconds, like a hang.
    context.set_forkserver_preload([worker.__name__, "torch._dynamo"])
    # The fork server imports its preload before it learns the driver's sys.path.
    preloading = {**environment_for(device), "PYTHONPATH": os.pathsep.join(sys.path)}
    resource_tracker.ensure_running()  # lets signals in again, whoever held them back
    with held_back(), _environment(preloading):
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Let what is started in this block find ``changes`` in its environment."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _innermost(stack: str) -> str:
    """Pick the deepest frame that is neither library nor bookkeeping, as ``file:line in name``."""
    frames = re.findall(r'File "(.*)", line (\d+) in (.*)', stack)
    libraries = (*sysconfig.get_paths().values(), breadcrumbs.__file__, launch.__file__, "<")
    own = [frame for frame in frames if not frame[0].startswith(libraries)]
    return "{}:{} in {}".format(*own[0]) if own else ""
