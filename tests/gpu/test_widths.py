"""Every path at the widths of published models, inside its envelope."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.conftest import PATHS, sizes
from tests.gpu.widths import DrawnWeights, geometry, hidden, observe
from twinmoe.optimized.experts import backend_report
from twinmoe.oracle import judge
from twinmoe.oracle.case import MODES
from twinmoe.oracle.contracts import graphed_contract
from twinmoe.oracle.emulation.remember import RememberingTruth
from twinmoe.oracle.world import World

LAYERS = [
    (model, dtype) for model in ("qwen3-30b-a3b", "deepseek-v3") for dtype in ("bf16", "fp16")
]
TRANSPORTS = ("p2p", "nccl")


@pytest.fixture(scope="module", params=sizes())
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """As many GPUs as the parameter says, in one group."""
    with World(request.param, "cuda", timeout_s=120) as world:
        yield world


@pytest.mark.parametrize(("model", "dtype"), LAYERS)
def test_published_widths_stay_inside_the_envelope(world: World, model: str, dtype: str) -> None:
    """Eager, captured and replayed, over both tiers, with every expert backend that runs there."""
    config = geometry(model, dtype)
    device = torch.device("cuda", 0)
    batches = [hidden(config, world.size, rank) for rank in range(world.size)]
    truth = RememberingTruth(config, DrawnWeights(config, device), batches)
    usable = [name for name, reason in backend_report(config, device).items() if reason is None]
    failed = []
    for backend, transport, mode in itertools.product(usable, TRANSPORTS, MODES):
        contract = graphed_contract(config, backend, transport, torch.float32, "cuda")
        seen = world.run(observe, model, dtype, (transport, mode, backend))
        verdict = judge(seen, truth, contract)
        moved = {name for ran in seen for name in ran.launches if "[" in name}
        label = "local" if (transport, world.size) == ("nccl", 1) else transport
        assert moved == {f"all_gather[{label}]", f"reduce_scatter[{label}]"}
        PATHS.append((model, world.size, dtype, transport, backend, mode, verdict))
        if not verdict.equivalent:
            failed.append(f"{transport} {backend} {mode}: {verdict}")
    assert not failed, "\n".join(failed)
