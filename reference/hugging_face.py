"""One MoE layer out of a checkpoint in Hugging Face's layout, of which a rank reads its part.

Such a checkpoint is a folder with ``config.json`` and either ``model.safetensors`` or several
shards, of which ``model.safetensors.index.json`` tells what lies where.  Every expert's
matrices are tensors of their own, so that a rank opens only the files that hold its experts.
Tensors of the layer's MoE block are read or refused, never passed over; others are nobody's
business here.

Legend: E experts, L experts read, H hidden_size, I intermediate size, F rows of w13 (gate,
then up).
"""

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twinmoe.reference.checkpoint import (
    CheckpointError,
    check_experts,
    check_numbers,
    load_each_expert_once,
    spec_of,
)
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.files import parse_json, read_text, require_regular
from twinmoe.reference.from_hf import config_from_hf
from twinmoe.reference.layout import TensorSpec, expected_tensors
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class _Names:
    """What a model calls its MoE block and the matrices of one expert: gate, up, down."""

    block: str
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


#: By ``model_type``, as on disk.  Source: what ``save_pretrained`` of transformers 4.57 writes;
#: 5.17 writes the same, though its modules have other names and stack the experts.
_NAMES = {
    "mixtral": _Names("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": _Names("mlp"),
    "deepseek_v3": _Names("mlp"),
}


class HuggingFaceCheckpoint:
    """A folder of safetensors files; opening it reads ``config.json`` and the index only.

    ``dtype`` is that of the layer's tensors, None for the one in ``config.json``.  Raises
    CheckpointError for a folder that is none, and ConfigError for a model that
    ``MoEConfig.from_hf`` does not know.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self.folder = Path(folder)
        raw = _json(self.folder / "config.json")
        if quantised := raw.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise CheckpointError(
                f"{self.folder} holds quantised weights ({method!s:.80}): their scales are not "
                "read here; use a checkpoint in bf16, fp16 or fp32"
            )
        self.config: MoEConfig = config_from_hf(raw, dtype)
        self._names = _NAMES[raw["model_type"]]
        self._files = _weight_map(self.folder)

    def layers(self) -> list[int]:
        """Numbers of the layers that have experts."""
        pattern = re.compile(rf"model\.layers\.([^.]*)\.{self._names.block}\.experts\.")
        found = {match[1]: name for name in self._files if (match := pattern.match(name))}
        for number, name in found.items():
            if not _NUMBER.fullmatch(number):
                raise CheckpointError(
                    f"{name!r:.200} in {self.folder} is of layer {number!r:.40}: layers have "
                    "numbers; download or save the checkpoint again"
                )
        return sorted(map(int, found))

    def weights(self, layer: int, experts: range | None = None) -> MoEWeights:
        """Read ``experts`` (None: all) of one layer; no other expert's tensors are read.

        Raises CheckpointError for a layer without experts, for a tensor that is in no file, or
        not in the one that the index names, for one of another shape or dtype than the config
        calls for, for one of this layer's MoE block that the config does not call for, and for
        one that holds NaN or an infinity.
        """
        if layer not in (known := self.layers()):
            raise CheckpointError(
                f"layer ({layer}) of {self.folder} has no experts: those with experts are "
                f"{known}; choose one of them"
            )
        wanted = range(self.config.num_experts) if experts is None else experts
        check_experts(wanted, self.config.num_experts)
        for name in self._files:
            self.require_known(name, layer)
        with ExitStack() as files:
            return _Reader(self, layer, wanted, files).weights()

    def weights_for_rank(
        self, layer: int, placement: Placement, rank: int, group: dist.ProcessGroup | None
    ) -> MoEWeights:
        """Read this rank's experts and prove over ``group`` that each expert was read once.

        A collective when ``group`` is given.  Raises CheckpointError, on all ranks together:
        where one of them cannot read its own, and for experts read by no rank or by several.
        """
        return load_each_expert_once(
            lambda: self.weights(layer, placement.experts_of(rank)), self.config.num_experts, group
        )

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self._files:
            raise CheckpointError(
                f"{name} is in no file of {self.folder}: the checkpoint is incomplete, or of "
                "another model than its config.json; download or save it again"
            )
        return _inside(self.folder, self._files[name])

    def require_known(self, name: str, layer: int) -> None:
        """Raise CheckpointError for a tensor of the layer's MoE block that is not read."""
        prefix = f"{self.prefix(layer)}."
        if not name.startswith(prefix):
            return
        inside = name.removeprefix(prefix)
        expert = re.fullmatch(rf"experts\.([^.]*)\.({'|'.join(self.matrices)})\.weight", inside)
        if expert and _NUMBER.fullmatch(expert[1]) and int(expert[1]) < self.config.num_experts:
            return
        others = ["gate.weight"]
        if self.config.use_correction_bias:
            others.append("gate.e_score_correction_bias")
        if self.config.has_shared_expert:
            others += [f"shared_experts.{matrix}.weight" for matrix in self.matrices]
        if inside not in others:
            raise CheckpointError(
                f"{name!r:.200} in {self.folder} is no part of the layer of config.json, "
                f"of {self.config.num_experts} experts: without it the layer would compute "
                "something else; use the config.json that belongs to these weights, or remove it"
            )

    def prefix(self, layer: int) -> str:
        """What the names of a layer's MoE tensors begin with."""
        return f"model.layers.{layer}.{self._names.block}"

    @property
    def matrices(self) -> tuple[str, str, str]:
        """The names of one expert's gate, up and down matrices."""
        return self._names.matrices


@dataclass
class _Reader:
    """Reads the tensors of one layer, each file opened once."""

    checkpoint: HuggingFaceCheckpoint
    layer: int
    experts: range
    files: ExitStack
    _open: dict[Path, Any] = field(default_factory=dict)

    def weights(self) -> MoEWeights:
        config, prefix = self.checkpoint.config, self.checkpoint.prefix(self.layer)
        specs = expected_tensors(config, len(self.experts))
        for expert in self.experts:
            self._check_mlp(f"{prefix}.experts.{expert}", specs["w13_LFH"], specs["w2_LHI"])
        w13_LFH, w2_LHI = (
            torch.empty(specs[name].shape, dtype=specs[name].dtype)
            for name in ("w13_LFH", "w2_LHI")
        )
        for row, expert in enumerate(self.experts):
            self._read_mlp(f"{prefix}.experts.{expert}", w13_LFH[row], w2_LHI[row])
        shared_w13_FH = shared_w2_HI = None
        if config.has_shared_expert:
            shared = specs["shared_w13_FH"], specs["shared_w2_HI"]
            self._check_mlp(f"{prefix}.shared_experts", *shared)
            shared_w13_FH, shared_w2_HI = (
                torch.empty(specs[name].shape, dtype=specs[name].dtype)
                for name in ("shared_w13_FH", "shared_w2_HI")
            )
            self._read_mlp(f"{prefix}.shared_experts", shared_w13_FH, shared_w2_HI)
        bias_E = None
        if config.use_correction_bias:
            name = f"{prefix}.gate.e_score_correction_bias"
            bias_E = self._read(name, specs["correction_bias_E"], infinite=True)
        return MoEWeights(
            router_EH=self._read(f"{prefix}.gate.weight", specs["router_EH"]),
            correction_bias_E=bias_E,
            w13_LFH=w13_LFH,
            w2_LHI=w2_LHI,
            shared_w13_FH=shared_w13_FH,
            shared_w2_HI=shared_w2_HI,
            shared_gate_1H=None,
            experts=self.experts,
        )

    def _read_mlp(self, prefix: str, w13_FH: Tensor, w2_HI: Tensor) -> None:
        """Fill rows [gate | up] and the down matrix of one expert."""
        targets = (*w13_FH.chunk(2), w2_HI)
        for name, target in zip(self.checkpoint.matrices, targets, strict=True):
            spec = TensorSpec(tuple(target.shape), target.dtype)
            target.copy_(self._read(f"{prefix}.{name}.weight", spec))

    def _check_mlp(self, prefix: str, w13: TensorSpec, w2: TensorSpec) -> None:
        """Refuse sizes that the files do not hold before anything of such a size is allocated."""
        half = TensorSpec((w13.shape[-2] // 2, w13.shape[-1]), w13.dtype)
        down = TensorSpec(w2.shape[-2:], w2.dtype)
        for name, spec in zip(self.checkpoint.matrices, (half, half, down), strict=True):
            self._slice(f"{prefix}.{name}.weight", spec)

    def _read(self, name: str, spec: TensorSpec, infinite: bool = False) -> Tensor:
        stored = self._slice(name, spec)
        try:
            tensor: Tensor = stored[:]
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from error
        check_numbers(tensor, name, self.checkpoint.file_of(name), infinite=infinite)
        return tensor

    def _slice(self, name: str, spec: TensorSpec) -> Any:
        path = self.checkpoint.file_of(name)
        try:
            if path not in self._open:
                self._open[path] = self._opened(path)
            stored = self._open[path].get_slice(name)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} does not exist, but {INDEX} says that it holds {name}: a shard is "
                "missing; download or save the checkpoint again"
            ) from error
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from error
        if (found := spec_of(stored)) != spec:
            raise CheckpointError(
                f"{name} in {path} is {found}, but config.json calls for {spec}: they belong to "
                "different models, or dtype= is not that of the file; correct one of them"
            )
        return stored

    def _opened(self, path: Path) -> Any:
        require_regular(path)
        file = self.files.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118 - no mapping; a shard may hold more than is indexed
            self.checkpoint.require_known(name, self.layer)
        return file

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{name} cannot be read from {self.checkpoint.file_of(name)} ({error!s:.300}): the "
            f"file is damaged, or {INDEX} belongs to another; download or save the checkpoint again"
        )


