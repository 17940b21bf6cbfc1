"""assert_equivalent: the judge in one line of somebody's test."""

from collections.abc import Sequence

from torch import Tensor

from twinmoe.oracle.contract import RoundingContract, storage_contract
from twinmoe.oracle.envelope import Grade
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.truth import Truth, WeightSource
from twinmoe.oracle.verdict import Verdict
from twinmoe.reference.config import MoEConfig


def assert_equivalent(
    output: Tensor | Sequence[Tensor | RankObservation],
    *,
    config: MoEConfig,
    weights: WeightSource,
    hidden: Tensor | Sequence[Tensor],
    contract: RoundingContract | None = None,
    grade: Grade = Grade.SHARP,
    sample: int | None = None,
) -> Verdict:
    """Raise AssertionError unless ``output`` is what the layer must answer to ``hidden``.

    ``output`` and ``hidden`` are one [T, H] tensor, or one per expert-parallel rank; an
    output may be a :class:`RankObservation` with taps, which lets the message name the
    stage at fault.  ``weights`` holds all experts.  ``contract`` says where the layer
    rounds; None means that it stores every tensor in ``config.dtype`` and sums in fp32.
    ``sample`` judges so many tokens only.  Returns the verdict; raises ValueError for
    shapes that do not match.
    """
    outputs = [output] if isinstance(output, Tensor) else list(output)
    hidden_by_rank = [hidden] if isinstance(hidden, Tensor) else list(hidden)
    observations = [
        seen if isinstance(seen, RankObservation) else RankObservation(seen, path="as given")
        for seen in outputs
    ]
    contract = contract or storage_contract("default", config.dtype, config.router_dtype)
    truth = Truth(config, weights, hidden_by_rank)
    verdict = judge(observations, truth, contract, grade=grade, sample=sample)
    if not verdict.equivalent:
        raise AssertionError(str(verdict))
    return verdict
