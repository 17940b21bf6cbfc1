"""Planted faults of the combine: each reaches, and is named, where it says."""

import pytest
import torch

from tests.oracle.faults.planting import (
    assert_does_not_reach,
    assert_names_its_stage,
    shares,
    verdict_alone,
)
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS

SIZES = "H=64,I=16,E=6,dtype=bf16"

CASES = {
    "narrow_sum": f"T=5,{SIZES},k=3",
    "skipped_local_sum": f"T=5,{SIZES},k=3",
    "zero_times_garbage": f"T=3,{SIZES},k=3",
    "weighed_twice": f"T=5,{SIZES},k=3,router_weight_on_input=1",
    "weighed_in_place": f"T=5,{SIZES},k=3,router_weight_on_input=1,shared=24",
}

OUT_OF_REACH = {
    "narrow_sum": "T=5,H=64,I=16,E=6,k=3,dtype=fp32",
    "order_of_atomics": f"T=5,{SIZES},k=2,history=f0.f1.f0",
    "skipped_local_sum": f"T=5,{SIZES},k=1",
    "zero_times_garbage": f"T=4,{SIZES},k=3",
    "weighed_twice": f"T=5,{SIZES},k=3",
    "weighed_in_place": f"T=5,{SIZES},k=3,router_weight_on_input=1",
    "shared_on_every_rank": f"T=5,{SIZES},k=3,shared=24",
    "ids_of_other_tokens": f"T=5,{SIZES},k=3",
}


@pytest.mark.parametrize("name", CASES)
def test_the_stage_is_named_where_the_fault_reaches(name):
    """Each fault of the combine is seen at its stage, and nothing is without it."""
    assert_names_its_stage(name, CASES[name])


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_nothing_is_seen_where_the_fault_cannot_matter(name):
    """A case out of a fault's reach passes with the fault planted."""
    assert_does_not_reach(name, OUT_OF_REACH[name])


@pytest.mark.parametrize("name", ["narrow_sum", "skipped_local_sum", "weighed_twice"])
def test_the_combine_is_named_on_the_path_that_sums_at_home(name):
    """On the AlltoAll path the sum over slots is the combine itself."""
    line = f"T=5,{SIZES},k=3,router_weight_on_input={int(name == 'weighed_twice')}"
    culprit = verdict_alone(f"{line},transport=alltoall,fault={name}").culprit
    assert culprit is not None
    assert culprit.stage == "combine"


@pytest.mark.parametrize("transport", ["p2p", "alltoall"])
def test_another_order_of_the_sum_gives_other_bits(transport):
    """Atomics stay inside the envelope; the same question put again shows them."""
    line = f"T=5,H=64,I=16,E=6,k=6,dtype=fp32,transport={transport},history=f0.f1.f0"
    assert FAULTS["order_of_atomics"].reaches(Case.parse(line))
    findings = verdict_alone(f"{line},fault=order_of_atomics").findings
    assert {finding.relation for finding in findings} == {"same bits again"}


def test_the_other_ranks_add_the_shared_expert_to_foreign_rows():
    """A rank's share of another rank's row holds the shared expert too; of its own, not."""
    line = f"T=3/3,{SIZES},k=2,shared=24"
    assert FAULTS["shared_on_every_rank"].reaches(Case.parse(line))
    right, wrong = shares(line)[-1], shares(f"{line},fault=shared_on_every_rank")[-1]
    changed = (right != wrong).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False]


def test_beyond_one_node_slots_are_found_by_foreign_ids():
    """With four ranks a share is summed by other rows' ids, with two by its own."""
    for tokens, differs in (("3/3", False), ("3/3/3/3", True)):
        line = f"T={tokens},H=64,I=16,E=8,k=2,dtype=bf16"
        assert FAULTS["ids_of_other_tokens"].reaches(Case.parse(line)) == differs
        right, wrong = shares(line)[-1], shares(f"{line},fault=ids_of_other_tokens")[-1]
        assert torch.equal(right, wrong) != differs
