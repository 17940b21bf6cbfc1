"""Hypothesis strategies for cases: descriptions of trials, drawn towards known trouble.

Axes with few values (expert-parallel size, transport, mode, dtype) form *cells* that are
enumerated, not drawn.  Within a cell, sizes sit at and beside tile and bucket edges,
counts per rank are ragged, and semantic settings lean away from neutral values, since a
scaling factor of 1 or a bias of 0 hides every fault in its handling.
"""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from twinmoe.optimized.experts import backend_report
from twinmoe.oracle.case import BIASES, Case
from twinmoe.oracle.counts import crowded, sized
from twinmoe.oracle.magnitudes import MAGNITUDES
from twinmoe.oracle.published_routings import ROUTINGS_OF_MODELS
from twinmoe.oracle.stories import told
from twinmoe.reference.config import ConfigError, MoEConfig, dtype_name

#: Hidden and intermediate sizes: tile multiples, their neighbours, and odd ones.
HIDDEN_SIZES = (96, 64, 16, 24, 33, 100, 130, 192, 384)
INTERMEDIATE_SIZES = (40, 16, 64, 17, 96, 72)
#: Beyond it, square weights would cost too much.
_WIDEST_SQUARE = 130
TOKEN_COUNTS = (3, 1, 2, 0, 5, 8, 9, 16, 17)
EP_SIZES = (1, 2, 4, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Where tokens travel, by device: the AlltoAll twin, and the tiers that can be asked for there.
DEVICE_TRANSPORTS = {
    "cpu": ("alltoall", "nvls", "p2p", "gloo"),
    "cuda": ("alltoall", "p2p", "nccl"),
}


def transports_on(device: str, text: str | None = None) -> list[str]:
    """Those that ``text`` names, in a comma-separated list; None are all that ``device`` has.

    Raises ConfigError for one that does not run there.
    """
    available = DEVICE_TRANSPORTS[device]
    if text is None:
        return list(available)
    transports = [part.strip() for part in text.split(",")]
    for transport in transports:
        if transport not in available:
            raise ConfigError(
                f"transport ({transport!r}) does not run on {device}: choose from "
                f"{', '.join(available)}"
            )
    return transports


#: Kinds of routing, as often as they are drawn.
_ROUTINGS = (
    *("free", "free", "free", "one_expert", "one_rank", "ties", "equal", "silent"),
    *("alternating", "alternating"),
)

#: The same of magnitudes.
_MAGNITUDES = ("usual",) * 7 + MAGNITUDES[1:]


@dataclass(frozen=True)
class Cell:
    """One combination of the enumerated axes."""

    ep_size: int
    transport: str
    mode: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"EP {self.ep_size} {self.transport} {self.mode} {dtype_name(self.dtype)}"


@st.composite
def configs(draw: st.DrawFn, ep_size: int, dtype: torch.dtype) -> MoEConfig:
    """A layer that ``ep_size`` ranks can share, small enough for the interpreter."""
    if draw(st.sampled_from((False,) * 7 + (True,))):
        shared_evenly = [c for c in ROUTINGS_OF_MODELS.values() if c.num_experts % ep_size == 0]
        return replace(draw(st.sampled_from(shared_evenly)), dtype=dtype)
    # One rank alone needs more experts, or its groups have nothing to choose from.
    local = draw(st.sampled_from((3, 2, 4, 1, 5) if ep_size > 2 else (6, 3, 8, 4, 5, 12, 1)))
    experts = ep_size * local
    n_group, topk_group = draw(_groups(experts))
    reachable = topk_group * (experts // n_group)
    # One expert a token hides what happens between slots: rarely so, unless groups force it.
    counts = [k for k in (2, 3, 2, 3, 6, 1, experts) if k <= reachable]
    k = draw(st.sampled_from(counts or [1]))
    scoring = draw(st.sampled_from(("softmax", "sigmoid", "sqrtsoftplus")))
    gated = draw(st.sampled_from((True, True, False)))
    shared = draw(st.sampled_from((24, 0, 40)))
    hidden = draw(st.sampled_from(HIDDEN_SIZES))
    return MoEConfig(
        hidden_size=hidden,
        moe_intermediate_size=draw(_intermediate_sizes(hidden)),
        num_experts=experts,
        num_experts_per_tok=k,
        scoring_func=scoring,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from((2.5, 1.0, 0.5))),
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(("top2_sum", "max"))),
        use_correction_bias=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(("silu", "gelu", "relu2", "gelu_pytorch_tanh", "relu"))),
        gated=gated,
        swiglu_limit=draw(st.sampled_from((None, 1.5))) if gated else None,
        shared_expert_intermediate_size=shared,
        shared_expert_gate=draw(st.booleans()) if shared else False,
        router_weight_on_input=draw(st.sampled_from((False, False, True))),
        dtype=dtype,
    )


