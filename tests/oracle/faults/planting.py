"""Faults planted in this process: a whole case on one rank, or one rank's experts of several."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.faults.at_functions import experts_of
from twinmoe.optimized.shared_expert import InferenceSharedExpert
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS, planted
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.showing import judge_showings
from twinmoe.oracle.subject import bucket_for
from twinmoe.oracle.trial import observe_case
from twinmoe.oracle.verdict import Verdict
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.router import TopKRouter

CPU = torch.device("cpu")


def verdict_alone(line: str) -> Verdict:
    """Play the case of ``line`` on one rank, with the fault it names, and judge it."""
    case = Case.parse(line)
    alone = RankContext(0, 1, None, CPU)
    return judge_showings(case, [observe_case(alone, case, ["optimized"])["optimized"]])


def assert_names_its_stage(name: str, line: str) -> None:
    """The case passes without the fault, and fails at the declared stage with it."""
    fault = FAULTS[name]
    assert fault.reaches(Case.parse(line))
    assert verdict_alone(line).equivalent
    culprit = verdict_alone(f"{line},fault={name}").culprit
    assert culprit is not None
    assert culprit.stage == fault.stage, str(culprit)


def assert_does_not_reach(name: str, line: str) -> None:
    """Where a fault says that it cannot matter, it does not."""
    assert not FAULTS[name].reaches(Case.parse(line))
    assert verdict_alone(f"{line},fault={name}").equivalent


def shares(line: str, rank: int = 0) -> list[Tensor]:
    """``rank``'s share [R * N, H] of batches 1 and then 0, written to one buffer.

    The other ranks' rows come from the routing of record.
    """
    case = Case.parse(line)
    config, ranks = case.config, case.ep_size
    with planted(case, RankContext(rank, ranks, None, CPU)):
        if config.has_shared_expert:
            InferenceSharedExpert(config, weights_for(case))
        experts = experts_of(case, rank)
        rows = bucket_for(max(case.tokens))
        out = torch.zeros(ranks * rows, config.hidden_size)
        written = []
        for batch in (1, 0):
            hidden, ids, weights = _gathered(case, rows, batch)
            experts(hidden, ids, weights, out)
            written.append(out.clone())
    return written


def _gathered(case: Case, rows: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids (-1 in padding) and weights of all ranks, in the routing of record."""
    config = case.config
    router = TopKRouter(config, weights_for(case))
    slots = case.ep_size, rows, config.num_experts_per_tok
    hidden = torch.zeros(case.ep_size, rows, config.hidden_size, dtype=config.dtype)
    ids, weights = torch.full(slots, -1, dtype=torch.int32), torch.zeros(slots)
    for rank in range(case.ep_size):
        x_TH = hidden_for(case, rank, batch)
        routing = router(x_TH)
        hidden[rank, : len(x_TH)] = x_TH
        ids[rank, : len(x_TH)] = routing.ids_TK.int()
        weights[rank, : len(x_TH)] = routing.weights_TK
    return hidden.flatten(0, 1), ids.flatten(0, 1), weights.flatten(0, 1)
