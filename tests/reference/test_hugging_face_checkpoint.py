"""Checkpoints in Hugging Face's layout: rank-local reads, and what is wrong with a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.reference.inputs import tokens
from twinmoe.reference import hugging_face
from twinmoe.reference.checkpoint import CheckpointError
from twinmoe.reference.hugging_face import INDEX, HuggingFaceCheckpoint
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.placement import Placement

transformers = pytest.importorskip("transformers", reason="writes checkpoints with transformers")

_WIDTHS = {
    **{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2},
}
CONFIGS = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16},
    "deepseek_v3": {
        **{"moe_intermediate_size": 24, "intermediate_size": 32, "n_routed_experts": 4},
        **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
}


def saved(model: str, folder: Path, shard: str = "20KB") -> Any:
    """Save a small random model in shards; return it."""
    config = transformers.AutoConfig.for_model(model, **_WIDTHS, **CONFIGS[model])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder, max_shard_size=shard)
    return made


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Qwen3-MoE checkpoint, not to be changed."""
    folder = tmp_path_factory.mktemp("qwen")
    saved("qwen3_moe", folder)
    return folder


@pytest.fixture
def copied(qwen: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    for file in qwen.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_our_layer_with_their_weights_is_their_block(
    model: str, shard: str, tmp_path: Path
) -> None:
    """Read from shards or from one file, the reference gives what their block gives."""
    theirs = saved(model, tmp_path, shard)
    assert (tmp_path / INDEX).exists() == (shard == "20KB")
    checkpoint = HuggingFaceCheckpoint(tmp_path, torch.float32)
    assert checkpoint.layers() == ([1] if model == "deepseek_v3" else [0, 1])
    x_TH = tokens(checkpoint.config, 12, seed=1)
    decoder = theirs.model.layers[1]
    # Mixtral's block has this name on disk, and in memory until release 5
    block = decoder.block_sparse_moe if hasattr(decoder, "block_sparse_moe") else decoder.mlp
    answer = block(x_TH[None])
    expected_TH = (answer[0] if isinstance(answer, tuple) else answer).detach().view_as(x_TH)
    ours_TH = MoELayer(checkpoint.config, checkpoint.weights(1))(x_TH)
    torch.testing.assert_close(ours_TH, expected_TH)


def test_a_rank_reads_only_its_own_experts(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of other ranks' experts are not asked for, and other shards not opened."""
    asked: set[str] = set()
    opened: set[Path] = set()

    class Watched:
        def __init__(self, path: Path, framework: str) -> None:
            opened.add(path)
            self._file = safe_open(path, framework)

        def __enter__(self) -> Watched:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_slice(self, name: str) -> Any:
            asked.add(name)
            return self._file.get_slice(name)

    monkeypatch.setattr(hugging_face, "safe_open", Watched)
    weights = HuggingFaceCheckpoint(qwen).weights(0, range(2, 4))
    experts = {int(name.split(".")[5]) for name in asked if ".experts." in name}
    assert weights.experts == range(2, 4)
    assert experts == {2, 3}
    assert len(asked) == 1 + 2 * 3
    assert len(opened) < len(list(qwen.glob("*.safetensors")))


def test_ranks_together_hold_what_one_rank_reads(qwen: Path) -> None:
    """The shards of two ranks, one after the other, are all experts."""
    checkpoint = HuggingFaceCheckpoint(qwen)
    placement = Placement(checkpoint.config.num_experts, 2)
    parts = [checkpoint.weights(1, placement.experts_of(rank)) for rank in range(2)]
    whole = checkpoint.weights_for_rank(1, Placement(checkpoint.config.num_experts, 1), 0, None)
    assert torch.equal(torch.cat([part.w13_LFH for part in parts]), whole.w13_LFH)
    assert torch.equal(torch.cat([part.w2_LHI for part in parts]), whole.w2_LHI)


# --- folders that cannot be read ---------------------------------------------------------------


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def _empty_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def _no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


_EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


def _missing_shard(folder: Path) -> None:
    (folder / _index(folder)["weight_map"][_EXPERT]).unlink()


def _missing_key(folder: Path) -> None:
    index = _index(folder)
    del index["weight_map"][_EXPERT]
    (folder / INDEX).write_text(json.dumps(index))


def _wrong_shard(folder: Path) -> None:
    index = _index(folder)
    others = set(index["weight_map"].values()) - {index["weight_map"][_EXPERT]}
    index["weight_map"][_EXPERT] = min(others)
    (folder / INDEX).write_text(json.dumps(index))


def _truncated_shard(folder: Path) -> None:
    path = folder / _index(folder)["weight_map"][_EXPERT]
    path.write_bytes(path.read_bytes()[:64])


def _other_shape(folder: Path) -> None:
    path = folder / _index(folder)["weight_map"][_EXPERT]
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors | {_EXPERT: torch.zeros(3, 3)}, path)


def _changed(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put a tensor into the shard of the last expert and, where the index lacks it, index it."""
    index = _index(folder)
    path = folder / index["weight_map"].setdefault(name, index["weight_map"][_EXPERT])
    (folder / INDEX).write_text(json.dumps(index))
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors | ({name: tensor} if tensor is not None else {}), path)


def _renamed(folder: Path, file: object) -> None:
    index = _index(folder)
    index["weight_map"][_EXPERT] = file
    (folder / INDEX).write_text(json.dumps(index))


def _linked_out(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    shard = folder / _index(folder)["weight_map"][_EXPERT]
    shard.rename(outside / "shard")
    shard.symlink_to(outside / "shard")


def _fifo(folder: Path) -> None:
    shard = folder / _index(folder)["weight_map"][_EXPERT]
    shard.unlink()
    os.mkfifo(shard)


def _unindexed(folder: Path) -> None:
    before = (folder / INDEX).read_text()
    _changed(folder, "model.layers.0.mlp.gate.weight_scale_inv", torch.ones(1))
    (folder / INDEX).write_text(before)


def _nan(folder: Path) -> None:
    tensor = torch.zeros(24, 32)
    tensor[3, 5] = torch.nan
    _changed(folder, _EXPERT, tensor)


def _layer(name: str) -> Callable[[Path], None]:
    return lambda folder: _changed(folder, f"model.layers.{name}", torch.ones(1))


def _file(name: object) -> Callable[[Path], None]:
    return lambda folder: _renamed(folder, name)


def _setting(**settings: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_layer("0.mlp.experts.4.up_proj.weight"), r"experts\.4.*no part of the layer"),
        (_layer("0.mlp.shared_experts.up_proj.weight"), "no part of the layer"),
        (_layer("0.mlp.gate.e_score_correction_bias"), "no part of the layer"),
        (_layer("0.mlp.experts.1.down_proj.bias"), "no part of the layer"),
        (_layer("0.mlp.experts.1.down_proj.weight_scale_inv"), "no part of the layer"),
        (_unindexed, "weight_scale_inv.*no part of the layer"),
        (_layer("x.mlp.experts.1.down_proj.weight"), "layers have numbers"),
        (_file("../shard"), "leads out of that folder"),
        (_file("/etc/hostname"), "leads out of that folder"),
        (_linked_out, "leads out of that folder"),
        (_file("a\0b"), "leads nowhere|leads out"),
        (_fifo, "it is a FIFO, not a regular file"),
        (_file("."), "it is a folder"),
        (_file(None), "a file has a name"),
        (_file([]), "a file has a name"),
        (_file("9" * 5000), "a file has a name"),
        (_nan, r"up_proj.weight\[3, 5\] in .* is nan"),
        (_setting(quantization_config="fp8"), "quantised weights"),
        (_setting(num_experts=10**12, num_local_experts=10**12), "is in no file of"),
        (_setting(moe_intermediate_size=10**12), "but config.json calls for"),
    ],
)
def test_what_would_change_the_layer_or_leads_elsewhere_is_refused(
    damage: Callable[[Path], None], words: str, copied: Path
) -> None:
    """Surplus tensors of the layer, files that lie elsewhere or are none, and sizes not there."""
    damage(copied)
    with pytest.raises(CheckpointError, match=words):
        HuggingFaceCheckpoint(copied, torch.float32).weights(0)


def test_tensors_outside_the_layer_are_nobodys_business(copied: Path) -> None:
    """Another layer's or the head's surplus tensors change nothing in this one."""
    _changed(copied, "model.layers.1.mlp.gate.bias", torch.ones(1))
    _changed(copied, "lm_head.bias", torch.ones(1))
    assert HuggingFaceCheckpoint(copied, torch.float32).weights(0).experts == range(4)


def test_links_of_the_hubs_cache_are_followed(copied: Path, tmp_path_factory: Any) -> None:
    """A snapshot's files are links to blobs beside the snapshots: that is one checkpoint."""
    cache = tmp_path_factory.mktemp("cache")
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(copied.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert HuggingFaceCheckpoint(snapshot, torch.float32).layers() == [0, 1]
    assert HuggingFaceCheckpoint(snapshot, torch.float32).weights(0).experts == range(4)


def test_a_correction_bias_in_16_bits_is_refused(tmp_path: Path) -> None:
    """It ranks experts otherwise than the fp32 one that the layer is defined with."""
    saved("deepseek_v3", tmp_path, "1GB")
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file(tensors | {name: tensors[name].bfloat16()}, path)
    with pytest.raises(CheckpointError, match=r"correction_bias .*bfloat16, but .*float32"):
        HuggingFaceCheckpoint(tmp_path, torch.float32).weights(1)


def _quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without_config, "config.json cannot be read"),
        (_broken_index, "index.json cannot be read"),
        (_empty_index, "has no weight_map"),
        (_no_weights, "there are no weights to read"),
        (_missing_shard, "a shard is missing"),
        (_missing_key, "is in no file of"),
        (_wrong_shard, "cannot be read from"),
        (_truncated_shard, "the file is damaged"),
        (_other_shape, r"is \[3, 3\] torch.float32, but config.json calls for \[24, 32\]"),
        (_quantised, "quantised weights"),
    ],
)
def test_each_kind_of_damage_has_its_own_words(
    damage: Callable[[Path], None], words: str, copied: Path
) -> None:
    """A folder that cannot be read says which file or tensor is at fault, and why."""
    damage(copied)
    with pytest.raises(CheckpointError, match=words):
        HuggingFaceCheckpoint(copied).weights(0)


def test_a_layer_without_experts_is_refused(qwen: Path) -> None:
    """Asking for a layer that has none names those that have."""
    with pytest.raises(CheckpointError, match=r"layer \(7\).*\[0, 1\]"):
        HuggingFaceCheckpoint(qwen).weights(7)


def test_another_dtype_than_the_file_is_refused(qwen: Path) -> None:
    """Weights are never converted in passing: that is another model."""
    with pytest.raises(CheckpointError, match="bfloat16"):
        HuggingFaceCheckpoint(qwen, torch.bfloat16).weights(0)
