"""Layers that do not come back: they hang, die or raise, each by its name.

Legend: T tokens, H hidden_size.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.oracle.plain_layers import right
from twinmoe.oracle.layer_space import runs
from twinmoe.oracle.plain_layer import PlainLayer
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def _first(deed: Callable[[RankContext], None]) -> Any:
    """A factory of layers that do ``deed`` and then answer rightly."""

    @runs(lambda config: config)
    def make(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
        inner = right(config, weights, place)

        def forward(hidden_TH: Tensor) -> Any:
            deed(place)
            return inner.forward(hidden_TH)

        return PlainLayer(forward, inner.contract)

    return make


def _wait_for_nobody(place: RankContext) -> None:
    if place.rank == 0 and place.group is not None:
        dist.all_reduce(torch.ones(1), group=place.group)


def _spin(_place: RankContext) -> None:
    while True:
        time.sleep(0.01)


def _leave(_place: RankContext) -> None:
    os._exit(3)


def _kill_itself(_place: RankContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash(_place: RankContext) -> None:
    torch.ops.aten  # noqa: B018 - something of torch's on the way
    signal.raise_signal(signal.SIGSEGV)


def _rage(_place: RankContext) -> None:
    raise ValueError("\x1b[2J\x1b[31mNO\ud800" + "x" * 200_000 + "\x07")


class _Unspeakable(Exception):  # noqa: N818 - what it is, not what it is called
    def __str__(self) -> str:
        raise RuntimeError("no words")


def _fail_to_say_why(_place: RankContext) -> None:
    raise _Unspeakable


def _print_megabytes(_place: RankContext) -> None:
    for _ in range(25):
        print("p" * 1_000_000)
        os.write(1, b"w" * 1_000_000)
    os.write(2, b"the end of 50 MB\n")


def _print_for_ever(_place: RankContext) -> None:
    while True:
        print("again")


def _print_escapes_and_die(_place: RankContext) -> None:
    print("\x1b[2J\x1b]0;title\x07\ud800", end="")
    os.write(2, b"\xff\r")
    os._exit(3)


def _close_its_output(_place: RankContext) -> None:
    with contextlib.suppress(OSError):
        os.close(1)
        os.close(2)


one_sided = _first(_wait_for_nobody)
spinning = _first(_spin)
leaving = _first(_leave)
killing_itself = _first(_kill_itself)
crashing = _first(_crash)
flooding = _first(_print_megabytes)
babbling = _first(_print_for_ever)
cursing = _first(_print_escapes_and_die)
muting = _first(_close_its_output)
raging = _first(_rage)
unspeakable = _first(_fail_to_say_why)


def _fork_and_go_on(_place: RankContext) -> None:
    os.fork()  # the copy comes back, too


def _fork_a_daemon(_place: RankContext) -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.wait()


def _use_a_pool(_place: RankContext) -> None:
    copy = os.fork()
    if copy == 0:
        os._exit(0)
    os.waitpid(copy, 0)


forking = _first(_fork_and_go_on)
daemonising = _first(_fork_a_daemon)
pooling = _first(_use_a_pool)


@runs(lambda config: config)
def remembering(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Right, until a batch of five rows has gone through any layer of this process."""
    inner = right(config, weights, place)

    def forward(hidden_TH: Tensor) -> Any:
        if len(hidden_TH) == 5:
            _seen.append(True)
        out_TH, taps = inner.forward(hidden_TH)  # type: ignore[misc]
        return (out_TH + len(_seen) * (len(hidden_TH) != 5)).to(config.dtype), taps

    return PlainLayer(forward, inner.contract)


_seen: list[bool] = []


@runs(lambda config: config)
def strangled(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Right, but somebody else sends its process what the environment names, once or always."""
    inner = right(config, weights, place)

    def forward(hidden_TH: Tensor) -> Any:
        number, flag = os.environ["TWINMOE_TEST_SIGNAL"].split(",")
        if flag == "always" or not Path(flag).exists():
            if flag != "always":
                Path(flag).touch()
            send = f"import os, time; os.kill({os.getpid()}, {number})"
            subprocess.run([sys.executable, "-S", "-c", send], check=True)
            time.sleep(0.1)
        return inner.forward(hidden_TH)

    return PlainLayer(forward, inner.contract)


@runs(lambda config: config)
def dying_later(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Right, and gone a moment after it has answered."""
    threading.Timer(0.3, os._exit, (7,)).start()
    return right(config, weights, place)
