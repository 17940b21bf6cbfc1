"""A whole model on our layer: prefill and decode, every MoE layer's output judged.

    python examples/whole_model.py              # Qwen3-MoE and Mixtral, small, random, on one rank
    python examples/whole_model.py --ep 2       # each rank its own sequence, the experts shared

A randomly initialised model of transformers is saved in shards.  Every rank loads it, takes
its MoE blocks out, and puts ``twinmoe.optimized`` in their place, with weights of its own
experts only, read from the shards.  Prefill runs the AlltoAll path, decode replays a graph.
The oracle judges every layer at every step; logits are compared for information.

Exit codes: 0 equivalent, 1 not equivalent.

Legend: T tokens of this rank, H hidden_size, V vocabulary.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.graph import GraphRunner
from twinmoe.optimized.layer import MoELayer
from twinmoe.optimized.options import InferenceOptions
from twinmoe.oracle import RankObservation, RoundingContract, Taps, Truth, Verdict, judge
from twinmoe.oracle.contracts import eager_contract, graphed_contract
from twinmoe.oracle.worker import RankContext
from twinmoe.oracle.world import World
from twinmoe.reference.hugging_face import HuggingFaceCheckpoint
from twinmoe.reference.placement import Placement

_WIDTHS = {
    **{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1},
}
MODELS = {
    "qwen3_moe": Qwen3MoeConfig(
        **_WIDTHS, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=4
    ),
    "mixtral": MixtralConfig(
        **_WIDTHS, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2
    ),
}
TIERS = {"p2p": Tier.P2P, "nvls": Tier.NVLS}
PROMPT, STEPS = 7, 4


@dataclass
class Call:
    """One forward of one MoE layer on this rank."""

    layer: int
    step: str
    hidden_TH: Tensor
    seen: RankObservation
    contract: RoundingContract


@dataclass
class Ran:
    """What a rank sends back: its calls in order, and both models' logits [T, V]."""

    calls: list[Call] = field(default_factory=list)
    logits: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class SwappedBlock(nn.Module):
    """Our layer where a block of transformers was; keeps what it was asked and answered."""

    def __init__(self, number: int, layer: MoELayer, transport: str, calls: list[Call]) -> None:
        super().__init__()
        self.number, self.layer, self.transport, self.calls = number, layer, transport, calls
        self.runner = GraphRunner(layer, buckets=(1, 8, 16))

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Prefill outside a graph, decode inside."""
        hidden_TH = hidden_BTH.flatten(0, 1)
        self.layer.taps = {}
        config, backend = self.layer.config, self.layer.experts.backend_name
        if len(hidden_TH) > 1:
            out_TH, taps, step = self.layer(hidden_TH), self.layer.taps, "prefill"
            path = str(self.layer.path_report())
            contract = eager_contract(config, backend)
        else:
            out_TH, step = self.runner(hidden_TH), "decode"
            taps = self.runner.last.taps
            with self.layer.graphed():
                path = str(self.layer.path_report())
            contract = graphed_contract(config, backend, self.transport, torch.float32)
        shown = Taps(
            **{f"{name}_TK": taps[name][: len(hidden_TH)].clone() for name in ("ids", "weights")}
        )
        seen = RankObservation(out_TH, shown, path)
        self.calls.append(Call(self.number, step, hidden_TH.clone(), seen, contract))
        return out_TH.view_as(hidden_BTH)


def run_rank(place: RankContext, folder: str, transport: str, seed: int) -> Ran:
    """Run the model as it is, and again on our layer, with one sequence of this rank's own."""
    disable_progress_bar()
    ran = Ran()
    tokens = _tokens(place, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(place.device)
    theirs = _logits(model, tokens, PROMPT + place.rank)
    swap(model, folder, place, transport, ran.calls)
    ours = _logits(model, tokens, PROMPT + place.rank)
    ran.logits = list(zip(theirs, ours, strict=True))
    return ran


def swap(model: Any, folder: str, place: RankContext, transport: str, calls: list[Call]) -> None:
    """Put our layer in the place of every MoE block, with this rank's experts."""
    checkpoint = HuggingFaceCheckpoint(folder, torch.bfloat16)
    placement = Placement(checkpoint.config.num_experts, place.world_size)
    options = InferenceOptions(transport=TIERS[transport], max_tokens_per_rank=16)
    for number in checkpoint.layers():
        weights = checkpoint.weights_for_rank(number, placement, place.rank, place.group)
        layer = MoELayer(checkpoint.config, weights.to(place.device), place.group, options)
        block = SwappedBlock(number, layer, transport, calls)
        decoder = model.model.layers[number]
        if hasattr(decoder, "block_sparse_moe"):
            # Mixtral before release 5 of transformers, which unpacks the router's logits too; only
            # training asks for them.
            block.register_forward_hook(lambda _block, _given, out: (out, None))
            decoder.block_sparse_moe = block
        else:
            decoder.mlp = block


def _tokens(place: RankContext, seed: int) -> Tensor:
    """Prompts of different lengths, then the same next tokens for both models."""
    generator = torch.Generator().manual_seed(seed + place.rank)
    length = PROMPT + place.rank + STEPS
    return torch.randint(128, (1, length), generator=generator).to(place.device)


@torch.no_grad()
def _logits(model: Any, tokens: Tensor, prompt: int) -> list[Tensor]:
    """Logits of the prompt's last token, then of every next one, with a KV cache."""
    answer = model(tokens[:, :prompt], use_cache=True)
    logits = [answer.logits[0, -1:]]
    for at in range(prompt, tokens.shape[1]):
        answer = model(
            tokens[:, at : at + 1], past_key_values=answer.past_key_values, use_cache=True
        )
        logits.append(answer.logits[0])
    return logits


# --- the driver -------------------------------------------------------------------------------


def judged(folder: str, ranks: list[Ran]) -> list[tuple[Call, Verdict]]:
    """Judge every call of all ranks together, around weights read once more, all experts."""
    checkpoint = HuggingFaceCheckpoint(folder, torch.bfloat16)
    weights = {number: checkpoint.weights(number) for number in checkpoint.layers()}
    found = []
    for calls in zip(*(ran.calls for ran in ranks), strict=True):
        first = calls[0]
        hidden = [call.hidden_TH for call in calls]
        truth = Truth(checkpoint.config, weights[first.layer], hidden)
        found.append((first, judge([call.seen for call in calls], truth, first.contract)))
    return found


def run_model(name: str, ep_size: int, transport: str, device: str, seed: int = 0) -> bool:
    """Save, load, swap, run and judge one model; print what was found; whether all fits."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, World(ep_size, device, timeout_s=60) as world:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="100KB")
        ranks = world.run(run_rank, folder, transport, seed)
        verdicts = judged(folder, ranks)
    print(f"{name}: EP {ep_size}, prefill by alltoall, decode by {transport} in a graph")
    for layer in sorted({call.layer for call, _ in verdicts}):
        for step in ("prefill", "decode"):
            _report(layer, step, [v for c, v in verdicts if (c.layer, c.step) == (layer, step)])
    pairs = [pair for ran in ranks for pair in ran.logits]
    largest = max(float((ours - theirs).abs().max()) for theirs, ours in pairs)
    agree = sum(bool(ours.argmax() == theirs.argmax()) for theirs, ours in pairs)
    print(f"  logits: differ by at most {largest:.3g}; same next token in {agree} of {len(pairs)}")
    return all(verdict.equivalent for _, verdict in verdicts)


def _report(layer: int, step: str, verdicts: list[Verdict]) -> None:
    worst = max(verdict.worst_ratio for verdict in verdicts)
    wrong = [verdict for verdict in verdicts if not verdict.equivalent]
    word = f"{len(wrong)} of {len(verdicts)} NOT equivalent" if wrong else "equivalent"
    print(f"  layer {layer} {step:7}: {len(verdicts)} calls, worst ratio {worst:.2f}, {word}")
    for verdict in wrong[:1]:
        print(f"    {verdict}")


def main() -> int:
    """Run the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--transport", choices=TIERS, default="p2p")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    fits = [
        run_model(name, asked.ep, asked.transport, asked.device) for name in asked.model or MODELS
    ]
    return 0 if all(fits) else 1


if __name__ == "__main__":
    sys.exit(main())
