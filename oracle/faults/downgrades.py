"""Faults that run less than was asked for, or set up more: only reports and counters show them."""

from typing import Any

import torch
import torch.distributed as dist

from twinmoe.optimized import layer as layer_module
from twinmoe.optimized.communication.agreement import group_size
from twinmoe.optimized.communication.collective_transport import CollectiveTransport
from twinmoe.optimized.communication.eligibility import Refusal, Tier
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults.fault import fault
from twinmoe.oracle.faults.seams import Seams, Wrong
from twinmoe.oracle.history import Step


def _refused(group: dist.ProcessGroup | None, device: torch.device, why: Refusal) -> Any:
    """Plain collectives, with one reason for all ranks."""
    by_rank = dict.fromkeys(range(group_size(group)), why)
    return CollectiveTransport(group, device, dict.fromkeys((Tier.NVLS, Tier.P2P), by_rank))


@fault(
    "",
    "",
    "a tier that was asked for by name is given up without a cause, and reported as refused",
    stage="output",
    when=lambda case: case.transport in ("p2p", "nvls"),
    changes_output=False,
)
def needless_fallback(seams: Seams) -> None:
    """As if the rendezvous had failed; the report is honest about what runs."""

    def select(original: Wrong, group: Any, **request: Any) -> Any:
        if request["tier"] in (Tier.NVLS, Tier.P2P):
            return _refused(group, request["device"], Refusal.RENDEZVOUS_FAILED)
        return original(group, **request)

    seams.around(layer_module, "select_transport", select)


@fault(
    "",
    "",
    "an open choice passes over a tier that could run, for a reason that does not hold",
    stage="output",
    when=lambda case: case.transport == "alltoall",
    changes_output=False,
)
def false_refusal(seams: Seams) -> None:
    """The kill switch is blamed, which nobody has thrown."""

    def select(original: Wrong, group: Any, **request: Any) -> Any:
        if request["tier"] is None and not request["kill_switch"]:
            return _refused(group, request["device"], Refusal.KILL_SWITCH)
        return original(group, **request)

    seams.around(layer_module, "select_transport", select)


def _begins_switched(case: Case) -> bool:
    return case.steps()[0] == Step("k", 1)


@fault(
    "",
    "",
    "with the kill switch on, symmetric memory is still set up, and then not used",
    stage="output",
    when=_begins_switched,
    changes_output=False,
)
def set_up_regardless(seams: Seams) -> None:
    """The rendezvous that people throw the switch against takes place."""

    def select(original: Wrong, group: Any, **request: Any) -> Any:
        if request["kill_switch"]:
            original(group, **(request | {"kill_switch": False}))
        return original(group, **request)

    seams.around(layer_module, "select_transport", select)
