"""The weights of one layer, or of one rank's part of it, in the layout of record.

Legend: H hidden_size, I moe_intermediate_size (of the shared expert in its own tensors),
F rows of w13 (2I gated, [gate | up]; I plain), E experts, L experts present.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from twinmoe.reference import checkpoint
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.initialise import random_tensors
from twinmoe.reference.layout import TensorSpec, mismatches
from twinmoe.reference.placement import Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class MoEWeights:
    """Tensors of the experts ``experts`` (global ids) and of the replicated parts.

    All tensors are in the config's dtype except the correction bias, which is fp32.  Row i of
    ``w13_LFH`` and ``w2_LHI`` belongs to expert ``experts[i]``.  Rows of w13 are [gate | up].
    """

    router_EH: torch.Tensor
    correction_bias_E: torch.Tensor | None
    w13_LFH: torch.Tensor
    w2_LHI: torch.Tensor
    shared_w13_FH: torch.Tensor | None
    shared_w2_HI: torch.Tensor | None
    shared_gate_1H: torch.Tensor | None
    experts: range

    @classmethod
    def random(
        cls,
        config: MoEConfig,
        seed: int,
        experts: range | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Draw seeded weights of ``experts`` (None: of all) and put them on ``device``.

        Values do not depend on the device, nor on which other experts are drawn: a rank that
        draws only its own gets the same as one that shards the whole.
        """
        wanted = range(config.num_experts) if experts is None else experts
        checkpoint.check_experts(wanted, config.num_experts)
        return cls._of(random_tensors(config, seed, wanted), wanted).to(device)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        experts: range | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Read ``experts`` (None: all) of a file written by ``save``; other rows are not read.

        Raises CheckpointError for a file that is missing, damaged, not ours or incomplete.
        """
        config, tensors = checkpoint.read_tensors(Path(path), experts)
        return cls._of(tensors, experts or range(config.num_experts)).to(device)

    @classmethod
    def load_for_rank(
        cls,
        path: str | Path,
        config: MoEConfig,
        placement: Placement,
        rank: int,
        group: dist.ProcessGroup | None,
        *,
        device: torch.device | str | None = None,
    ) -> Self:
        """Read this rank's experts and prove over ``group`` that each expert was read once.

        A collective when ``group`` is given: every rank of the group calls it.  Raises
        CheckpointError, on all ranks together, when the file of one is unusable or belongs to
        another config, and when an expert was read by no rank or by several.
        """
        return checkpoint.load_each_expert_once(
            lambda: cls._load_share(path, config, placement.experts_of(rank), device),
            config.num_experts,
            group,
        )

    @classmethod
    def _load_share(
        cls, path: str | Path, config: MoEConfig, experts: range, device: torch.device | str | None
    ) -> Self:
        stored = checkpoint.read_config(Path(path))
        if stored != config:
            different = [f.name for f in fields(config) if _differs(f.name, stored, config)]
            raise checkpoint.CheckpointError(
                f"{path} holds a layer whose {', '.join(different)} differ(s) from the given "
                "config: its weights have another meaning; use the config stored in the file"
            )
        return cls.load(path, experts=experts, device=device)

    def save(self, path: str | Path, config: MoEConfig) -> None:
        """Write a safetensors file that also carries ``config``.

        Raises ConfigError unless these are all experts of ``config``.
        """
        self.check(config, range(config.num_experts))
        checkpoint.write_tensors(Path(path), self.tensors(), config)

    def shard(self, placement: Placement, rank: int) -> Self:
        """Return the part that ``rank`` owns, as views of these tensors.

        Raises ConfigError when these weights do not hold all of that rank's experts.
        """
        owned = placement.experts_of(rank)
        if owned[0] not in self.experts or owned[-1] not in self.experts:
            raise ConfigError(
                f"rank ({rank}) owns {owned}, but these weights hold {self.experts}: a shard is "
                "cut from weights that contain it; use the weights of all experts"
            )
        rows = slice(owned.start - self.experts.start, owned.stop - self.experts.start)
        cut = {"w13_LFH": self.w13_LFH[rows], "w2_LHI": self.w2_LHI[rows]}
        return self._of(self.tensors() | cut, owned)

    def expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (w13 [F, H], w2 [H, I]) of one expert, by its global id.

        Raises ConfigError when these weights do not hold it.
        """
        if expert not in self.experts:
            raise ConfigError(
                f"expert ({expert}) is not among the {self.experts} held here: a shard knows only "
                "its own; use the weights of all experts"
            )
        row = self.experts.index(expert)
        return self.w13_LFH[row], self.w2_LHI[row]

    def copy_(self, other: Self) -> None:
        """Overwrite these tensors with ``other``'s values, in the same storage."""
        mine, theirs = self.tensors(), other.tensors()
        if self.experts != other.experts or _specs(mine) != _specs(theirs):
            raise ConfigError(
                f"weights of {other.experts} ({', '.join(theirs)}) cannot replace those of "
                f"{self.experts} ({', '.join(mine)}): storage, shapes and dtypes stay; use "
                "weights of the same config and experts"
            )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])

    def to(self, device: torch.device | str | None) -> Self:
        """Return these weights on ``device``; None leaves them where they are."""
        if device is None:
            return self
        return self._of({n: t.to(device) for n, t in self.tensors().items()}, self.experts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that exist, by field name."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in present.items() if isinstance(t, torch.Tensor)}

    def check(self, config: MoEConfig, experts: range) -> None:
        """Raise ConfigError unless these are exactly the weights of ``experts`` of ``config``."""
        if self.experts != experts:
            raise ConfigError(
                f"weights hold {self.experts}, but {experts} are needed: every expert is present "
                "exactly once; use MoEWeights.shard or draw the right experts"
            )
        if problems := mismatches(_specs(self.tensors()), config, len(experts)):
            raise ConfigError(
                f"weights do not fit the config: {'; '.join(problems)}; make them from this config"
            )

    @classmethod
    def _of(cls, tensors: dict[str, torch.Tensor], experts: range) -> Self:
        absent = dict.fromkeys(field.name for field in fields(cls))
        return cls(**(absent | tensors | {"experts": experts}))  # type: ignore[arg-type]


def _specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _differs(name: str, one: MoEConfig, other: MoEConfig) -> bool:
    return bool(getattr(one, name) != getattr(other, name))
