"""Set-up decisions that all ranks take together.

A rank that fails alone and leaves would hang its peers in the next collective.  So every
step of a set-up is: do the local part, exchange how it went, then all go on or all stop.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from twinmoe.optimized.communication.eligibility import Refusal
from twinmoe.optimized.launch import run
from twinmoe.reference.dispatch import PeerError

T = TypeVar("T")

_log = logging.getLogger(__name__)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Return this process' rank in ``group``; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks in ``group``; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def exchange(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's ``value`` (it is pickled), in rank order; a collective over ``group``."""
    if group is None:
        return [value]
    values: list[T] = [value] * group_size(group)
    run("exchange", lambda: dist.all_gather_object(values, value, group=group))
    return values


@contextmanager
def all_or_none(doing: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run the body on all ranks; where it fails on one, fail on all; a collective at its end.

    Raises what the body raised, and on the other ranks PeerError; ValueError, on all ranks, if
    they are not ``doing`` the same.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the peers must not go on without this rank
        failure = error
    told = exchange((doing, describe(failure)), group)
    raise_failure(failure, [reason for _, reason in told])
    for rank, (other, _) in enumerate(told):
        if other != told[0][0]:
            raise ValueError(
                f"rank 0 wants {told[0][0]}, rank {rank} {other}: a group does one thing at a "
                "time; ask the same of all ranks"
            )


def describe(failure: Exception | None) -> str | None:
    """``Type: text``, as peers are told of a failure; None for none."""
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def raise_failure(own: Exception | None, reasons: Sequence[str | None]) -> None:
    """Raise ``own``, or PeerError for the ranks that gave a reason; return if none did."""
    if own is not None:
        raise own
    if any(reasons):
        failed = [f"rank {rank} ({reason})" for rank, reason in enumerate(reasons) if reason]
        raise PeerError(
            f"{', '.join(failed)} cannot go on: a group runs on all ranks or on none; correct it "
            "there, and call all ranks again"
        )


def vote(refusal: Refusal | None, group: dist.ProcessGroup | None) -> dict[int, Refusal]:
    """Collect the ranks that refuse, with their reasons: none if all can go on; a collective."""
    votes = exchange(refusal, group)
    return {rank: reason for rank, reason in enumerate(votes) if reason is not None}


def attempt(
    action: Callable[[], T], failure: Refusal, group: dist.ProcessGroup | None
) -> tuple[T | None, Refusal | None]:
    """Return ``(action(), None)``, or ``(None, failure)`` if it raised: a vote needs an answer."""
    try:
        return action(), None
    except Exception as error:  # whatever it is, it costs a tier and not the run
        _log.warning("rank %d: %s: %s", group_rank(group), failure.value, error)
        return None, failure
