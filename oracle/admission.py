"""What enters the judge: each field of an observation is what it must be, or a finding.

A layer may show anything, and whatever it shows is said of the layer, never of the judge.  Every
field is held against the sizes of the batch and the dtypes of the contract; one that does not fit
is left out of what is judged, and becomes a finding.

Legend: T tokens of this rank, H hidden_size, K experts per token, N padded rows of
this rank, P of all ranks, S rows received.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from twinmoe.oracle.contract import RoundingContract
from twinmoe.oracle.observation import RankObservation, Taps, Unreadable
from twinmoe.oracle.rounding import FORMATS
from twinmoe.oracle.truth import Truth
from twinmoe.oracle.verdict import Finding
from twinmoe.oracle.visible import visible
from twinmoe.reference.config import MoEConfig


@dataclass(frozen=True)
class _Expected:
    """What a field must be: the stage that made it, its axes in letters, and what it holds."""

    stage: str
    axes: str
    holds: str


_EXPECTED = {
    "ids_TK": _Expected("router", "TK", "integers"),
    "weights_TK": _Expected("router", "TK", "numbers"),
    "routed_ids": _Expected("router", "NK", "integers"),
    "routed_weights": _Expected("router", "NK", "numbers"),
    "sent_TKH": _Expected("dispatch", "TKH", "tokens"),
    "received_hidden": _Expected("dispatch", "SH", "tokens"),
    "received_ids": _Expected("dispatch", "S", "integers"),
    "gathered_hidden": _Expected("dispatch", "PH", "tokens"),
    "gathered_ids": _Expected("dispatch", "PK", "integers"),
    "gathered_weights": _Expected("dispatch", "PK", "numbers"),
    "expert_output_TKH": _Expected("experts", "TKH", "numbers"),
    "partial": _Expected("experts", "PH", "numbers"),
    "routed_TH": _Expected("combine", "TH", "numbers"),
    "output_TH": _Expected("output", "TH", "outputs"),
}

_AXES = {
    "T": "tokens of the rank",
    "H": "hidden_size",
    "K": "experts per token",
    "N": "padded rows of the rank",
    "P": "padded rows of all ranks, as many of each",
    "S": "received rows",
}

_INTEGERS = tuple(
    dtype
    for dtype in (
        torch.uint8, torch.int8, torch.int16, torch.uint16,
        torch.int32, torch.uint32, torch.int64, torch.uint64,
    )
)  # fmt: skip


def admitted(
    seen: object,
    rank: int,
    tokens_by_rank: Sequence[int],
    config: MoEConfig,
    contract: RoundingContract,
) -> RankObservation:
    """What a rank showed, in plain tensors; ``misshapen`` says what of it does not fit.

    A misshapen tap is left out, a misshapen output stands as NaN.  What is admitted is admitted
    again unchanged.
    """
    return _Door(rank, tokens_by_rank, config, contract).admit(_readable(seen))


def copied(value: Any) -> Any:
    """What was shown, as it is now, in memory of its own; a word for what has no numbers."""
    plain = _plain(value)
    return plain.clone() if isinstance(plain, Tensor) else plain


def all_admitted(
    observations: Sequence[object], truth: Truth, contract: RoundingContract
) -> list[RankObservation]:
    """Every rank's; raises ValueError when one is missing."""
    counts = truth.tokens_by_rank
    if len(observations) != len(counts):
        raise ValueError(
            f"{len(observations)} observations for {len(counts)} ranks: pass one per rank"
        )
    return [
        admitted(seen, rank, counts, truth.config, contract)
        for rank, seen in enumerate(observations)
    ]


