"""Run one function on several processes that form a gloo group, under a watchdog.

The rendezvous is a file in the test's own folder, never a port, so that worlds of parallel tests
cannot meet.  A process that hangs or dies becomes a failure that names its rank, and no worker
outlives the call.
"""

import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

#: Workers are forked from a server that has imported torch once: a world starts in a fraction of a
#: second instead of one import per rank, and, unlike a plain fork, inherits no threads or locks.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed"])

#: Workers import the tests by name, and pytest's importlib mode leaves the root off the path.
_ROOT = str(Path(__file__).resolve().parents[1])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)


def run_spmd(
    fn: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any, timeout: float = 60
) -> list[Any]:
    """Call ``fn(rank, group, *args)`` on every rank; return the results in rank order.

    ``fn`` is a function at the top of an importable module; its arguments and its result can be
    pickled (tensors are copied).  The test fails with the traceback of the first rank that
    raised, or, after ``timeout`` seconds, with the ranks that did not answer.
    """
    store = tmp_path / f"store-{uuid.uuid4().hex}"
    # Plain pickle copies tensors; the default of multiprocessing would lend shared memory that
    # vanishes together with its process.
    call = pickle.dumps((fn, args))
    receivers: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_work, args=(sender, call, rank, world_size, str(store)), daemon=True
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        return _collect(receivers, timeout)
    finally:
        _end(processes)
        store.unlink(missing_ok=True)


def _collect(receivers: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    rank_of = {receiver: rank for rank, receiver in enumerate(receivers)}
    answers: dict[int, Any] = {}
    while len(answers) < len(receivers):
        pending = [receiver for receiver in receivers if rank_of[receiver] not in answers]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [rank_of[receiver] for receiver in pending]
            pytest.fail(f"ranks {silent} did not answer within {timeout} s", pytrace=False)
        for receiver in ready:
            rank = rank_of[receiver]
            try:
                failure, answers[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                pytest.fail(f"rank {rank} died without an answer", pytrace=False)
            if failure is not None:
                pytest.fail(f"rank {rank} of {len(receivers)} raised\n{failure}", pytrace=False)
    return [answers[rank] for rank in range(len(receivers))]


def _end(processes: list[BaseProcess]) -> None:
    deadline = time.monotonic() + 2
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _end_with_the_test() -> None:
    """Whoever waits in a barrier for peers that were killed with the test would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(sender: Connection, call: bytes, rank: int, world_size: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    failure, result = None, None
    try:
        fn, args = pickle.loads(call)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        result = fn(rank, dist.group.WORLD, *args)
    except BaseException:
        failure = traceback.format_exc()
    # The parent may have given up on this world already: then there is nobody to tell.
    with suppress(BrokenPipeError):
        sender.send_bytes(pickle.dumps((failure, result)))
    if failure is None:
        dist.destroy_process_group()
