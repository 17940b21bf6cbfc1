"""What is searched: every cell's cases can be run, and every known trouble is among them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmoe.oracle.case import MODES, Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.doctor import require_case
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.plan import Plan, plan_cells
from twinmoe.oracle.strategies import (
    DEVICE_TRANSPORTS,
    DTYPES,
    EP_SIZES,
    Cell,
    cases,
    usable_backends,
)
from twinmoe.reference.published import PUBLISHED, scaled
from twinmoe.reference.router import TopKRouter

CELLS = plan_cells(EP_SIZES, DEVICE_TRANSPORTS["cpu"], MODES, DTYPES)
PATHS = sorted({(cell.transport, cell.mode) for cell in CELLS})


@pytest.mark.parametrize(("transport", "mode"), PATHS)
@settings(max_examples=15)
@given(data=st.data())
def test_cases_belong_to_their_cell_and_can_be_run(
    transport: str, mode: str, data: st.DataObject
) -> None:
    """A drawn case has its cell's axes, and nothing about it would be refused on a CPU."""
    cell = data.draw(st.sampled_from(plan_cells(EP_SIZES, [transport], [mode], DTYPES)))
    case = data.draw(cases(cell))
    assert (case.ep_size, case.transport, case.mode) == (cell.ep_size, transport, mode)
    assert case.config.dtype is cell.dtype
    require_case(case, "cpu")


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=10)
@given(data=st.data())
def test_cases_of_a_model_keep_its_geometry(name: str, data: st.DataObject) -> None:
    """With a published model only the batch varies: sizes, experts and routing are the model's."""
    model = scaled(PUBLISHED[name], 64)
    case = data.draw(cases(Cell(2, "p2p", "eager", torch.float16), model))
    assert case.config.to_dict() | {"dtype": "bf16"} == model.to_dict()
    require_case(case, "cpu")


def test_backends_are_offered_only_where_their_rows_are_aligned() -> None:
    """grouped_mm is drawn only for widths of whole 16-byte units; triton always."""
    corner = CORNERS["sizes beside every tile"](Cell(1, "p2p", "eager", torch.bfloat16))
    assert usable_backends(corner.config) == ("triton",)
    corner = CORNERS["k = E"](Cell(1, "p2p", "eager", torch.bfloat16))
    assert usable_backends(corner.config) == ("grouped_mm", "triton")


# --- corners ---------------------------------------------------------------------------------


def routed_to(case: Case) -> list[list[int]]:
    """Return the experts that the reference router picks, for each token of all ranks."""
    router = TopKRouter(case.config, weights_for(case))
    return [
        ids
        for rank in range(case.ep_size)
        for ids in router(hidden_for(case, rank)).ids_TK.sort(dim=1).values.tolist()
    ]


def same_experts(case: Case) -> bool:
    """Whether all tokens, of which there are several, go to one and the same expert."""
    chosen = routed_to(case)
    return len(chosen) > 1 and all(ids == chosen[0] and len(ids) == 1 for ids in chosen)


def same_rank(case: Case) -> bool:
    """Whether all chosen experts belong to one rank."""
    local = case.config.num_experts // case.ep_size
    return len({e // local for ids in routed_to(case) for e in ids}) == 1


def beside_every_tile(case: Case) -> bool:
    """Whether both widths are odd and no multiple of any tile."""
    return case.config.hidden_size % 2 == case.config.moe_intermediate_size % 2 == 1


def tied(case: Case) -> bool:
    """Whether two experts' router rows are exactly equal, without being zero."""
    router_EH = weights_for(case).router_EH
    return torch.equal(router_EH[:1], router_EH[1:2]) and bool(router_EH.any())


#: The trouble that every check must contain, by what it really is, at any group size.
TROUBLES: dict[str, Callable[[Case], bool]] = {
    "no tokens at all": lambda c: sum(c.tokens) == 0,
    "all tokens on one rank": lambda c: c.tokens[0] > 0 and sum(c.tokens[1:]) == 0,
    "all tokens to one expert": same_experts,
    "all tokens to one rank": same_rank,
    "k = 1": lambda c: c.config.num_experts_per_tok == 1,
    "k = E": lambda c: c.config.num_experts_per_tok == c.config.num_experts > 1,
    "one expert a rank": lambda c: c.config.num_experts == c.ep_size,
    "odd sizes": beside_every_tile,
    "exact ties": tied,
    "recorded values": lambda c: c.values == "recorded",
    "poisoned padding": lambda c: c.padding == "nan",
    "strided input": lambda c: c.layout == "strided",
    "groups": lambda c: 1 < c.config.topk_group < c.config.n_group,
    "negative bias": lambda c: c.config.use_correction_bias and c.bias == "negative",
    "shared expert": lambda c: c.config.has_shared_expert,
}


@pytest.mark.parametrize("ep_size", EP_SIZES)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_trouble_is_a_corner(trouble: str, ep_size: int) -> None:
    """At every group size some corner really is in this trouble, as its tensors show."""
    cell = Cell(ep_size, "p2p", "eager", torch.bfloat16)
    assert any(TROUBLES[trouble](corner(cell)) for corner in CORNERS.values())


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_some_ranks_are_empty_beside_others_that_are_not(ep_size: int) -> None:
    """A corner has empty ranks first, so that rank 0 is among them."""
    tokens = CORNERS["empty ranks"](Cell(ep_size, "p2p", "eager", torch.bfloat16)).tokens
    assert tokens[0] == 0
    assert sum(tokens) > 0


def test_every_corner_can_be_run_in_every_cell() -> None:
    """No corner is refused on a CPU, and each belongs to the cell that it was made for."""
    for cell in CELLS:
        for corner in CORNERS.values():
            case = corner(cell)
            assert (case.ep_size, case.transport, case.mode) == (
                cell.ep_size, cell.transport, cell.mode,
            )  # fmt: skip
            assert case.config.dtype is cell.dtype
            require_case(case, "cpu")


@pytest.mark.parametrize(
    ("ep_sizes", "transports", "modes", "dtypes"),
    [
        (EP_SIZES, DEVICE_TRANSPORTS["cpu"], MODES, DTYPES),
        (EP_SIZES, ("p2p",), ("eager",), (torch.bfloat16,)),
        ((2,), ("gloo",), MODES, (torch.float16,)),
        ((1, 8), ("alltoall",), ("eager",), DTYPES),
        ((4, 2), ("alltoall", "nvls"), ("graphed", "eager"), DTYPES),
        ((2, 2), ("p2p", "p2p"), ("eager",), (torch.bfloat16,)),
    ],
)
def test_each_group_size_meets_every_corner_once(
    ep_sizes: Sequence[int],
    transports: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
) -> None:
    """However narrow the check, its cells share out all corners, and leave none without one."""
    plan = Plan(plan_cells(ep_sizes, transports, modes, dtypes), cases_per_cell=1)
    for ep_size in ep_sizes:
        shares = [plan.corners(cell) for cell in plan.cells if cell.ep_size == ep_size]
        names = [name for share in shares for name, _ in share]
        assert set(names) == set(CORNERS)
        assert len(names) == max(len(CORNERS), len(shares))
        assert all(shares)