def _intermediate_sizes(hidden: int) -> st.SearchStrategy[int]:
    """Widths of their own, and those that make w2, or w13, square: then no shape tells a layout."""
    square = (hidden, hidden // 2) if hidden <= _WIDEST_SQUARE else ()
    return st.sampled_from((*INTERMEDIATE_SIZES, *square))


def _groups(experts: int) -> st.SearchStrategy[tuple[int, int]]:
    """(n_group, topk_group) pairs; every other layer has no groups."""
    pairs = []
    for n_group in range(2, experts + 1):
        if experts % n_group == 0:
            kept = {1, n_group // 2, n_group - 1} - {0}
            # Twice where groups have several experts, so that what is best in one has a rival.
            pairs += [(n_group, count) for count in sorted(kept)] * (2 if n_group < experts else 1)
    ungrouped = st.just((1, 1))
    return ungrouped | st.sampled_from(pairs) if pairs else ungrouped


@st.composite
def token_counts(draw: st.DrawFn, ep_size: int) -> tuple[int, ...]:
    """Tokens per rank: ragged, one rank only, all but one, equal; no tokens at all is a corner."""
    some = st.sampled_from([count for count in TOKEN_COUNTS if count])
    pattern = draw(st.sampled_from(("ragged", "one rank", "all but one", "equal")))
    rank = draw(st.integers(0, ep_size - 1))
    count = draw(some)
    if pattern == "ragged":
        others = st.sampled_from(TOKEN_COUNTS)
        return tuple(count if r == rank else draw(others) for r in range(ep_size))
    if pattern == "one rank":
        return tuple(count if r == rank else 0 for r in range(ep_size))
    if pattern == "all but one" and ep_size > 1:
        return tuple(0 if r == rank else count for r in range(ep_size))
    return (count,) * ep_size


@st.composite
def cases(draw: st.DrawFn, cell: Cell, model: MoEConfig | None = None, device: str = "cpu") -> Case:
    """A case of ``cell``; with ``model``, of that geometry in the cell's dtype."""
    if model is None:
        config = draw(configs(cell.ep_size, cell.dtype))
    else:
        config = replace(model, dtype=cell.dtype)
    if device == "cuda" and draw(st.booleans()):
        config = _regular(config)
    in_graph = cell.transport != "alltoall"
    plain = Case(
        config=config,
        tokens=draw(token_counts(cell.ep_size)),
        transport=cell.transport,
        mode=cell.mode,
        backend=draw(st.sampled_from(usable_backends(config, device))),
        wire=draw(st.sampled_from(("fp32", "model"))) if in_graph else "fp32",
        values=draw(st.sampled_from(("normal", "recorded", "outlier", "positive", "integers"))),
        magnitude=draw(st.sampled_from(_MAGNITUDES)),
        routing=draw(st.sampled_from(_ROUTINGS)),
        bias=draw(st.sampled_from(BIASES)) if config.use_correction_bias else "mixed",
        layout=draw(st.sampled_from(("plain", "strided"))),
        padding=draw(st.sampled_from(("nan", "stale"))),
        seed=draw(st.integers(0, 2**20)),
    )
    if model is None:
        plain = draw(crowded(plain))
    return draw(sized(draw(told(plain))))


def _regular(config: MoEConfig) -> MoEConfig:
    """``config`` with what the kernels of libraries ask for: else hardly a case would be theirs."""
    return replace(
        config,
        hidden_size=-(-config.hidden_size // 8) * 8,
        moe_intermediate_size=-(-config.moe_intermediate_size // 8) * 8,
        hidden_act="silu" if config.gated else "relu2",
        swiglu_limit=None,
        router_weight_on_input=False,
    )


def usable_backends(config: MoEConfig, device: str = "cpu") -> tuple[str, ...]:
    """The expert backends that can run this layer, by name, most preferred first."""
    report = backend_report(config, torch.device(device))
    return tuple(name for name, refusal in report.items() if refusal is None)