#: No file's name is longer.
_LONGEST = 1024

#: How a layer or an expert is numbered in a tensor's name.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def _inside(folder: Path, name: str) -> Path:
    """The file of a folder; raises CheckpointError for one that lies, or is linked, elsewhere.

    The hub's cache is one checkpoint in two folders: links in ``snapshots/REVISION`` lead to
    ``blobs`` beside ``snapshots``.
    """
    path, home = folder / name, folder.resolve()
    cached = [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
    try:
        real = path.resolve()
        lexical = Path(os.path.normpath(home / name))
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise CheckpointError(
            f"{INDEX} of {folder} names the file {name!r:.200}, which leads nowhere "
            f"({error!s:.300}); download or save the checkpoint again"
        ) from None
    if not (
        lexical.is_relative_to(home) and any(real.is_relative_to(safe) for safe in (home, *cached))
    ):
        raise CheckpointError(
            f"{INDEX} of {folder} names the file {name!r:.200}, which leads out of that folder: a "
            "checkpoint's shards lie beside its index; copy the file there, or correct the index"
        )
    return path


def _weight_map(folder: Path) -> dict[str, str]:
    """Each tensor's file, from the index, or all in the only file."""
    if not os.path.lexists(folder / INDEX):
        return dict.fromkeys(_names_in(folder / SINGLE), SINGLE)
    files = _json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(
            f"{folder / INDEX} has no weight_map: it does not say which file holds which "
            "tensor; download or save the checkpoint again"
        )
    for name, file in files.items():
        if not (isinstance(file, str) and 0 < len(file) <= _LONGEST):
            raise CheckpointError(
                f"{folder / INDEX} names the file {file!r:.80} for {name!r:.200}: a file has a "
                "name; download or save the checkpoint again"
            )
    return files


def _names_in(path: Path) -> list[str]:
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be opened ({error!s:.300}), and there is no {INDEX} beside it: there "
            "are no weights to read; pass the folder of a safetensors checkpoint"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!s:.300}): it belongs to every checkpoint of Hugging "
            "Face's layout; pass the folder that save_pretrained has written"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: it is damaged; download it again")
    return content
