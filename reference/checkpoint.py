"""Weights on disk: one safetensors file per layer, of which a rank reads only its own experts.

The header proves what a rank reads: ``digests`` has the SHA-256 of the config, of each replicated
tensor, and of every expert's part of the others.  Files of before it had any are read unproved.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from twinmoe.reference.config import DTYPES, ConfigError, MoEConfig
from twinmoe.reference.files import parse_json, require_regular
from twinmoe.reference.layout import PER_EXPERT, TensorSpec, mismatches

FORMAT = "twinmoe-layer"
FORMAT_VERSION = "1"

_SAFETENSORS_DTYPES = {
    {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}[name]: dtype
    for name, dtype in DTYPES.items()
}


class CheckpointError(ValueError):
    """A weight file, or a group's way of sharing it, that cannot be used."""


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], config: MoEConfig) -> None:
    """Write all experts' tensors together with ``config``."""
    content = json.dumps(config.to_dict())
    digests = {name: _digests(name, tensor) for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": content,
        "digests": json.dumps(digests | {"config": _sha256(content.encode())}),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _digests(name: str, tensor: torch.Tensor) -> list[str]:
    """One digest for each expert's part, or one of a tensor that all experts share."""
    parts = list(tensor) if name in PER_EXPERT else [tensor]
    return [
        _sha256(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for part in parts
    ]


def read_config(path: Path) -> MoEConfig:
    """Read only the config of a weight file; raises CheckpointError if it is not one of ours."""
    with _open(path) as file:
        return _config_of(path, file)


def read_tensors(path: Path, experts: range | None) -> tuple[MoEConfig, dict[str, torch.Tensor]]:
    """Read the replicated tensors and the rows of ``experts`` (None: of all).

    Rows of other experts are not read from the file.  Raises CheckpointError when the file is
    missing, damaged, not ours, or does not hold exactly the tensors that its config calls for.
    """
    with _open(path) as file:
        config = _config_of(path, file)
        names = list(file.keys())
        specs = {name: spec_of(file.get_slice(name)) for name in names}
        if problems := mismatches(specs, config, config.num_experts):
            raise CheckpointError(
                f"{path} does not hold the weights of its own config: "
                f"{'; '.join(problems)!s:.600}; write it again with MoEWeights.save"
            )
        wanted = range(config.num_experts) if experts is None else experts
        check_experts(wanted, config.num_experts)
        rows = slice(wanted.start, wanted.stop)
        try:
            tensors = {
                name: file.get_slice(name)[rows] if name in PER_EXPERT else file.get_tensor(name)
                for name in names
            }
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"{error!s:.300}") from error
        _check_digests(path, file.metadata(), tensors, rows)
    for name, tensor in tensors.items():
        if name != "correction_bias_E":  # in which every number has its place in the order
            check_numbers(tensor, name, path, first=wanted.start)
    return config, tensors


def _check_digests(
    path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor], rows: slice
) -> None:
    """Raise CheckpointError where what was read is not what the digests were made of."""
    if "digests" not in metadata:  # as in files of before
        return
    try:
        recorded = dict(parse_json(metadata["digests"]))
        stored = {name: recorded[name][rows] for name in tensors if name in PER_EXPERT}
        stored |= {name: recorded[name] for name in tensors if name not in PER_EXPERT}
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its digests cannot be read: {error!s:.300}") from None
    if recorded.get("config") != _sha256(metadata["config"].encode()):
        raise _damaged(path, "its config is not what its digest was made of: bits changed")
    for name, tensor in tensors.items():
        if stored[name] != _digests(name, tensor):
            raise _damaged(path, f"{name} is not what its digest was made of: bits changed")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({why}): it does not hold what was saved; copy it again, or write it "
        "again with MoEWeights.save"
    )


def check_experts(experts: range, num_experts: int) -> None:
    """Raise ConfigError unless ``experts`` is a non-empty contiguous range of expert ids."""
    inside = 0 <= experts.start < experts.stop <= num_experts
    if experts.step != 1 or not inside:
        raise ConfigError(
            f"experts ({experts}) must be a non-empty range of step 1 within 0 to "
            f"{num_experts - 1}: a rank's experts are contiguous; use Placement.experts_of(rank)"
        )


