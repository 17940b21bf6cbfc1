"""The judgement: is what every rank showed inside the envelope of its contract?

Stages are judged in the order of the data flow, so that the first one outside names
the culprit:

======== ======================================================================
router   chosen experts are an admissible set, weights inside their enclosure
dispatch every rank received every rank's rows, bit for bit
experts  each slot's output, or each rank's share of a row, inside its envelope
combine  the sum over ranks obeys the wire rule, given the observed shares
output   the whole forward, end to end, with nothing believed but the input
======== ======================================================================
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from twinmoe.oracle.comparison import Comparison, compare
from twinmoe.oracle.contract import RoundingContract, Wire
from twinmoe.oracle.envelope import Enclosure, Grade
from twinmoe.oracle.observation import RankObservation
from twinmoe.oracle.rounding import ulp
from twinmoe.oracle.truth import Stages, Truth, across_ranks
from twinmoe.oracle.verdict import Finding, Verdict

#: Above this share of near-tied tokens, a case without an ids tap proves nothing.
AMBIGUOUS_SHARE = 0.05

#: A slot is visible when its contribution is at least this many half-widths somewhere.
VISIBLE_RATIO = 4.0


def judge(
    observations: Sequence[RankObservation],
    truth: Truth,
    contract: RoundingContract,
    grade: Grade = Grade.SHARP,
) -> Verdict:
    """Decide whether ``observations`` (one per rank) obey ``contract``.

    ``grade`` is SHARP except for inputs built to drive partial sums away from their
    2-norm, which are judged MED.  Raises ValueError when the number of observations or
    a shape does not match the truth.
    """
    return _Judgement(observations, truth, contract, grade).verdict()


class _Judgement:
    """One call of :func:`judge`: the evidence, and the verdict being built."""

    def __init__(
        self,
        observations: Sequence[RankObservation],
        truth: Truth,
        contract: RoundingContract,
        grade: Grade,
    ) -> None:
        self.observations, self.truth = observations, truth
        self.contract, self.grade = contract, grade
        self._check_shapes()
        self.result = Verdict(contract, observations[0].path)
        self.routing = truth.routing(contract, grade)
        self.result.tokens = len(truth.hidden_TH)

    def verdict(self) -> Verdict:
        """Judge every stage there is evidence for."""
        ids_TK, judged_T = self._router()
        stages = self.truth.stages(self.contract, self.routing, ids_TK, self.grade)
        self._weights(stages, judged_T)
        self._dispatch()
        self._experts(stages, judged_T)
        self._combine()
        self._output(stages, ids_TK, judged_T)
        return self.result

    # --- evidence ---------------------------------------------------------------------

    def _check_shapes(self) -> None:
        ranks = len(self.truth.tokens_by_rank)
        if len(self.observations) != ranks:
            raise ValueError(
                f"{len(self.observations)} observations for {ranks} ranks: pass one per rank"
            )
        for rank, (seen, tokens) in enumerate(
            zip(self.observations, self.truth.tokens_by_rank, strict=True)
        ):
            expected = (tokens, self.truth.config.hidden_size)
            if tuple(seen.output_TH.shape) != expected:
                raise ValueError(
                    f"rank {rank} returned a tensor of shape {tuple(seen.output_TH.shape)}, "
                    f"expected {expected}: one output row per input row"
                )

    def _tap(self, name: str) -> Tensor | None:
        """The tap of all ranks, concatenated over tokens; None if any rank lacks it."""
        taps = [getattr(seen.taps, name) for seen in self.observations]
        return None if any(tap is None for tap in taps) else torch.cat(taps)

    def _report(
        self, stage: str, token: int | None, message: str, dim: int | None = None, **more: object
    ) -> None:
        rank, row = self.truth.locate(token) if token is not None else (0, None)
        self.result.findings.append(Finding(stage, rank, row, dim, message, **more))  # type: ignore[arg-type]

    def _place(self, token: int) -> str:
        rank, row = self.truth.locate(token)
        return f"token {row} on rank {rank}"

    # --- stages -----------------------------------------------------------------------

    def _router(self) -> tuple[Tensor, Tensor]:
        """(ids the truth is evaluated for [T, K], tokens whose later stages count [T])."""
        exact = self.routing.ids_TK
        ambiguous = self.routing.ambiguous()
        self.result.ambiguous = int(ambiguous.sum())
        observed = self._tap("ids_TK")
        if observed is None:
            share = self.result.ambiguous / max(self.result.tokens, 1)
            self.result.conclusive = share <= AMBIGUOUS_SHARE or self.result.tokens == 0
            return exact, ~ambiguous
        observed = observed.long()
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
        return torch.where(admissible[:, None], observed, exact), torch.ones_like(ambiguous)

    def _weights(self, stages: Stages, judged_T: Tensor) -> None:
        observed = self._tap("weights_TK")
        if observed is None or any(f.stage == "router" for f in self.result.findings):
            return
        result = compare(observed, stages.weights_TK)
        self._element_finding("router", "weight", "slot", result, observed, judged_T)

    def _dispatch(self) -> None:
        """A gather is a copy: bitwise, on every rank, whatever the transport."""
        for received, sent in (
            ("gathered_hidden", None),
            ("gathered_ids", "ids_TK"),
            ("gathered_weights", "weights_TK"),
        ):
            for rank, seen in enumerate(self.observations):
                gathered = getattr(seen.taps, received)
                own = self.truth.hidden_TH if sent is None else self._tap(sent)
                if gathered is None or own is None:
                    continue
                wrong = (_bits(self._valid_rows(gathered)) != _bits(own)).any(dim=-1)
                for token in wrong.nonzero().flatten().tolist()[:1]:
                    self._report(
                        "dispatch",
                        token,
                        f"{received.replace('_', ' ')} of {self._place(token)} differs from what "
                        f"was sent, as received by rank {rank} ({int(wrong.sum())} of "
                        f"{len(wrong)} rows differ)",
                    )

    def _experts(self, stages: Stages, judged_T: Tensor) -> None:
        outputs = self._tap("expert_output_TKH")
        if outputs is not None:
            result = compare(outputs, stages.expert_output_TKH)
            self._element_finding(
                "experts", "expert output", "slot and dim", result, outputs, judged_T
            )
        if self.contract.wire is Wire.NONE:
            return
        for rank, seen in enumerate(self.observations):
            if seen.taps.partial is None:
                continue
            partial = self._valid_rows(seen.taps.partial)
            result = compare(partial, stages.partials_RTH[rank])
            what = f"rank {rank}'s share"
            self._element_finding("experts", what, "dim", result, partial, judged_T)

    def _combine(self) -> None:
        """Re-anchored at the observed shares: only the sum over ranks is on trial."""
        routed = self._tap("routed_TH")
        partials = [seen.taps.partial for seen in self.observations]
        if routed is None or any(partial is None for partial in partials):
            return
        shares = torch.stack([self._valid_rows(p) for p in partials if p is not None])
        everyone = torch.ones(len(routed), dtype=torch.bool)
        if self.contract.wire is Wire.RANK_ORDER:
            allowed = Enclosure.exact(_rank_order_sum(shares))
        else:
            allowed = across_ranks(self.contract, Enclosure.exact(shares))
        result = compare(routed, allowed)
        self._element_finding("combine", "sum over ranks", "dim", result, routed, everyone)

    def _output(self, stages: Stages, ids_TK: Tensor, judged_T: Tensor) -> None:
        observed = torch.cat([seen.output_TH for seen in self.observations])
        result = compare(observed, stages.sum_TH, self.contract.output)
        counted = compare(
            observed[judged_T],
            Enclosure(stages.sum_TH.value[judged_T], stages.sum_TH.radius[judged_T]),
            self.contract.output,
        )
        verdict = self.result
        verdict.worst_ratio, verdict.elements = counted.worst_ratio, counted.elements
        verdict.flips, verdict.expected_flips = counted.flips, counted.expected_flips
        self._element_finding("output", "out", "dim", result, observed, judged_T, stages, ids_TK)
        if counted.too_many_flips and not verdict.findings:
            self._report(
                "output",
                None,
                f"{counted.flips / counted.elements:.1%} of the output's elements differ from the "
                f"rounded truth, at most {counted.expected_flips / counted.elements:.1%} expected: "
                "every element is inside its interval, yet the rounding is not the declared one",
            )
        self._power(stages, result)

    def _power(self, stages: Stages, result: Comparison) -> None:
        """Count the slots whose loss would show: max_d |term| >= 4 half-widths."""
        terms = stages.terms_TKH.value.abs()
        spacing = ulp(stages.sum_TH.value.nan_to_num(), self.contract.output)
        half_width = torch.maximum((result.high - result.low) / 2, spacing / 2)
        visible = (terms / half_width[:, None, :]).amax(dim=-1) >= VISIBLE_RATIO
        self.result.slots, self.result.slots_visible = visible.numel(), int(visible.sum())

    # --- findings ---------------------------------------------------------------------

    def _element_finding(
        self,
        stage: str,
        what: str,
        axis: str,
        result: Comparison,
        observed: Tensor,
        judged_T: Tensor,
        stages: Stages | None = None,
        ids_TK: Tensor | None = None,
    ) -> None:
        """Report the worst element outside its interval, if there is one."""
        outside = result.outside & judged_T.view(-1, *[1] * (observed.dim() - 1))
        if not outside.any():
            return
        ratio = torch.where(outside, result.ratio, -1.0)
        flat = int(ratio.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
        proof = stages is not None and ids_TK is not None and self._breaks_hard(index, ids_TK)
        worst = float(ratio[index])
        size = f"{worst:.3g}x the radius" if math.isfinite(worst) else "no error is allowed"
        kind = "outside HARD: wrong arithmetic" if proof else "outside " + self.grade.name
        message = (
            f"{what}[{self._place(index[0])}, {axis} {', '.join(map(str, index[1:]))}] = "
            f"{float(observed[index]):.6g}, allowed {float(result.low[index]):.6g} .. "
            f"{float(result.high[index]):.6g} ({size}, {kind}; "
            f"{int(outside.sum())} of {outside.numel()} elements outside)"
        )
        self._report(stage, index[0], message, index[-1], ratio=worst, proof=proof)

    def _breaks_hard(self, index: tuple[int, ...], ids_TK: Tensor) -> bool:
        """Is the element outside even the worst case of the declared arithmetic?"""
        routing = self.truth.routing(self.contract, Grade.HARD)
        stages = self.truth.stages(self.contract, routing, ids_TK, Grade.HARD)
        observed = torch.cat([seen.output_TH for seen in self.observations])
        return bool(compare(observed, stages.sum_TH, self.contract.output).outside[index])

    def _valid_rows(self, padded: Tensor) -> Tensor:
        """Drop the padding of each rank: [R*N, ...] to [T, ...]."""
        counts = self.truth.tokens_by_rank
        chunks = padded.unflatten(0, (len(counts), len(padded) // len(counts)))
        return torch.cat([chunk[:count] for chunk, count in zip(chunks, counts, strict=True)])


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers, so that NaN equals itself and -0 is not 0."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(width[tensor.element_size()])


def _rank_order_sum(shares_RTH: Tensor) -> Tensor:
    """fp32 accumulation in the order of ranks, as the reduce-scatter kernel does."""
    total_TH = torch.zeros_like(shares_RTH[0], dtype=torch.float32)
    for share_TH in shares_RTH:
        total_TH = total_TH + share_TH.float()
    return total_TH
