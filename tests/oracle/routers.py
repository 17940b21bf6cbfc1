"""Routing truths of given logits or scores, and every answer that brute force finds.

Legend: T tokens, H hidden_size, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import torch
from hypothesis import strategies as st
from torch import Tensor

from twinmoe.oracle.contract import Ties, storage_contract
from twinmoe.oracle.envelope import Enclosure, Grade
from twinmoe.oracle.routing import RoutingTruth
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.weights import MoEWeights


def config_of(experts: int, k: int, **settings: object) -> MoEConfig:
    """Return a small fp32 layer; only its routing matters."""
    sizes = {"hidden_size": 4, "moe_intermediate_size": 1, "dtype": torch.float32}
    return MoEConfig(
        **(sizes | {"num_experts": experts, "num_experts_per_tok": k} | settings)  # type: ignore[arg-type]
    )


def truth_of(config: MoEConfig, weights: MoEWeights, x_TH: Tensor) -> RoutingTruth:
    """Return the routing truth of exact inputs in the arithmetic of ``config``."""
    return RoutingTruth.of(
        config,
        Enclosure.exact(x_TH),
        weights.router_EH,
        weights.correction_bias_E,
        storage_contract("any", config.dtype, config.router_dtype),
        Grade.SHARP,
    )


def truth_of_logits(config: MoEConfig, logits_TE: Sequence[Sequence[float]]) -> RoutingTruth:
    """Return the routing truth of given logits, which the router computes without error."""
    config = replace(config, hidden_size=config.num_experts)
    weights = MoEWeights.random(config, 0)
    identity = replace(weights, router_EH=torch.eye(config.num_experts), correction_bias_E=None)
    return truth_of(config, identity, torch.tensor(logits_TE, dtype=torch.float32))


def truth_of_scores(config: MoEConfig, value_E: Tensor, radius_E: Tensor) -> RoutingTruth:
    """Return the truth of one token whose scores are known to lie in given intervals."""
    scores = Enclosure(value_E[None].double(), radius_E[None].double())
    inexact = Enclosure(scores.value, torch.ones_like(scores.value))
    bias_E = torch.zeros(config.num_experts, dtype=torch.float64)
    ids_1K = TopKRouter(config, MoEWeights.random(config, 0)).select(scores.value)
    contract = replace(storage_contract("any", torch.float32), ties=Ties.ANY)
    return RoutingTruth(config, inexact, scores, scores, bias_E, ids_1K, contract)


# --- brute force: every score on a grid inside its interval, every way to break a tie --------


def reachable(config: MoEConfig, value_E: Tensor, radius_E: Tensor) -> set[tuple[int, ...]]:
    """Return every set that some scores inside the intervals can lead to."""
    steps = [
        [float(v)] if not r else (float(v) + float(r) * torch.linspace(-1, 1, 5)).tolist()
        for v, r in zip(value_E, radius_E, strict=True)
    ]
    scores_NE = torch.tensor(list(product(*steps)), dtype=torch.float64)
    size = config.num_experts // config.n_group
    best = 2 if config.group_score == "top2_sum" and size > 1 else 1
    grouped_NGE = scores_NE.view(-1, config.n_group, size)
    group_NG = grouped_NGE.sort(dim=2, descending=True).values[..., :best].sum(dim=2)
    found = set()
    for kept in combinations(range(config.n_group), config.topk_group):
        rows_NE = scores_NE[_may_win(group_NG, kept)]
        open_to = [e for e in range(config.num_experts) if e // size in kept]
        for chosen in combinations(open_to, config.num_experts_per_tok):
            own = [open_to.index(e) for e in chosen]
            if _may_win(rows_NE[:, open_to], own).any():
                found.add(chosen)
    return found


def _may_win(values_NM: Tensor, chosen: Sequence[int]) -> Tensor:
    """Rows in which no other column exceeds a chosen one."""
    rest = [m for m in range(values_NM.shape[1]) if m not in chosen]
    weakest = values_NM[:, list(chosen)].amin(dim=1)
    return (values_NM[:, rest] <= weakest[:, None]).all(dim=1)


def admitted(truth: RoutingTruth) -> set[tuple[int, ...]]:
    """Return every set of k experts that the judge would accept for the first token."""
    config = truth.config
    return {
        chosen
        for chosen in combinations(range(config.num_experts), config.num_experts_per_tok)
        if truth.admissible(torch.tensor([chosen]).expand(len(truth.ids_TK), -1))[0]
    }


@st.composite
def uncertain_scores(draw: st.DrawFn, grouped: bool) -> tuple[MoEConfig, Tensor, Tensor]:
    """Draw a small config and integer scores of six experts, at most five of them uncertain."""
    n_group = draw(st.sampled_from([2, 3])) if grouped else 1
    topk_group = draw(st.integers(1, n_group))
    k = draw(st.integers(1, min(5, topk_group * 6 // n_group)))
    score = draw(st.sampled_from(["max", "top2_sum"]))
    config = config_of(6, k, n_group=n_group, topk_group=topk_group, group_score=score)
    value_E = torch.tensor([draw(st.integers(1, 9)) for _ in range(6)])
    radius_E = torch.tensor([draw(st.sampled_from([0, 0, 1, 2])) for _ in range(5)] + [0])
    return config, value_E, radius_E
