"""How close each path comes to its bounds: ratio, flips and signs over drawn cases."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from twinmoe.oracle.case import Case
from twinmoe.oracle.defects import JudgeDefectError, judging
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.oracle.judgement import judge
from twinmoe.oracle.session import Answer
from twinmoe.oracle.showing import Showing
from twinmoe.oracle.strategies import DEVICE_TRANSPORTS
from twinmoe.oracle.subject import SUBJECTS
from twinmoe.oracle.trial import observe_case
from twinmoe.oracle.truth import Truth
from twinmoe.oracle.world import World
from twinmoe.reference.config import MoEConfig

EP_SIZES = (1, 2, 4)
BACKENDS = ("grouped_mm", "triton")

#: Input kinds that cases take in turn: those of real layers, not those of exact tests.
_VALUES = ("normal", "recorded", "positive", "outlier")


@dataclass
class PathRecord:
    """What the judged cases of one path at one EP size showed, one entry a case.

    ``ratios`` error over allowed error of the worst element; ``flips`` and ``expected``
    shares of elements; ``alarms`` the lines of cases that were judged not equivalent.
    ``signs`` has one entry for each token with flips: their mean direction, +1 away from
    zero, -1 toward it.  ``defects`` tell which cases could not be judged.
    """

    path: str
    ep_size: int
    ratios: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    signs: list[float] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    def add(self, case: Case, answers: Sequence[Answer], truth: Truth, loosen: float) -> None:
        """Judge what every rank answered to ``case``."""
        observations = [answer.observation for answer in answers]
        contract = answers[0].contract
        verdict = judge(observations, truth, contract, loosen=loosen)
        elements = max(verdict.elements, 1)
        self.ratios.append(verdict.worst_ratio)
        self.flips.append(verdict.flips / elements)
        self.expected.append(verdict.expected_flips / elements)
        self.signs += verdict.signs
        if not verdict.equivalent:
            self.alarms.append(f"{case}: {verdict}")

    @property
    def sign_score(self) -> float:
        """Sum of signs over its standard deviation at most: beyond +-5.4 flips are one-sided.

        Each sign lies in [-1, 1], so P(|score| >= s) <= 2 exp(-s^2 / 2) when flips have no
        preferred sign (W. Hoeffding, J. Amer. Statist. Assoc. 58, 1963).
        """
        return sum(self.signs) / math.sqrt(max(len(self.signs), 1))


def calibrate_paths(
    draws: int,
    seed: int = 0,
    *,
    ep_sizes: Sequence[int] = EP_SIZES,
    transports: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    loosen: float = 1.0,
    timeout_s: float = 15.0,
    advance: Callable[[], None] = lambda: None,
) -> list[PathRecord]:
    """Run ``draws`` cases of every path at every EP size, and the reference on the same ones.

    ``transports`` None are all that ``device`` has.  ``advance`` is called after each case.
    Raises WorkerFailure when a rank fails.
    """
    transports = DEVICE_TRANSPORTS[device] if transports is None else transports
    records: dict[tuple[str, int], PathRecord] = {}
    with ExitStack() as worlds:
        for ep_size in ep_sizes:
            world = worlds.enter_context(World(ep_size, device, timeout_s))
            cases = calibration_cases(ep_size, transports, dtype, draws, seed)
            for number, case in enumerate(cases):
                # every path gets the same draws, so the reference answers them once
                subjects = tuple(SUBJECTS) if number < draws else ("optimized",)
                names = {one: one if one == "reference" else _path(case) for one in subjects}
                of_paths = {
                    one: records.setdefault((name, ep_size), PathRecord(name, ep_size))
                    for one, name in names.items()
                }
                try:
                    with judging(case, f"twinmoe replay '{case}'"):
                        _measure(world.run(observe_case, case, subjects), case, of_paths, loosen)
                except JudgeDefectError as defect:
                    of_paths["optimized"].defects.append(str(defect))
                advance()
    return sorted(records.values(), key=lambda record: record.path != "reference")


def _measure(
    showings: Sequence[dict[str, Showing]],
    case: Case,
    records: dict[str, PathRecord],
    loosen: float,
) -> None:
    """Judge what every rank's subjects answered, each into its record."""
    rows = [hidden_for(case, rank) for rank in range(case.ep_size)]
    truth = RememberingTruth(case.config, weights_for(case), rows)
    for subject, record in records.items():
        shown = [showing[subject].answers[-1] for showing in showings]
        record.add(case, [answer for answer in shown if answer], truth, loosen)


def _path(case: Case) -> str:
    kind = "eager" if case.transport == "alltoall" else "graphed"
    return f"{kind}, {case.transport} + {case.backend}"


def calibration_cases(
    ep_size: int, transports: Sequence[str], dtype: torch.dtype, draws: int, seed: int
) -> list[Case]:
    """``draws`` dense cases for each transport and backend, the same for the same seed."""
    return [
        _drawn(random.Random(f"{seed}/{ep_size}/{draw}"), ep_size, transport, backend, dtype, draw)
        for transport in transports
        for backend in BACKENDS
        for draw in range(draws)
    ]


def _drawn(
    choose: random.Random, ep_size: int, transport: str, backend: str, dtype: torch.dtype, draw: int
) -> Case:
    shared = choose.choice((0, 24))
    gated = choose.random() < 0.8
    config = MoEConfig(
        hidden_size=choose.choice((96, 192, 384)),
        moe_intermediate_size=choose.choice((40, 64, 128)),
        num_experts=4 * ep_size,
        num_experts_per_tok=choose.choice((2, 3)),
        scoring_func=choose.choice(("softmax", "sigmoid")),
        norm_topk_prob=choose.random() < 0.8,
        routed_scaling_factor=choose.choice((1.0, 2.5)),
        use_correction_bias=choose.random() < 0.5,
        hidden_act=choose.choice(("silu", "silu", "gelu", "relu2")),
        gated=gated,
        swiglu_limit=choose.choice((None, None, 1.5)) if gated else None,
        shared_expert_intermediate_size=shared,
        shared_expert_gate=shared > 0 and choose.random() < 0.5,
        router_weight_on_input=choose.random() < 0.2,
        dtype=dtype,
    )
    return Case(
        config=config,
        tokens=tuple(choose.randint(4, 16) for _ in range(ep_size)),
        transport=transport,
        backend=backend,
        wire="fp32" if transport == "alltoall" else choose.choice(("fp32", "model")),
        values=_VALUES[draw % len(_VALUES)],
        seed=choose.randrange(2**20),
    )
