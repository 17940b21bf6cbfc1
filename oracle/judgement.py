"""The judgement: is what every rank showed inside the envelope of its contract?

Stages are judged in the order of the data flow, each from the observed result of the one
before (re-anchoring), so that the first one outside names the culprit:

======== ======================================================================
router   chosen experts are an admissible set, weights inside their enclosure
dispatch every rank received every rank's rows, bit for bit
experts  each slot's output, or each rank's share of a row, inside its envelope
combine  the sum obeys the wire rule, given the observed shares
output   the final rounding, given the observed sum; and the whole forward, end
         to end, with nothing believed but the input, so that no tap hides a race
======== ======================================================================
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twinmoe.oracle import aggregates
from twinmoe.oracle.admission import all_admitted
from twinmoe.oracle.comparison import Comparison, compare
from twinmoe.oracle.contract import RoundingContract, Wire
from twinmoe.oracle.copies import wrong_copies
from twinmoe.oracle.envelope import Enclosure, Grade, held, rounded
from twinmoe.oracle.evidence import Evidence
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.power import certify
from twinmoe.oracle.spread import Spread
from twinmoe.oracle.truth import (
    Stages,
    Truth,
    across_ranks,
    over_slots,
    rank_order_sum,
    with_shared,
)
from twinmoe.oracle.verdict import Finding, Verdict

#: Above this share of near-tied tokens, a case without an ids tap proves nothing.
AMBIGUOUS_SHARE = 0.05

#: Without an ids tap, so many answers of a near-tied token are tried.
CANDIDATES = 32


def judge(
    observations: Sequence[RankObservation],
    truth: Truth,
    contract: RoundingContract,
    *,
    grade: Grade = Grade.SHARP,
    sample: int | None = None,
    seed: int = 0,
    loosen: float = 1.0,
) -> Verdict:
    """Decide whether ``observations`` (one per rank) obey ``contract``.

    ``grade`` is SHARP except for inputs built to drive partial sums away from their
    2-norm, which are judged MED.  ``sample`` judges that many tokens, drawn with ``seed``,
    with all their experts, which bounds time and memory at production sizes.  ``loosen``
    multiplies every radius: for judging the judge.  A field of a wrong type, shape or dtype is
    a finding, whatever it is.  Raises ValueError when a rank's observation is missing.
    """
    observations = all_admitted(observations, truth, contract)
    verdict = Verdict(contract, observations[0].path, tokens=len(truth.hidden_TH))
    verdict.findings += (finding for seen in observations for finding in seen.misshapen)
    if any(finding.stage == "output" for finding in verdict.findings):  # no rows to judge
        return replace(verdict, conclusive=False)
    evidence = Evidence.of(observations, truth)
    if sample is not None and sample < len(truth.hidden_TH):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randperm(len(truth.hidden_TH), generator=generator)[:sample].sort().values
        evidence, truth = evidence.of_tokens(tokens), truth.of_tokens(tokens)
        verdict.tokens = len(tokens)
    return _Judgement(evidence, truth, contract, grade, loosen, verdict).run()


@dataclass(frozen=True)
class _Experts:
    """Expert outputs [T, K, H]: allowed and, for narrow outputs, expected; the best rival's."""

    allowed: Enclosure
    expected: Spread | None
    rival_TH: Tensor | None


