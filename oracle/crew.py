"""The processes of a world: started together, killed together."""

import ctypes
import multiprocessing
import os
import sys
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

from twinmoe.optimized.communication.cpu_symmetric_memory import remove_leftovers
from twinmoe.optimized.triton_runtime import environment_for
from twinmoe.oracle import descendants, outside, printed, worker
from twinmoe.oracle.breadcrumbs import Footprint, Trail
from twinmoe.oracle.interrupts import held_back
from twinmoe.oracle.outside import Outside

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
        self._streams = printed.Streams([context.Pipe(duplex=False) for _ in range(size)])
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self._memory_kills = outside.memory_kills()
        mark = descendants.mark_of(os.getpid())
        self._mark = {descendants.MARK: mark}
        self._undertaker = context.Process(
            target=descendants.bury, args=(os.getpid(), mark), daemon=True
        )
        with held_back(), _environment(environment_for(device) | self._mark):
            self._undertaker.start()
        try:
            for post in self._posts:
                self._start(context, post)
        except BaseException:
            self.kill()
            raise

    def _start(self, context: ForkServerContext | SpawnContext, post: worker.Post) -> None:
        post.stack_file.touch()
        ours, theirs = context.Pipe()
        output = self._streams.writers[post.rank]
        with theirs, output, held_back(), _environment(environment_for(post.device) | self._mark):
            process = context.Process(
                target=worker.serve,
                args=(post, theirs, output, self._trails, dict(os.environ)),  # the mark included
                name=f"twinmoe-rank-{post.rank}",
                daemon=True,
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def start_task(self, data: bytes) -> None:
        """Send a task to every rank, with all trails erased: the workers are idle."""
        self._streams.begin()
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

    def printed(self) -> str:
        """What the ranks last printed in the task at hand, as text; empty if nothing."""
        return self._streams.tail()

    def footprints(self) -> dict[int, Footprint]:
        """Read what every rank last did."""
        return {rank: Footprint.read(trail) for rank, trail in enumerate(self._trails)}

    def progress(self) -> int:
        """Count the operations started on all ranks."""
        return sum(trail.sequence for trail in self._trails)

    def stacks(self, ranks: list[int]) -> dict[int, str]:
        """Ask ``ranks`` for their Python stacks; one that cannot answer soon is left out."""
        before = {rank: self._stack_size(rank) for rank in ranks}
        for rank in ranks:
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                os.kill(pid, worker.STACK_SIGNAL)
        patience = time.monotonic() + _STACK_S
        waiting = set(ranks)
        while waiting and time.monotonic() < patience:
            time.sleep(0.01)
            waiting = {rank for rank in waiting if self._stack_size(rank) == before[rank]}
        return {rank: self.last_stack(rank) for rank in ranks if rank not in waiting}

    def last_stack(self, rank: int) -> str:
        """What a rank has written of its stacks; empty for one that was ended from outside."""
        return self._posts[rank].stack_file.read_text()

    def killed_from_outside(self, rank: int) -> Outside | None:
        """What killed a rank that has ended; None for an end of its own making."""
        return outside.killed(self.exit_code(rank), self.last_stack(rank), self._memory_kills)

    def stopped_from_outside(self, ranks: list[int]) -> Outside | None:
        """What stopped one of ``ranks``; None where none stands stopped."""
        found = (
            outside.stopped(self.processes[rank].pid or 0, self.last_stack(rank)) for rank in ranks
        )
        return next(filter(None, found), None)

    def _stack_size(self, rank: int) -> int:
        return self._posts[rank].stack_file.stat().st_size

    def exit_code(self, rank: int) -> int | None:
        """Wait for a rank whose pipe or sentinel says that it ended; return its exit code."""
        self.processes[rank].join(_GOODBYE_S)
        return self.processes[rank].exitcode

    def dismiss(self) -> None:
        """End idle workers in good order, then whatever is left of them."""
        self._streams.end()
        self._send(worker.GOODBYE)
        patience = time.monotonic() + _GOODBYE_S
        for process in self.processes:
            process.join(max(0.0, patience - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every worker at once, with all processes below it, and remove what it had named."""
        left = set().union(*(descendants.below(process.pid or 0) for process in self.processes))
        for process in (*self.processes, self._undertaker):
            process.kill()
        for process in self.processes:
            pid = process.pid
            process.join(_GOODBYE_S)
            if pid is not None:
                remove_leftovers(pid)
            if process.exitcode is not None:
                process.close()
        self._undertaker.join(_GOODBYE_S)
        descendants.end(left | descendants.orphans(self._mark[descendants.MARK], _own_processes()))
        for pipe in self.pipes:
            pipe.close()
        self._streams.close()
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
    mark = {descendants.MARK: descendants.mark_of(os.getpid())}
    resource_tracker.ensure_running()  # lets signals in again, whoever held them back
    with held_back(), _environment(preloading | mark):
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


def _own_processes() -> set[int]:
    """What this process has started with a mark and still needs."""
    server = getattr(forkserver._forkserver, "_forkserver_pid", None)
    return {server or 0, *(process.pid or 0 for process in multiprocessing.active_children())}