def check_numbers(
    tensor: torch.Tensor, name: str, path: Path, *, first: int = 0, infinite: bool = False
) -> None:
    """Raise CheckpointError for the first NaN or, unless ``infinite`` ones are legal, infinity.

    Row 0 of a tensor with one slice per expert is expert ``first``.
    """
    wrong = torch.isnan(tensor) if infinite else ~torch.isfinite(tensor)
    if not bool(wrong.any()):
        return
    index = [int(at) for at in wrong.nonzero()[0]]
    value = float(tensor[tuple(index)])
    expert = ""
    if name in PER_EXPERT:
        index[0] += first
        expert = f" (expert {index[0]})"
    raise CheckpointError(
        f"{name}{index}{expert} in {path} is {value}: a weight is a finite number, and one that is "
        "not reaches every token that meets it; save the weights again"
    )


class HoldsExperts(Protocol):
    """Loaded weights that say which experts they hold."""

    @property
    def experts(self) -> range: ...  # noqa: D102 - see MoEWeights


Loaded = TypeVar("Loaded", bound=HoldsExperts)


def load_each_expert_once(
    load: Callable[[], Loaded], num_experts: int, group: dist.ProcessGroup | None
) -> Loaded:
    """``load`` on every rank of ``group``, which together must hold every expert exactly once.

    A collective: every rank calls it, and all ranks raise or none does.  Raises what ``load``
    raised; CheckpointError, naming the ranks, where it raised on another one; and CheckpointError,
    naming experts and ranks, for an expert that was loaded by no rank or by several.
    """
    loaded: Loaded | Exception
    try:
        loaded = load()
    except Exception as error:  # whatever it is, the peers must not wait for this rank
        loaded = error
    mine = str(loaded) if isinstance(loaded, Exception) else loaded.experts
    told: list[range | str] = [mine]
    if group is not None:
        told = [mine] * dist.get_world_size(group)
        dist.all_gather_object(told, mine, group=group)
    if isinstance(loaded, Exception):
        raise loaded
    if failed := [f"rank {rank} ({why})" for rank, why in enumerate(told) if isinstance(why, str)]:
        raise CheckpointError(
            f"{', '.join(failed)} could not load its experts: a layer needs all of them; correct "
            "it there, and load on all ranks again"
        )
    _require_each_once([held for held in told if isinstance(held, range)], num_experts)
    return loaded


def _require_each_once(holdings: Sequence[range], num_experts: int) -> None:
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for rank, experts in enumerate(holdings):
        for expert in experts:
            holders[expert].append(rank)
    problems = [
        f"expert {expert} was loaded by ranks {holders[expert]}"
        if holders[expert]
        else f"expert {expert} was loaded by no rank"
        for expert in range(num_experts)
        if len(holders[expert]) != 1
    ]
    if problems:
        raise CheckpointError(
            f"each of the {num_experts} experts must be loaded by exactly one of "
            f"{len(holdings)} rank(s), but {_abridged(problems)}; load every rank's experts by "
            "one placement"
        )


def _abridged(problems: list[str], most: int = 4) -> str:
    rest = len(problems) - most
    return ", ".join(problems[:most]) + (f" and {rest} more alike" if rest > 0 else "")


def _open(path: Path) -> Any:
    try:
        require_regular(path)
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: nothing to load; write it with MoEWeights.save"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error!s:.300}): it is damaged or of "
            "another format; write it again with MoEWeights.save"
        ) from error


def _config_of(path: Path, file: Any) -> MoEConfig:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!s:.80} instead of {FORMAT}: it was not "
            "written by MoEWeights.save and says nothing about its layer; convert it first"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {metadata.get('format_version')!s:.80}, but this release "
            f"reads version {FORMAT_VERSION}: write it again with MoEWeights.save of this release"
        )
    try:
        return MoEConfig.from_dict(parse_json(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} carries no usable config ({error!s:.300}): its header was altered; write it "
            "again with MoEWeights.save"
        ) from error


def spec_of(stored: Any) -> TensorSpec:
    """Shape and dtype of a tensor in a file, unread; uint8 for dtypes that no layer has."""
    dtype = _SAFETENSORS_DTYPES.get(stored.get_dtype(), torch.uint8)
    return TensorSpec(tuple(stored.get_shape()), dtype)
