"""Relations hold for correct layers on every path, and say what does not hold for wrong ones."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.observation import RankObservation, Taps
from twinmoe.oracle.relations import RELATIONS, Complaint, require_relation
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError

LAYER = (
    "H=32,I=24,E=8,k=2,scoring_func=sigmoid,norm_topk_prob=0,rsf=2.5,use_correction_bias=1,"
    "shared=8,dtype=bf16"
)
PATHS = ("mode=replayed", "transport=alltoall", "transport=gloo,mode=graphed")


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Share worlds between the tests of this file."""
    with Trial() as shared:
        yield shared


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", list(RELATIONS))
def test_both_twins_keep_every_relation(trial: Trial, name: str, path: str) -> None:
    """On two ranks with unequal batches."""
    outcome = trial.run(Case.parse(f"T=4/1,{LAYER},{path},relation={name}"))
    assert outcome.equivalent, outcome.explain()


def test_a_relation_sees_what_it_speaks_of(trial: Trial) -> None:
    """A bias that enters the weights is seen by shifting it, and the account says so."""
    line = f"T=4/1,{LAYER},relation=shifted_bias,fault=bias_in_weights"
    verdict = trial.run(Case.parse(line)).verdicts["optimized"]
    assert "shifted_bias" in {finding.relation for finding in verdict.findings}


def shown(**taps: torch.Tensor) -> list[RankObservation]:
    """Return one rank's observation with these taps."""
    return [RankObservation(torch.zeros(1, 2), Taps(**taps), "", Counter())]


def test_routing_that_moves_with_the_bias_is_told_with_both_values() -> None:
    """The token, and the ids before and after."""
    holds = RELATIONS["shifted_bias"].holds
    before = shown(ids_TK=torch.tensor([[3, 1]]), weights_TK=torch.ones(1, 2))
    after = shown(ids_TK=torch.tensor([[3, 2]]), weights_TK=torch.ones(1, 2))
    (complaint,) = holds(Case.parse("T=1,H=8,I=8,E=4,k=2"), before, [after])
    assert isinstance(complaint, Complaint)
    assert complaint.stage == "router"
    assert "token 0 from [3, 1] to [3, 2]" in complaint.message


def test_a_sum_that_does_not_scale_is_told_with_both_values() -> None:
    """Half the scale must be half the sum, exactly."""
    holds = RELATIONS["scaled_down_projection"].holds
    case = Case.parse("T=1,H=8,I=8,E=4,k=2")
    before = shown(routed_TH=torch.tensor([[2.0, 4.0]]))
    right = shown(routed_TH=torch.tensor([[1.0, 2.0]]))
    wrong = shown(routed_TH=torch.tensor([[1.0, 2.000001]]))
    assert not list(holds(case, before, [right]))
    (complaint,) = holds(case, before, [wrong])
    assert "[token 0, dim 1] went from 4 to 2.000001" in complaint.message


def test_relations_are_asked_for_by_name_and_where_they_apply() -> None:
    """An unknown name, and a case without what the relation speaks of, are config errors."""
    require_relation(Case.parse("T=3,H=8,I=8,E=4,k=2"))
    with pytest.raises(ConfigError, match="relation \\('symmetry'\\) is unknown"):
        require_relation(Case.parse("T=3,H=8,I=8,E=4,k=2,relation=symmetry"))
    with pytest.raises(ConfigError, match="says nothing about this case"):
        require_relation(Case.parse("T=3,H=8,I=8,E=4,k=2,relation=shifted_bias"))
