"""When a fault can matter: conditions on cases, in words that faults share."""

import torch

from twinmoe.optimized.experts import choose_backend
from twinmoe.optimized.triton_runtime import INTERPRETED
from twinmoe.oracle.case import Case
from twinmoe.oracle.subject import bucket_for


def has_tokens(case: Case) -> bool:
    """Some rank has a token."""
    return sum(case.tokens) > 0


def in_graph(case: Case) -> bool:
    """The all-gather path runs, captured or not, on at least one token."""
    return case.transport != "alltoall" and has_tokens(case)


def on_several_ranks(case: Case) -> bool:
    """Tokens and more than one rank."""
    return case.ep_size > 1 and has_tokens(case)


def gathers(case: Case) -> bool:
    """Rows cross ranks by an all-gather."""
    return in_graph(case) and case.ep_size > 1


def symmetric(case: Case) -> bool:
    """Our own collectives run, over symmetric memory, between ranks."""
    return gathers(case) and case.transport in ("p2p", "nvls")


def has_bias(case: Case) -> bool:
    """The router adds a correction bias."""
    return has_tokens(case) and case.config.use_correction_bias


def scaled(case: Case) -> bool:
    """The routed scaling factor is not the neutral one."""
    return has_tokens(case) and case.config.routed_scaling_factor != 1.0


def several_experts(case: Case) -> bool:
    """Tokens visit more than one expert."""
    return has_tokens(case) and case.config.num_experts_per_tok > 1


def has_shared(case: Case) -> bool:
    """There is a shared expert."""
    return has_tokens(case) and case.config.has_shared_expert


def is_gated(case: Case) -> bool:
    """Experts have a gate."""
    return has_tokens(case) and case.config.gated


def bucket_of(case: Case) -> int:
    """Rows of each rank on the graphed path."""
    return bucket_for(max(case.tokens))


def has_padding(case: Case) -> bool:
    """Some rank has fewer tokens than the bucket has rows."""
    return in_graph(case) and min(case.tokens) < bucket_of(case)


def lives_through(case: Case, kinds: str) -> bool:
    """The case's history has a step of one of these kinds (:mod:`twinmoe.oracle.history`)."""
    return any(step.kind in kinds for step in case.steps())


def runs_twice(case: Case) -> bool:
    """The same layer runs at least two forwards on the case's own path."""
    return has_tokens(case) and sum(step.kind == "f" for step in case.steps()) > 1


def replays(case: Case) -> bool:
    """A captured graph is replayed on another batch than it was captured with, or again."""
    return runs_twice(case) and in_graph(case) and case.mode != "eager"


def shows_padding(case: Case) -> bool:
    """Padding rows are still there to be looked at when the last forward is over."""
    last = [step for step in case.steps() if step.is_forward][-1]
    return has_padding(case) and not case.relation and str(last) in ("f0", "g0")


def takes_eager_path(case: Case) -> bool:
    """Tokens travel by AlltoAll, always or in some step of the history."""
    return has_tokens(case) and (case.transport == "alltoall" or lives_through(case, "a"))


def runs_triton(case: Case) -> bool:
    """Our own grouped GEMMs compute the experts."""
    return has_tokens(case) and backend_of(case) == "triton"


def backend_of(case: Case) -> str:
    """The expert backend that runs; where the choice is open, as this process would choose."""
    if case.backend != "auto":
        return case.backend
    device = torch.device("cpu" if INTERPRETED else "cuda")
    choice = choose_backend(case.backend, case.config, device, ranks=case.ep_size)
    return choice.backend.name


def asks_again(case: Case) -> bool:
    """Some batch takes the same path twice."""
    forwards = [step for step in case.steps() if step.is_forward]
    return has_tokens(case) and not case.relation and len(set(forwards)) < len(forwards)
