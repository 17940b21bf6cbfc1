"""The ways to the kill switch: which layers are built how, and what must then run.

Legend: H hidden_size, I moe_intermediate_size, E experts, k experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from twinmoe.optimized.communication import INJECTABLE
from twinmoe.oracle.case import Case
from twinmoe.oracle.killswitch_play import Setup

#: Off, on, other tokens, off: the switch between forwards, and the first question again.
_FLIPS = "f0.k1.f0.f1.k0.f0"


@dataclass(frozen=True)
class Check:
    """One way to the switch: the case whose history is played, and what must run.

    ``labels`` of the transport in force at each forward.  ``refusal``: what the report must name
    beside the last rank's number.  ``told``: all ranks must agree on an error that names it.
    """

    name: str
    case: Case
    labels: tuple[str, ...]
    setup: Setup = field(default_factory=Setup)
    refusal: str = ""
    told: str = ""


@dataclass(frozen=True)
class Place:
    """Ranks and device, and how the tiers are called there."""

    ep_size: int
    device: str = "cpu"

    @property
    def plain(self) -> str:
        """What the switch falls back to, as reports call it."""
        if self.ep_size == 1:
            return "local"
        return "gloo" if self.device == "cpu" else "nccl"

    @property
    def plain_transport(self) -> str:
        """The same as cases call it."""
        return "gloo" if self.device == "cpu" else "nccl"

    @property
    def fast(self) -> dict[str, str]:
        """Tiers to switch off: transport of a case, and label in reports."""
        emulated = {"nvls": "nvls (emulated)"} if self.device == "cpu" else {}
        return {"p2p": "p2p", **emulated}


def checks(place: Place, multicast: bool = False) -> Iterator[Check]:
    """All checks of a place.  ``multicast``: whether its GPUs have the nvls tier."""
    plain, last = place.plain, place.ep_size - 1
    case = plain_case(place)
    fast = {**place.fast, "nvls": "nvls"} if multicast else place.fast
    yield Check("switch before construction", case, (plain,), Setup(killed=True))
    in_graph = replace(case, mode="graphed", history="f0.f1.f0")
    yield Check("switch before construction, captured", in_graph, (plain,) * 3, Setup(killed=True))
    forced = replace(case, transport=place.plain_transport)
    yield Check(f"{plain} by choice", forced, (plain,))
    for transport, label in fast.items():
        there = replace(case, transport=transport, history=_FLIPS)
        flipped = (label, plain, plain, label)
        captured = replace(there, mode="graphed")
        opened = replace(captured, history="k1.f0.k0.f0.f1.f0")
        yield Check(f"{transport}: between calls", there, flipped)
        yield Check(f"{transport}: between captures", captured, flipped)
        yield Check(f"{transport}: before the first capture", opened, (plain, label, label, label))
        odd = replace(_odd_case(place), transport=transport, history=_FLIPS)
        wanted = "misaligned" if label.startswith("nvls") else ""
        yield Check(f"{transport}: misaligned, odd counts, k = 6", odd, flipped, refusal=wanted)
    for step, refusal in INJECTABLE.items():
        setup = Setup(is_open=True, inject=frozenset({step}))
        label = "p2p" if step == "multicast" else plain
        staged = replace(case, mode="graphed", history="f0.f1.f0")
        name = f"set-up fails on rank {last}: {refusal.value}"
        yield Check(name, staged, (label,) * 3, setup, refusal.value)
    if last:
        between = replace(case, history=_FLIPS)
        yield Check(
            f"rank {last} asks for the opposite", between, ("p2p",), Setup(alone="differs"),
            told=f"rank {last} for",
        )  # fmt: skip
    if last and place.device == "cpu":  # a GPU would go on spinning
        yield Check(f"rank {last} switches alone", between, ("p2p",), Setup(alone="calls"))


def plain_case(place: Place) -> Case:
    """Aligned payloads; every rank another number of tokens, one of them none."""
    tokens = "/".join(str((5 * rank + 4) % 9) for rank in range(place.ep_size))
    return Case.parse(
        f"T={tokens},H=64,I=32,E={8 * place.ep_size},k=4,rsf=2.5,shared=24,dtype=bf16,"
        "wire=model,transport=p2p,seed=7"
    )


def _odd_case(place: Place) -> Case:
    """Rows of 33 bf16 values: no lane is wide enough for multicast at an odd number of rows."""
    tokens = "/".join(("1", "0", "1", "1")[rank % 4] for rank in range(place.ep_size))
    return Case.parse(
        f"T={tokens},H=33,I=17,E={8 * place.ep_size},k=6,rsf=2.5,dtype=bf16,wire=model,"
        "transport=p2p,seed=11"
    )
