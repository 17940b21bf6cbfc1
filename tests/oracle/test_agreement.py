"""Journals of collectives: the first disagreement between ranks, in words."""

from twinmoe.oracle.agreement import collective_mismatches, missing_exchanges
from twinmoe.oracle.breadcrumbs import Issued

GATHER = Issued("all_gather[p2p]", "[4, 96] bfloat16 on 1 programs")
SCATTER = Issued("reduce_scatter[p2p]", "[4, 96] float32")


def test_equal_journals_agree() -> None:
    """The same operations on the same sizes in the same order."""
    assert not list(collective_mismatches([[GATHER, SCATTER]] * 4))
    assert not list(collective_mismatches([[], []]))


def test_different_operations_are_told_rank_by_rank() -> None:
    """Who issued what, ranks that did the same together, and only the first place."""
    journals = [[GATHER, SCATTER, GATHER]] * 3 + [[GATHER, GATHER, SCATTER]]
    (found,) = collective_mismatches(journals)
    assert (found.stage, found.message) == (
        "combine",
        "collective 2 differs between ranks: ranks 0 to 2 issued "
        "reduce_scatter[p2p]([4, 96] float32), rank 3 issued "
        "all_gather[p2p]([4, 96] bfloat16 on 1 programs)",
    )


def test_other_sizes_and_missing_collectives_are_told() -> None:
    """The same name on other sizes is another collective; a shorter journal lacks one."""
    smaller = Issued("all_gather[p2p]", "[2, 96] bfloat16 on 1 programs")
    (found,) = collective_mismatches([[GATHER], [smaller]])
    assert "rank 1 issued all_gather[p2p]([2, 96] bfloat16" in found.message
    (found,) = collective_mismatches([[GATHER, SCATTER], [GATHER]])
    assert found.message.endswith("rank 1 issued nothing")
    assert found.stage == "combine"


def test_an_exchange_must_send_what_is_expected() -> None:
    """Split sizes are a rank's own, but both ends of a way have one number."""
    first = Issued("all_to_all_single", "rows of [0, 8]", sent=(1, 2), received=(1, 3))
    right = Issued("all_to_all_single", "rows of [0, 8]", sent=(3, 0), received=(2, 0))
    assert not list(collective_mismatches([[first], [right]]))
    wrong = Issued("all_to_all_single", "rows of [0, 8]", sent=(3, 0), received=(4, 0))
    (found,) = collective_mismatches([[first], [wrong]])
    assert found.message == (
        "collective 1, all_to_all_single: rank 0 sends rank 1 2 rows, which expects 4"
    )


def test_an_alltoall_path_exchanges_rows() -> None:
    """A rank that computes everything by itself is named, even where its numbers are right."""
    exchange = Issued("all_to_all_single", "rows of [0, 8]")
    assert not list(missing_exchanges([[exchange], [exchange, GATHER]]))
    (found,) = missing_exchanges([[exchange], [GATHER]])
    assert found.message.startswith("rank 1 claims the AlltoAll path")


def test_a_collective_left_out_is_its_own_stages() -> None:
    """Who leaves out a combine issues the next gather in its place, and the other way round."""
    (found,) = collective_mismatches([[GATHER, SCATTER, GATHER], [GATHER, GATHER]])
    assert found.stage == "combine"
    (found,) = collective_mismatches([[GATHER, SCATTER, GATHER], [GATHER, SCATTER, SCATTER]])
    assert found.stage == "dispatch"
