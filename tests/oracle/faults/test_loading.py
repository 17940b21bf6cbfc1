"""Each planted fault of loading leaves other weights in the layer than the file holds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.oracle.faults.at_functions import planted
from twinmoe.optimized.layer import MoELayer
from twinmoe.oracle.case import Case
from twinmoe.oracle.faults import FAULTS
from twinmoe.oracle.scenario import Scenario
from twinmoe.reference.weights import MoEWeights

_CASE = Case.parse("T=3/2,H=96,I=40,E=6,k=3,dtype=bf16,history=l0.f0.l1.f0")
_LAST = range(3, 6)


def _version(number: int) -> MoEWeights:
    return Scenario(_CASE, number).weights(_LAST)


def _reloaded() -> MoEWeights:
    """Rank 1's weights of version 0, overwritten by version 1."""
    layer: Any = SimpleNamespace(
        config=_CASE.config,
        weights=_version(0),
        experts=SimpleNamespace(refresh=lambda: None),
    )
    MoELayer.reload(layer, _version(1))
    weights: MoEWeights = layer.weights
    return weights


def _same(one: MoEWeights, other: MoEWeights) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("name", ["raw_reload", "cut_twice"])
def test_reload_leaves_other_weights(name: str) -> None:
    """Rank 1 does not hold the version that it was given."""
    assert _same(_reloaded(), _version(1))
    with planted(name, _CASE, rank=1):
        assert not _same(_reloaded(), _version(1))


@pytest.mark.parametrize("name", ["transposed_twice", "padded_offset", "cached_tensors"])
def test_file_is_misread(name: str, tmp_path: Path) -> None:
    """After a load of one file, the load of another gives rank 1 the wrong tensors."""
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for number, path in enumerate(paths):
        Scenario(_CASE, number).weights().save(path, _CASE.config)
    assert _same(MoEWeights.load(paths[1], experts=_LAST), _version(1))
    with planted(name, _CASE, rank=1):
        MoEWeights.load(paths[0], experts=_LAST)
        assert not _same(MoEWeights.load(paths[1], experts=_LAST), _version(1))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("raw_reload", "T=3/2,H=96,I=40,E=6,k=3,dtype=bf16,history=f0.w1"),
        ("transposed_twice", "T=3/2,H=96,I=40,E=6,k=3,gated=0,dtype=bf16,history=l1.f0"),
        ("cut_twice", "T=3/2,H=96,I=40,E=6,k=3,dtype=bf16,history=f0.w0.f0"),
        ("padded_offset", "T=3/2,H=96,I=40,E=8,k=3,dtype=bf16,history=l1.f0"),
        ("cached_tensors", "T=3/2,H=96,I=40,E=6,k=3,dtype=bf16,history=l1.f0.l1.f0"),
    ],
)
def test_equivalent_cases_are_not_reached(name: str, line: str) -> None:
    """Where the fault changes nothing, its trigger says so."""
    assert not FAULTS[name].reaches(Case.parse(line))
