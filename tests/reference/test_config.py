"""MoEConfig: what it accepts, what it refuses, and how it says so."""

import json
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given

from tests.reference.inputs import EVERYTHING, PLAIN, fp64_configs
from twinmoe.reference.config import DTYPES, ConfigError, MoEConfig, dtype_name
from twinmoe.reference.placement import Placement

MINIMAL: dict[str, Any] = {
    "hidden_size": 8,
    "moe_intermediate_size": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}

REFUSED = [
    ({"hidden_size": 0}, "hidden_size (0)"),
    ({"hidden_size": 2.5}, "hidden_size (2.5)"),
    ({"hidden_size": True}, "hidden_size (True)"),
    ({"moe_intermediate_size": -4}, "moe_intermediate_size (-4)"),
    ({"num_experts": 0}, "num_experts (0)"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok (0)"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok (9)"),
    ({"n_group": 0}, "n_group (0)"),
    ({"n_group": 3}, "num_experts (8) must be divisible by n_group (3)"),
    ({"n_group": 2, "topk_group": 0}, "topk_group (0)"),
    ({"n_group": 2, "topk_group": 3}, "topk_group (3) must not exceed n_group (2)"),
    (
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
        "num_experts_per_tok (3) must not exceed the 2 experts",
    ),
    ({"scoring_func": "tanh"}, "scoring_func (tanh)"),
    ({"group_score": "mean"}, "group_score (mean)"),
    ({"hidden_act": "swish"}, "hidden_act (swish)"),
    ({"swiglu_limit": 7.0, "gated": False}, "swiglu_limit (7.0) needs gated"),
    ({"swiglu_limit": 0.0}, "swiglu_limit (0.0) must be finite and > 0"),
    ({"swiglu_limit": math.inf}, "swiglu_limit (inf)"),
    ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size (-1)"),
    ({"shared_expert_gate": True}, "shared_expert_gate (True) needs a shared expert"),
    ({"routed_scaling_factor": math.nan}, "routed_scaling_factor (nan)"),
    ({"routed_scaling_factor": math.inf}, "routed_scaling_factor (inf)"),
    ({"routed_scaling_factor": 10**400}, "is no float"),
    ({"routed_scaling_factor": True}, "routed_scaling_factor (True)"),
    ({"num_experts": 8.0}, "num_experts (8.0)"),
    ({"norm_topk_prob": "x"}, "norm_topk_prob (x)"),
    ({"gated": 1}, "gated (1)"),
    ({"scoring_func": ["softmax"]}, "scoring_func (['softmax'])"),
    ({"dtype": torch.int8}, "dtype (torch.int8)"),
    ({"router_dtype": torch.bfloat16}, "router_dtype (torch.bfloat16)"),
    ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size (2)"),
    ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor (1.0)"),
    ({"moe_pad_expert_input_to_capacity": True}, "moe_pad_expert_input_to_capacity (True)"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_refusal_quotes_the_value_the_reason_and_the_remedy(changes, words):
    """Every setting that cannot be honoured is refused in one line: value: why; remedy."""
    with pytest.raises(ConfigError) as refusal:
        MoEConfig(**(MINIMAL | changes))
    message = str(refusal.value)
    assert words in message
    assert ": " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"routed_scaling_factor": 0.0},
        {"n_group": 8, "topk_group": 2},
        {"num_experts_per_tok": 8},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"router_dtype": torch.float64},
    ],
)
def test_corner_settings_are_legal(changes):
    """A zero factor, groups of a single expert, k = E and one expert are ordinary settings."""
    MoEConfig(**(MINIMAL | changes))


def test_the_docstring_tables_every_setting():
    """A reader finds each field, next to Megatron's flag, in the class docstring."""
    assert MoEConfig.__doc__ is not None
    missing = [f.name for f in fields(MoEConfig) if f"``{f.name}``" not in MoEConfig.__doc__]
    assert not missing


def test_rows_follow_from_gating():
    """A gated expert's first matrix has rows for gate and up, a plain one's for one projection."""
    assert MoEConfig(**EVERYTHING).w13_rows == 40
    assert MoEConfig(**EVERYTHING).shared_w13_rows == 24
    assert MoEConfig(**PLAIN).w13_rows == 9
    assert not MoEConfig(**PLAIN).has_shared_expert


@given(fp64_configs())
def test_dict_round_trip(config):
    """A config survives JSON unchanged."""
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_what_it_does_not_know():
    """Unknown and missing keys and dtype names are errors that name them, not guesses."""
    record = MoEConfig(**MINIMAL).to_dict()
    with pytest.raises(ConfigError, match="topk_groups"):
        MoEConfig.from_dict(record | {"topk_groups": 2})
    with pytest.raises(ConfigError, match=r"router_dtype \(float32\)"):
        MoEConfig.from_dict(record | {"router_dtype": "float32"})
    del record["num_experts"]
    with pytest.raises(ConfigError, match=r"missing setting\(s\) num_experts"):
        MoEConfig.from_dict(record)


def test_dtype_names_are_unique():
    """Each storage dtype has one short name, and names lead back to it."""
    assert [dtype_name(dtype) for dtype in DTYPES.values()] == list(DTYPES)


@pytest.mark.parametrize("ep_size", [0, 3, 16])
def test_uneven_expert_parallelism_is_refused(ep_size):
    """Experts are dealt evenly: config and placement refuse the same sizes."""
    with pytest.raises(ConfigError, match=rf"ep_size.*{ep_size}"):
        MoEConfig(**MINIMAL).check_ep_size(ep_size)
    with pytest.raises(ConfigError, match=rf"ep_size \({ep_size}\)"):
        Placement(8, ep_size)


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
def test_placement_deals_contiguous_equal_parts(ep_size):
    """Owner and local id of each expert agree with the ranges of the ranks."""
    placement = Placement(8, ep_size)
    MoEConfig(**MINIMAL).check_ep_size(ep_size)
    ids = torch.arange(8)
    owner, local = placement.owner(ids), placement.local_id(ids)
    for rank in range(ep_size):
        owned = placement.experts_of(rank)
        assert ids[owner == rank].tolist() == list(owned)
        assert local[owner == rank].tolist() == list(range(placement.num_local_experts))
    with pytest.raises(ConfigError, match=rf"rank \({ep_size}\)"):
        placement.experts_of(ep_size)
