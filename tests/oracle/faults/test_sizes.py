"""Each planted fault of sizes issues other collectives, or fails, on a batch that reaches it."""

import pytest
import torch
from torch import Tensor

from tests.oracle.faults.at_functions import planted, routed
from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import Routing
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.inputs import weights_for
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.placement import Placement


class _Log:
    """A transport of two ranks that notes how many rows it is given."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.rank, self.rows = rank, list[int]()

    def all_gather(self, tensors: list[Tensor]) -> list[Tensor]:
        self.rows.append(len(tensors[0]))
        return [torch.cat([tensor, tensor]) for tensor in tensors]


def _issued(name: str, case: Case, rank: int, rows: int) -> list[int]:
    log = _Log(rank)
    hidden_NH = torch.zeros(rows, case.config.hidden_size)
    routing = Routing(torch.zeros(rows, 3, dtype=torch.int32), torch.zeros(rows, 3))
    with planted(name, case, rank):
        dispatcher = InferenceCUDAGraphTokenDispatcher(log, torch.float32)  # type: ignore[arg-type]
        gathered = dispatcher.token_dispatch(hidden_NH, routing)
    assert gathered.hidden.shape == (2 * rows, case.config.hidden_size)
    return log.rows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chunks_out_of_step", ([4, 1], [1])),
        ("empty_chunks", ([2, 3], [0, 1])),
        ("counts_before_split", ([8], [0])),
    ],
)
def test_ranks_issue_different_collectives(
    name: str, expected: tuple[list[int], list[int]]
) -> None:
    """Two ranks of one group gather in other numbers or sizes."""
    case = Case.parse("T=5/1,H=96,I=40,E=6,k=3,dtype=fp32")
    assert tuple(_issued(name, case, rank, 8) for rank in (0, 1)) == expected


_EMPTY = Case.parse("T=0,H=96,I=40,E=6,k=3,dtype=bf16,transport=alltoall")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty_rank_refused", "must be positive"),
        ("view_of_empty", "invalid for input of size 0"),
        ("zero_is_no_power_of_two", "negative shift count"),
        ("null_address", "null pointer"),
    ],
)
def test_no_tokens_fail(name: str, message: str) -> None:
    """A forward without a token raises, and does not without the fault."""
    layer = MoELayer(_EMPTY.config, weights_for(_EMPTY))
    none_TH = torch.empty(0, 96, dtype=torch.bfloat16)
    assert layer(none_TH).shape == (0, 96)
    with planted(name, _EMPTY), pytest.raises((RuntimeError, ValueError), match=message):
        layer(none_TH)


def test_rank_without_tokens_exchanges_nothing() -> None:
    """A rank without tokens returns without a collective; one with tokens does not."""
    case = Case.parse("T=3/0,H=96,I=40,E=6,k=3,dtype=bf16,transport=alltoall")
    dispatcher = MoEAlltoAllTokenDispatcher(Placement(6, 1), None)
    exchanges: list[int] = []

    def count(rows: Tensor, *_: object) -> Tensor:
        exchanges.append(len(rows))
        return rows

    dispatcher._exchange = count  # type: ignore[method-assign]
    x_TH, ids_TK, _ = routed(case)
    with planted("early_return", case, rank=1):
        x_SH, _, metadata = dispatcher.token_dispatch(x_TH[:0], ids_TK[:0].long())
        y_TKH = dispatcher.token_combine(x_SH, metadata)
        assert (exchanges, y_TKH.shape) == ([], (0, 3, 96))
        dispatcher.token_dispatch(x_TH, ids_TK.long())
    assert exchanges


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("chunks_out_of_step", "T=3/3,H=96,I=40,E=6,k=3,dtype=bf16"),
        ("empty_chunks", "T=3/3,H=96,I=40,E=6,k=3,dtype=bf16"),
        ("counts_before_split", "T=3,H=96,I=40,E=6,k=3,dtype=bf16"),
        ("empty_rank_refused", "T=3/0,H=96,I=40,E=6,k=3,dtype=bf16"),
        ("early_return", "T=0/0,H=96,I=40,E=6,k=3,dtype=bf16"),
        ("view_of_empty", "T=3/0,H=96,I=40,E=6,k=6,dtype=bf16,transport=alltoall"),
        ("zero_is_no_power_of_two", "T=3/1,H=96,I=40,E=6,k=3,dtype=bf16,mode=replayed"),
        ("null_address", "T=3/0,H=96,I=40,E=6,k=6,dtype=bf16,transport=alltoall"),
    ],
)
def test_equivalent_cases_are_not_reached(name: str, line: str) -> None:
    """Where the fault changes nothing, its trigger says so."""
    assert not FAULTS[name].reaches(Case.parse(line))
