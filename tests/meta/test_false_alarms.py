"""The judge accepts every correct layer: no order, evaluation or wire that a contract allows.

Legend: H hidden_size, I moe_intermediate_size, E experts, K experts per token.
"""

import random
import secrets
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.profiles import NIGHTLY
from twinmoe.oracle import judge
from twinmoe.oracle.emulation import KINDS, PATHS, Inputs, Path, draw_inputs
from twinmoe.reference.config import MoEConfig, dtype_name

#: Inputs per (kind, dtype, path), each judged for two implementations; see docs/equivalence.md.
DRAWS = 24 if NIGHTLY else 1

#: Other numbers every night, the same ones in every other run.
SEED = secrets.randbits(31) if NIGHTLY else 0

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((64, 40), (96, 64), (130, 17), (33, 16))
TOKENS = ((8, 8), (4, 4, 4, 4), (16,), (3, 0, 5, 1))


def draw_config(choose: random.Random, dtype: torch.dtype) -> MoEConfig:
    """Return a small layer, seldom with neutral settings."""
    hidden, intermediate = choose.choice(SIZES)
    scoring = choose.choice(("softmax", "sigmoid", "sqrtsoftplus"))
    return MoEConfig(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_experts=8,
        num_experts_per_tok=choose.choice((1, 2, 3, 8)),
        scoring_func=scoring,
        norm_topk_prob=choose.random() < 0.7,
        routed_scaling_factor=choose.choice((1.0, 2.5)),
        use_correction_bias=choose.random() < 0.3,
        hidden_act=choose.choice(("silu", "silu", "gelu", "relu2")),
        gated=choose.random() < 0.8,
        shared_expert_intermediate_size=choose.choice((0, 24)),
        dtype=dtype,
    )


def alarms(kind: str, inputs: Inputs, path: Path, seed: int) -> Iterator[str]:
    """Judge two implementations, one with taps and one without; yield every finding."""
    truth, contract = inputs.truth(), path.contract(inputs.config)
    generator = torch.Generator().manual_seed(seed)
    for tapped in (True, False):
        implementation = path.draw(generator)
        observed = implementation.observe(contract, inputs, tapped)
        verdict = judge(observed, truth, contract, grade=KINDS[kind].grade)
        if verdict.findings:
            yield f"{path.name}, {kind}, seed {seed}, {inputs.config}\n{implementation}\n{verdict}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_correct_layers_raise_no_alarm(
    kind: str, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """Every accumulation order, activation, routing formula and wire passes on every input."""
    raised, judged = [], 0
    for number, path in enumerate(PATHS.values()):
        for draw in range(DRAWS if path.supports(dtype) else 0):
            seed = SEED + 1000 * number + draw
            choose = random.Random(f"{kind}/{dtype}/{seed}")
            inputs = draw_inputs(kind, draw_config(choose, dtype), choose.choice(TOKENS), seed)
            raised += alarms(kind, inputs, path, seed)
            judged += 2
    record_property("judged_cases", judged)
    print(f"{len(raised)} false alarms in {judged} judged cases")
    assert not raised, "\n\n".join(raised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("kind", ["positive", "recorded"])
@pytest.mark.parametrize(
    "name",
    [
        "alltoall grouped_mm",
        "p2p triton, fp32 wire",
        "alltoall grouped_mm, tensor core",
        "p2p triton, fp32 wire, tensor core",
    ],
)
def test_many_tokens_raise_no_alarm(name: str, kind: str, dtype: torch.dtype) -> None:
    """Rates and signs over 512 tokens, which small batches cannot resolve, pass as well."""
    config = MoEConfig(
        hidden_size=256,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        dtype=dtype,
    )
    inputs = draw_inputs(kind, config, (256, 256), seed=11)
    raised = list(alarms(kind, inputs, PATHS[name], seed=11))
    assert not raised, "\n\n".join(raised)