class _Judgement:
    """One call of :func:`judge`: the evidence, and the verdict being built."""

    def __init__(
        self,
        evidence: Evidence,
        truth: Truth,
        contract: RoundingContract,
        grade: Grade,
        loosen: float,
        verdict: Verdict,
    ) -> None:
        self.evidence, self.truth, self.contract = evidence, truth, contract
        self.grade, self.loosen, self.verdict = grade, loosen, verdict
        self.routing = truth.routing(contract, grade)
        #: Tokens whose experts are known well enough to judge what follows.
        self.judged_T = torch.ones(len(truth.hidden_TH), dtype=torch.bool)

    def run(self) -> Verdict:
        """Judge every stage there is evidence for."""
        ids_TK = self._router()
        experts = self._expert_outputs(ids_TK)
        weights_TK = self.routing.weights(ids_TK)
        free = self.truth.stages(self.contract, ids_TK, weights_TK, self.grade, experts.allowed)
        anchored = self._anchored(free, ids_TK)
        self._dispatch()
        self._experts(anchored)
        self._combine(anchored, ids_TK)
        self._output(anchored, free, ids_TK, experts)
        return self.verdict

    def _expert_outputs(self, ids_TK: Tensor) -> "_Experts":
        """What the chosen experts and each token's best rival answer, in one pass."""
        rivals = self.routing.best_rival(ids_TK)
        asked = ids_TK if rivals is None else torch.cat([ids_TK, rivals[:, None]], dim=1)
        narrow = self.contract.output.precision <= aggregates.NARROW_PRECISION
        carries = [Enclosure, Spread] if narrow else [Enclosure]
        answers = self.truth.unweighted(self.contract, asked, carries, self.grade)
        rival_TH = None if rivals is None else answers[0].value[:, -1]
        allowed, *expected = (answer[:, : ids_TK.shape[1]] for answer in answers)
        return _Experts(allowed, expected[0] if expected else None, rival_TH)

    # --- stages -----------------------------------------------------------------------

    def _router(self) -> Tensor:
        """Judge the chosen experts; return the ids [T, K] to evaluate the truth for."""
        exact, ambiguous = self.routing.ids_TK, self.routing.ambiguous()
        self.verdict.ambiguous = int(ambiguous.sum())
        if self.evidence.ids_TK is None:
            share = self.verdict.ambiguous / max(self.verdict.tokens, 1)
            self.verdict.conclusive = share <= AMBIGUOUS_SHARE
            return self._likeliest(ambiguous)
        observed = self.evidence.ids_TK.long()
        experts = self.truth.config.num_experts
        valid = ((observed >= 0) & (observed < experts)).all(dim=-1)
        admissible = self.routing.admissible(observed.clamp(0, experts - 1)) & valid
        for token in (~admissible).nonzero().flatten().tolist()[:1]:
            self._report(
                "router",
                token,
                f"{self._place(token)} went to experts {sorted(observed[token].tolist())}, "
                f"but should go to {sorted(exact[token].tolist())}"
                f" ({int((~admissible).sum())} of {len(exact)} tokens misrouted)",
            )
        return torch.where(admissible[:, None], observed, exact)

    def _likeliest(self, ambiguous_T: Tensor) -> Tensor:
        """Without ids: for near-tied tokens, the admissible answer that fits the output.

        A token with more answers than are tried is not judged when none of them fits; in
        an inconclusive case no near-tied token is.
        """
        ids_TK = self.routing.ids_TK.clone()
        if not self.verdict.conclusive:
            self.judged_T = ~ambiguous_T
            return ids_TK
        for token in ambiguous_T.nonzero().flatten().tolist():
            candidates = self.routing.candidates(token, CANDIDATES)
            fitting = [ids for ids in candidates if self._fits(token, ids)]
            if fitting:
                ids_TK[token] = fitting[0]
            self.judged_T[token] = bool(fitting) or len(candidates) < CANDIDATES
        return ids_TK

    def _fits(self, token: int, ids_K: Tensor) -> bool:
        alone = self.truth.of_tokens(torch.tensor([token]))
        routing = alone.routing(self.contract, self.grade)
        weights = routing.weights(ids_K[None])
        stages = alone.stages(self.contract, ids_K[None], weights, self.grade)
        seen = self.evidence.output_TH[token : token + 1]
        return not compare(seen, self._loose(stages.sum_TH), self.contract.output).outside.any()

    def _anchored(self, free: Stages[Enclosure], ids_TK: Tensor) -> Stages[Enclosure]:
        """Judge the weights, and restart the truth at the observed ones."""
        observed = self.evidence.weights_TK
        if observed is None or self.verdict.findings:
            return free
        self._element_finding("router", "weight", "slot", observed, free.weights_TK)
        return self.truth.stages(
            self.contract,
            ids_TK,
            Enclosure.exact(observed),
            self.grade,
            free.expert_output_TKH,
        )

    def _dispatch(self) -> None:
        """A copy: bitwise, on every rank, whatever the transport."""
        for wrong in wrong_copies(self.evidence, self.truth):
            self._report("dispatch", wrong.token, wrong.message)

    def _experts(self, anchored: Stages[Enclosure]) -> None:
        outputs = self.evidence.expert_output_TKH
        if outputs is not None:
            allowed = anchored.expert_output_TKH
            self._element_finding("experts", "expert output", "slot and dim", outputs, allowed)
        partials = self.evidence.partials_RTH
        if partials is not None and self.contract.wire is not Wire.NONE:
            for rank, partial in enumerate(partials):
                allowed = anchored.partials_RTH[rank]
                self._element_finding("experts", f"rank {rank}'s share", "dim", partial, allowed)

    def _combine(self, anchored: Stages[Enclosure], ids_TK: Tensor) -> None:
        """Only the sum is on trial: its terms are the observed ones."""
        routed, partials = self.evidence.routed_TH, self.evidence.partials_RTH
        outputs = self.evidence.expert_output_TKH
        if routed is None:
            return
        if partials is not None and self.contract.wire is Wire.RANK_ORDER:
            allowed = Enclosure.exact(rank_order_sum(partials))
        elif partials is not None:
            allowed = across_ranks(self.contract, Enclosure.exact(partials))
        elif outputs is not None:
            observed = Enclosure.exact(outputs)
            terms = self.truth.terms(self.contract, anchored.weights_TK, observed)
            allowed = rounded(over_slots(self.contract, ids_TK, terms), self.contract.reduced)
        else:
            return
        allowed = held(self.truth.scaled(self.contract, allowed), self.contract.accumulator)
        self._element_finding("combine", "sum", "dim", routed, allowed)

    def _output(
        self,
        anchored: Stages[Enclosure],
        free: Stages[Enclosure],
        ids_TK: Tensor,
        experts: "_Experts",
    ) -> None:
        observed, routed = self.evidence.output_TH, self.evidence.routed_TH
        if routed is not None:
            sums = Enclosure.exact(routed)
            if anchored.shared_TH is not None:
                sums = with_shared(self.contract, sums, anchored.shared_TH)
            self._element_finding("output", "out", "dim", observed, sums, output=True)
        verdict = self.verdict
        result = self._compare(observed, free.sum_TH, output=True)
        verdict.worst_ratio, verdict.elements = result.worst_ratio, result.elements
        verdict.flips = int(((observed.double() != result.centre) & result.bounded).sum())
        if not any(finding.stage == "output" for finding in verdict.findings):
            proof = self._breaks_hard(result, ids_TK)
            self._outside_finding("output", "out", "dim", observed, result, proof)
        power = certify(free, experts.rival_TH, result, self.contract.output)
        verdict.slots, verdict.slots_visible = power.slots, power.visible
        verdict.slots_distinct = power.distinct
        if experts.expected is not None:
            self._aggregates(result, ids_TK, experts.expected)

    def _aggregates(self, result: Comparison, ids_TK: Tensor, expert_output_TKH: Spread) -> None:
        """Flip rate and sign, for the batch, each rank and each expert's tokens."""
        weights = self.truth.routing(self.contract, self.grade, Spread).weights(ids_TK)
        spread = Spread.of(weights.value, weights.radius)
        stages = self.truth.stages(self.contract, ids_TK, spread, self.grade, expert_output_TKH)
        sums = stages.sum_TH
        chance, variance = sums.flips(result.centre, self.contract.output)
        chance = (chance * self.loosen).clamp(max=1).masked_fill(~result.bounded, 0)
        seen_TH = self.evidence.output_TH.double()
        flips = aggregates.flips_of(seen_TH, result.centre, chance, variance * self.loosen**2)
        self.verdict.expected_flips = float(chance.sum())
        self.verdict.signs = flips.sign_T[~flips.sign_T.isnan()].tolist()
        if self.verdict.findings:
            return
        # tensor cores truncate inside: what they declare lies to one side by nature
        signed = not self.contract.accumulator.block
        judged_T = self.judged_T & result.bounded.all(dim=1)  # what overflows has no roundings
        alarm = aggregates.first_alarm(flips, self.truth.rank_T, ids_TK, judged_T, signed)
        if alarm is not None:
            self._report("output", alarm.token, alarm.message)

    # --- findings ---------------------------------------------------------------------

    def _loose(self, truth: Enclosure) -> Enclosure:
        return Enclosure(truth.value, truth.radius * self.loosen)

    def _compare(self, observed: Tensor, truth: Enclosure, output: bool = False) -> Comparison:
        result = compare(observed, self._loose(truth), self.contract.output if output else None)
        judged = self.judged_T.view(-1, *[1] * (observed.dim() - 1))
        return replace(
            result,
            outside=result.outside & judged,
            ratio=torch.where(judged, result.ratio, 0.0),
        )

    def _element_finding(
        self,
        stage: str,
        what: str,
        axis: str,
        observed: Tensor,
        truth: Enclosure,
        output: bool = False,
    ) -> None:
        result = self._compare(observed, truth, output)
        self.verdict.note(stage, result.worst_ratio)
        self._outside_finding(stage, what, axis, observed, result, proof=False)

    def _outside_finding(
        self,
        stage: str,
        what: str,
        axis: str,
        observed: Tensor,
        result: Comparison,
        proof: bool,
    ) -> None:
        """Report the worst element outside its interval, if there is one."""
        if not result.outside.any():
            return
        ratio = torch.where(result.outside, result.ratio, -1.0)
        index = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        worst = float(ratio[index])
        size = f"{worst:.3g}x the radius" if math.isfinite(worst) else "no error is allowed"
        grade = "HARD: not the declared arithmetic" if proof else self.grade.name
        self._report(
            stage,
            index[0],
            f"{what}[{self._place(index[0])}, {axis} {', '.join(map(str, index[1:]))}] = "
            f"{result.beside(observed, index)} ({size}, outside {grade}; "
            f"{int(result.outside.sum())} of {result.elements} elements outside)",
            index[-1],
            ratio=worst,
            proof=proof,
        )

    def _breaks_hard(self, result: Comparison, ids_TK: Tensor) -> bool:
        """Is some element outside even the worst case of the declared arithmetic?"""
        if not result.outside.any():
            return False
        routing = self.truth.routing(self.contract, Grade.HARD)
        stages = self.truth.stages(self.contract, ids_TK, routing.weights(ids_TK), Grade.HARD)
        hard = self._compare(self.evidence.output_TH, stages.sum_TH, output=True)
        return bool(hard.outside.any())

    def _report(
        self, stage: str, token: int, message: str, dim: int | None = None, **more: object
    ) -> None:
        rank, row = int(self.truth.rank_T[token]), int(self.truth.row_T[token])
        self.verdict.findings.append(Finding(stage, rank, row, dim, message, **more))  # type: ignore[arg-type]

    def _place(self, token: int) -> str:
        return f"token {int(self.truth.row_T[token])} on rank {int(self.truth.rank_T[token])}"
