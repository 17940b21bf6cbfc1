"""Each planted fault of dispatch changes what the function that it is planted in answers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.faults.at_functions import experts_of, padded, planted, routed, share
from twinmoe.optimized.dispatcher import Gathered, InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.router import Routing
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS, dispatch
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.placement import Placement

_CASE = Case.parse("T=3/2,H=33,I=40,E=6,k=3,dtype=bf16,padding=nan,history=f0.f0")


class _Copies:
    """A transport whose ranks all send the same."""

    world_size, rank = 2, 0

    def all_gather(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([tensor, tensor]) for tensor in tensors]


def _gathered() -> Gathered:
    x_TH, ids_TK, weights_TK = padded(*(part[:3] for part in routed(_CASE)))
    dispatcher = InferenceCUDAGraphTokenDispatcher(_Copies(), torch.float32)  # type: ignore[arg-type]
    return dispatcher.token_dispatch(x_TH, Routing(ids_TK, weights_TK))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize(
    "name",
    [
        "first_slot_only",
        "negative_ids_counted",
        "untranslated_ids",
        "unsubtracted_start",
        "wrapped_padding_id",
    ],
)
def test_shares_differ(name: str, backend: str) -> None:
    """The last rank's share of a padded batch is another one."""
    case = Case.parse(f"{_CASE},backend={backend}")
    batch = padded(*routed(case))
    right = share(experts_of(case, 1), batch)
    with planted(name, case, rank=1):
        assert not _same(share(experts_of(case, 1), batch), right)
    assert _same(share(experts_of(case, 1), batch), right)


def test_counters_go_stale() -> None:
    """The first call is right, and the second, on the same batch, is not."""
    batch = routed(_CASE)
    right = share(experts_of(_CASE, 1), batch)
    with planted("stale_counters", _CASE, rank=1):
        experts = experts_of(_CASE, 1)
        assert _same(share(experts, batch), right)
        assert not _same(share(experts, batch), right)


@pytest.mark.parametrize("name", ["unfilled_slots", "lost_remainder", "uncopied_tail"])
def test_gathered_rows_differ(name: str) -> None:
    """What the graphed dispatch delivers is not what was sent."""
    right = _gathered()
    with planted(name, _CASE):
        wrong = _gathered()
    assert not (_same(wrong.hidden, right.hidden) and torch.equal(wrong.ids, right.ids))


def _exchanged(case: Case) -> tuple[Any, ...]:
    dispatcher = MoEAlltoAllTokenDispatcher(Placement(case.config.num_experts, 1), None)
    x_TH, ids_TK, _ = routed(case)
    x_SH, local_S, _ = dispatcher.token_dispatch(x_TH, ids_TK.long())
    return x_SH, local_S


def test_tail_of_exchanged_rows_is_lost() -> None:
    """The AlltoAll dispatch, too, copies whole blocks only."""
    case = Case.parse("T=3,H=33,I=40,E=6,k=3,dtype=bf16,transport=alltoall")
    right, _ = _exchanged(case)
    with planted("uncopied_tail", case):
        wrong, _ = _exchanged(case)
    assert torch.equal(wrong[:, :32], right[:, :32])
    assert not wrong[:, 32:].any()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("stale_counters", "T=3/2,H=33,I=40,E=6,k=3,dtype=bf16"),
        ("untranslated_ids", "T=3,H=33,I=40,E=6,k=3,dtype=bf16"),
        ("unsubtracted_start", "T=3/2,H=33,I=40,E=2,k=2,dtype=bf16"),
        ("wrapped_padding_id", "T=4/4,H=33,I=40,E=6,k=3,dtype=bf16,padding=nan"),
        ("lost_remainder", "T=4/2,H=33,I=40,E=6,k=3,dtype=bf16"),
        ("unrelated_tokens_summed", "T=3/0,H=33,I=40,E=6,k=3,dtype=bf16"),
        ("uncopied_tail", "T=3/2,H=96,I=40,E=6,k=3,dtype=bf16"),
    ],
)
def test_equivalent_cases_are_not_reached(name: str, line: str) -> None:
    """Where the fault changes nothing, its trigger says so."""
    assert not FAULTS[name].reaches(Case.parse(line))


def test_unrelated_tokens_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a rank's right sums come those of another rank's tokens, row by row."""
    right_TH = torch.ones(2, 33)

    def all_reduce(rows_NH: Tensor, **_: object) -> None:
        rows_NH += 5.0

    monkeypatch.setattr(MoELayer, "_eager_path", lambda *_: right_TH)
    monkeypatch.setattr(dispatch.dist, "all_reduce", all_reduce)
    layer: Any = SimpleNamespace(group=object(), _is_graphed=False)
    with planted("unrelated_tokens_summed", _CASE, rank=1):
        assert torch.equal(MoELayer._eager_path(layer, right_TH), right_TH + 5.0)