class _Door:
    """Lets one rank's observation in, field by field."""

    def __init__(
        self, rank: int, counts: Sequence[int], config: MoEConfig, contract: RoundingContract
    ) -> None:
        self.rank, self.counts, self.config, self.contract = rank, counts, config, contract
        self.found: list[Finding] = []

    def admit(self, seen: RankObservation) -> RankObservation:
        """Check every field; `misshapen` of an earlier admission stays."""
        output_TH = self._checked("output_TH", seen.output_TH)
        if output_TH is None:
            shape = (self.counts[self.rank], self.config.hidden_size)
            output_TH = torch.full(shape, torch.nan, dtype=self.config.dtype)
        taps = self._taps(seen.taps)
        path = visible(self._or_else("path", seen.path, "", "a str"))
        launches = self._or_else("launches", seen.launches, Counter(), "counts by name")
        misshapen = (*seen.misshapen, *self.found)
        return RankObservation(output_TH, taps, path, launches, misshapen)

    def _taps(self, taps: Any) -> Taps:
        if isinstance(taps, Unreadable):
            self._or_else("taps", taps, None, "Taps")
            return Taps()
        shown = {
            field.name: self._checked(field.name, getattr(taps, field.name))
            for field in fields(taps)
            if getattr(taps, field.name) is not None
        }
        return Taps(**shown)

    def _or_else(self, name: str, value: Any, otherwise: Any, expected: str) -> Any:
        if not isinstance(value, Unreadable):
            return value
        self._report("output", f"{name} is {value}, expected {expected}")
        return otherwise

    def _checked(self, name: str, value: Any) -> Tensor | None:
        """The tensor, ids as int64; None if it is not what the field must be."""
        expected = _EXPECTED[name]
        if not isinstance(value, Tensor):
            what = "None" if value is None else str(value)
            wrong = f"is {what}, expected a dense tensor in memory (to_dense() makes one)"
        elif wrong := self._wrong_shape(tuple(value.shape), expected.axes):
            wrong = f"has shape {tuple(value.shape)}, expected {wrong}"
        elif wrong := self._wrong_dtype(value.dtype, expected.holds):
            wrong = f"holds {value.dtype}, expected {wrong}"
        else:
            return value.cpu().long() if expected.holds == "integers" else value.cpu()
        self._report(expected.stage, f"{name} {wrong}")
        return None

    def _wrong_shape(self, shape: tuple[int, ...], axes: str) -> str:
        """The shape that is expected instead; empty if it is right."""
        rows = shape[0] if shape else 0
        sizes = {
            "T": self.counts[self.rank],
            "H": self.config.hidden_size,
            "K": self.config.num_experts_per_tok,
            "N": max(rows, self.counts[self.rank]),
            "P": self._padded(shape),
            "S": rows,
        }
        expected = tuple(sizes[axis] for axis in axes)
        if shape == expected:
            return ""
        return f"{expected}: {' by '.join(_AXES[axis] for axis in axes)}"

    def _padded(self, shape: tuple[int, ...]) -> int:
        """Rows of a padded tensor: its own if all ranks' fit in, else the fewest that they need."""
        ranks, most = len(self.counts), max(self.counts)
        fits = bool(shape) and shape[0] % ranks == 0 and shape[0] // ranks >= most
        return shape[0] if fits else ranks * most

    def _wrong_dtype(self, dtype: torch.dtype, holds: str) -> str:
        """The dtype that is expected instead; empty if it is right."""
        if holds == "integers":
            return "" if dtype in _INTEGERS else "integers: ids of experts, not their scores"
        if holds == "outputs":
            name = self.contract.output.name
            right = FORMATS.get(dtype) == self.contract.output
            declared = f"{name}, which contract {self.contract.name!r} declares"
            return "" if right else f"{declared}: cast it, or declare another output format"
        if holds == "tokens":
            return "" if dtype is self.config.dtype else f"{self.config.dtype}, as was sent"
        return "" if dtype in FORMATS else "numbers of 16, 32 or 64 bits"

    def _report(self, stage: str, said: str) -> None:
        self.found.append(Finding(stage, self.rank, None, None, f"rank {self.rank}'s {said}"))


# --- what can be read at all --------------------------------------------------------------------


def _readable(observation: object) -> RankObservation:
    """``observation`` in plain tensors, with a word for what is none."""
    if not isinstance(observation, RankObservation):
        return RankObservation(_unreadable(observation))  # type: ignore[arg-type]
    read: dict[str, Any] = {"output_TH": _plain(observation.output_TH)}
    taps: Any = observation.taps
    path: Any = observation.path
    launches: Any = observation.launches
    if isinstance(taps, Taps):
        read["taps"] = Taps(**{f.name: _plain(getattr(taps, f.name)) for f in fields(taps)})
    else:
        read["taps"] = _unreadable(taps)
    read["path"] = path if isinstance(path, str) else _unreadable(path)
    read["launches"] = Counter(launches) if _is_count(launches) else _unreadable(launches)
    return replace(observation, **read)


def _is_count(launches: object) -> bool:
    return isinstance(launches, Mapping) and all(
        isinstance(name, str) and isinstance(count, int) for name, count in launches.items()
    )


def _plain(value: Any) -> Any:
    if value is None:
        return None
    try:
        if not _has_numbers(value):
            return _unreadable(value)
        return value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
    except Exception as error:  # a tensor may be of anyone's making
        return Unreadable(f"a {type(value).__name__} that fails to be read: {error}")


def _has_numbers(value: object) -> bool:
    """Whether ``value`` is a tensor whose elements lie in its own memory, each at its place."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type != "meta"
        and not (value.is_nested or value.is_quantized or _wraps_another(value))
    )


def _wraps_another(value: Tensor) -> bool:
    """Whether a tensor's class computes by itself, on elements that other tensors hold."""
    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _unreadable(value: object) -> Unreadable:
    """Say in words what ``value`` is."""
    if isinstance(value, Unreadable):
        return value
    if not isinstance(value, Tensor):
        return Unreadable(type(value).__name__)
    kinds = {"nested": value.is_nested, "quantized": value.is_quantized}
    kind = "".join(f"{name} " for name, is_so in kinds.items() if is_so)
    return Unreadable(f"a {kind}{type(value).__name__} of layout {value.layout} on {value.device}")
