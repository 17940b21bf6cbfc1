"""Planted faults of the combine, where a single case does not tell all of them."""

import pytest
import torch

from tests.oracle.faults.planting import shares, verdict_alone
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS

SIZES = "H=64,I=16,E=6,dtype=bf16"


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
