"""Every kind of input that a command reads: an undamaged one, its damage, and how it is read."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from tests.fuzz.damage import json_damaged, line_damaged, safetensors_damaged, text_damaged
from twinmoe.optimized.experts.timings import Shape, Timing, Timings
from twinmoe.oracle.case import Case, CaseError
from twinmoe.oracle.golden import Golden, GoldenError
from twinmoe.oracle.golden import file as golden_file
from twinmoe.oracle.golden.content import Figures, Forward, Recorded
from twinmoe.oracle.ledger import Ledger
from twinmoe.reference.checkpoint import CheckpointError
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.hugging_face import INDEX, HuggingFaceCheckpoint
from twinmoe.reference.weights import MoEWeights

_CONFIG = MoEConfig(
    hidden_size=4, moe_intermediate_size=3, num_experts=2, num_experts_per_tok=1, swiglu_limit=7.0
)
_HUGGING_FACE = {
    **{"model_type": "qwen3_moe", "hidden_size": 4, "moe_intermediate_size": 3, "num_experts": 2},
    **{"num_experts_per_tok": 1, "norm_topk_prob": True, "hidden_act": "silu", "dtype": "float32"},
}
_LINE = "T=3/2,H=8,I=4,E=4,k=2,rsf=2.5,n_group=2,topk_group=1,dtype=bf16,mode=replayed,seed=3"
_LEDGER = '[[known]]\nwhat = "zeros"\nissue = "owner/layer#12"\nwhy = "not mended"\n'


@dataclass(frozen=True)
class Kind:
    """``read(folder, draw)`` reads one damaged input, or raises one of ``errors``."""

    read: Callable[[Path, random.Random], object]
    errors: tuple[type[Exception], ...]


def _checkpoint(folder: Path) -> None:
    """Write a layer in Hugging Face's layout, in two shards."""
    prefix = "model.layers.0.mlp"
    shapes = {"gate_proj": (3, 4), "up_proj": (3, 4), "down_proj": (4, 3)}
    shards = [
        {f"{prefix}.experts.{e}.{m}.weight": torch.ones(shape) for m, shape in shapes.items()}
        for e in range(2)
    ]
    shards[0][f"{prefix}.gate.weight"] = torch.ones(2, 4)
    places = {}
    for number, tensors in enumerate(shards):
        (folder / f"{number}.safetensors").write_bytes(save(tensors))
        places |= dict.fromkeys(tensors, f"{number}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(_HUGGING_FACE))


def _hugging_face(name: str) -> Kind:
    def read(folder: Path, draw: random.Random) -> object:
        _checkpoint(folder)
        path = folder / name
        data = path.read_bytes()
        is_text = name.endswith("json")
        path.write_bytes(
            text_damaged(data.decode(), draw) if is_text else safetensors_damaged(data, draw)
        )
        checkpoint = HuggingFaceCheckpoint(folder)
        return [checkpoint.weights(layer) for layer in checkpoint.layers()]

    return Kind(read, (CheckpointError, ConfigError))


def _own_checkpoint(folder: Path, draw: random.Random) -> object:
    path = folder / "layer.safetensors"
    MoEWeights.random(_CONFIG, 0).save(path, _CONFIG)
    path.write_bytes(safetensors_damaged(path.read_bytes(), draw))
    return MoEWeights.load(path, experts=range(1))


def _own_config(_folder: Path, draw: random.Random) -> object:
    return MoEConfig.from_dict(json_damaged(_CONFIG.to_dict(), draw))


def _recording() -> Golden:
    case = Case.parse("T=3/2,H=8,I=4,E=4,k=2,dtype=bf16,seed=3")
    tensors = {
        **{name: torch.ones(5, 8, dtype=torch.float64) for name in ("value", "radius")},
        **{"ids": torch.zeros(5, 2, dtype=torch.int64), "weights": torch.ones(5, 2)},
    }
    forward = Forward(
        path="p2p + grouped_mm",
        contract="p2p + grouped_mm",
        points={"output": "bf16"},
        tokens=(3, 2),
        digests={"weights": "0", "hidden": "0"},
        tensors=tensors,
    )
    return Golden((Recorded(case, (forward,), Figures(ratios={"output": 0.5})),), {"host": "x"})


def _golden(folder: Path, draw: random.Random) -> object:
    path = folder / "golden.safetensors"
    golden_file.save(_recording(), path)
    path.write_bytes(safetensors_damaged(path.read_bytes(), draw))
    return golden_file.load(path)


def _golden_signed(folder: Path, draw: random.Random) -> object:
    """Damage the content, and sign it anew: a writer that is wrong."""
    path = folder / "golden.safetensors"
    golden_file.save(_recording(), path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = golden_file.load_tensors(data)
    with suppress(UnicodeDecodeError):
        header["content"] = text_damaged(header["content"], draw).decode()
    header["digest"] = golden_file._digest(header["content"], tensors)
    path.write_bytes(save(tensors, header))
    return golden_file.load(path)


def _case(_folder: Path, draw: random.Random) -> object:
    return str(Case.parse(line_damaged(_LINE, draw)))


def _timings(folder: Path, draw: random.Random) -> object:
    shape = Shape("cpu", "bf16", 4, 3, True, 2, 1)
    text = json.dumps([asdict(Timing(shape, rows, {"a": 1.0, "b": 2.0})) for rows in (1, 2)])
    (folder / "r.json").write_bytes(text_damaged(text, draw))
    return Timings.load(folder / "r.json").quickest(shape, ["a", "b"])


def _ledger(folder: Path, draw: random.Random) -> object:
    (folder / "known.toml").write_bytes(text_damaged(_LEDGER, draw))
    return Ledger.load(folder / "known.toml")


KINDS = {
    "config.json of Hugging Face": _hugging_face("config.json"),
    "index of shards": _hugging_face(INDEX),
    "shard": _hugging_face("0.safetensors"),
    "our weight file": Kind(_own_checkpoint, (CheckpointError,)),
    "our config": Kind(_own_config, (ConfigError,)),
    "golden file": Kind(_golden, (GoldenError,)),
    "golden file, signed": Kind(_golden_signed, (GoldenError,)),
    "case line": Kind(_case, (CaseError, ConfigError)),
    "timings": Kind(_timings, (ConfigError,)),
    "ledger": Kind(_ledger, (ConfigError,)),
}


def read_damaged(kind: str, seed: int) -> bool:
    """Read one damaged input; whether it was accepted.  Raises what is no documented error."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            KINDS[kind].read(Path(folder), draw)
        except KINDS[kind].errors as error:
            if len(str(error)) > 4000:
                raise RuntimeError("a message of more than 4000 characters") from error
            return False
        return True
