"""Case: the description of one trial, as one line that round-trips.

Hypothesis draws descriptions, never tensors: tensors follow from the description's seed,
on any machine.  ``T=3/0/5,H=96,I=64,E=6,k=2,dtype=bf16,...`` is both what a report prints
and what ``twinmoe replay`` reads.
"""

from dataclasses import dataclass, fields
from typing import Any

from twinmoe.oracle.case_size import check_size
from twinmoe.oracle.history import HistoryError, Step, parse
from twinmoe.oracle.magnitudes import MAGNITUDES
from twinmoe.reference.config import DTYPES, ConfigError, MoEConfig, dtype_name

#: Short names of the configuration in a line; other settings keep their full names.
_SHORT = {
    "hidden_size": "H",
    "moe_intermediate_size": "I",
    "num_experts": "E",
    "num_experts_per_tok": "k",
    "shared_expert_intermediate_size": "shared",
    "routed_scaling_factor": "rsf",
}
_LONG = {short: name for name, short in _SHORT.items()}

#: Legal values of each axis, the neutral one first.
TRANSPORTS = ("p2p", "nvls", "gloo", "nccl", "alltoall")
MODES = ("eager", "graphed", "replayed")
WIRES = ("fp32", "model")
VALUES = ("normal", "positive", "outlier", "recorded", "integers")
ROUTINGS = (
    *("free", "one_expert", "one_rank", "ties", "equal", "near_ties", "silent"),
    "alternating",
)
BIASES = ("mixed", "negative", "large", "nan", "fine", "disabled", "disabled_nan")
LAYOUTS = ("plain", "strided")
PADDINGS = ("stale", "nan")

#: Leaves room to derive one 64-bit seed for each rank and batch.
MAX_SEED = 2**32 - 1

_AXES = {
    "transport": TRANSPORTS,
    "mode": MODES,
    "wire": WIRES,
    "values": VALUES,
    "magnitude": MAGNITUDES,
    "routing": ROUTINGS,
    "bias": BIASES,
    "layout": LAYOUTS,
    "padding": PADDINGS,
}


class CaseError(ValueError):
    """A case line, or a combination in it, that means nothing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trial: a layer, a batch, the path to take, and how to draw the numbers.

    ``tokens`` per rank, so its length is the expert-parallel size.  ``transport``
    "alltoall" is the layer outside graphs; the others are tiers of the graphed path.
    ``mode``: "eager" runs that path once, "graphed" captures and replays it on the same
    input, "replayed" replays after another batch.  ``wire`` is the payload of the
    reduce-scatter.  ``values``, ``routing``, ``bias``, ``layout`` and ``padding`` say what
    the tensors look like, ``magnitude`` how large they are (:mod:`twinmoe.oracle.magnitudes`).
    ``history`` is a program of steps around the judged forwards
    (:mod:`twinmoe.oracle.history`), ``relation`` names a change of layer or batch whose
    effect is known (:mod:`twinmoe.oracle.relations`); ``fault`` names a planted fault.
    ``batches`` are sizes of the history's batches 1, 2, ...: tokens on the rank that has most
    (:func:`twinmoe.oracle.inputs.tokens_at`).
    """

    config: MoEConfig
    tokens: tuple[int, ...]
    transport: str = "p2p"
    mode: str = "eager"
    backend: str = "auto"
    wire: str = "fp32"
    values: str = "normal"
    magnitude: str = "usual"
    routing: str = "free"
    bias: str = "mixed"
    layout: str = "plain"
    padding: str = "stale"
    seed: int = 0
    history: str = ""
    relation: str = ""
    fault: str = ""
    batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for axis, legal in _AXES.items():
            value = getattr(self, axis)
            if value not in legal:
                raise CaseError(f"{axis} ({value!r:.80}) is unknown: use one of {', '.join(legal)}")
        if not self.tokens or min(self.tokens) < 0:
            raise CaseError(
                f"T ({self.tokens}) must give a count of at least 0 for every rank: write T=3/0/5 "
                "for three ranks"
            )
        if self.batches and min(self.batches) < 1:
            raise CaseError(
                f"batches ({self.batches}) must be counts of at least 1: write batches=63/65 for "
                "batch 1 of 63 tokens on its fullest rank and batch 2 of 65"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise CaseError(
                f"seed ({self.seed}) must be in 0 .. {MAX_SEED}: every rank and batch derives its "
                "own seed from it; use one of these"
            )
        if self.transport == "alltoall" and self.mode != "eager":
            raise CaseError(
                f"mode ({self.mode!r}) needs a graph, which alltoall dispatch cannot have: its "
                "split sizes are read on the host; use mode=eager"
            )
        if self.history and self.relation:
            raise CaseError(
                f"history ({self.history!r}) and relation ({self.relation!r}) are both given: a "
                "case tells one story; drop one of them"
            )
        try:
            self.steps()
        except HistoryError as error:
            raise CaseError(str(error)) from None
        self.config.check_ep_size(self.ep_size)
        check_size(self.config, self.tokens, self.batches)

    def steps(self) -> tuple[Step, ...]:
        """The history as a program; what ``mode`` says where none is given."""
        return parse(self.history or ("f1.f0" if self.mode == "replayed" else "f0"))

    def path(self, kind: str) -> str:
        """The path of a forward step of this kind: the case's own, or the one that the step names.

        As in a :class:`twinmoe.oracle.subject.Call`.  An AlltoAll case has no graphed path.
        """
        if kind == "c":
            return "captured"
        if kind == "a" or self.transport == "alltoall":
            return "alltoall"
        return "graphed" if kind == "g" or self.mode == "eager" else "captured"

    @property
    def last_batch(self) -> int:
        """The highest number of a batch that a forward takes."""
        return max(step.number for step in self.steps() if step.is_forward)

    @property
    def ep_size(self) -> int:
        """Number of ranks."""
        return len(self.tokens)

    def __str__(self) -> str:
        """Return the line: the batch, the layer where it is not neutral, then the rest."""
        parts = ["T=" + "/".join(map(str, self.tokens))]
        for field in fields(MoEConfig):
            value = getattr(self.config, field.name)
            if field.name in _SHORT and field.default is not value and value != field.default:
                parts.append(f"{_SHORT[field.name]}={value}")
            elif field.name == "dtype" or value != field.default:
                parts.append(f"{_SHORT.get(field.name, field.name)}={_show(value)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("config", "tokens") and value != field.default:
                parts.append(f"{field.name}={_show(value)}")
        return ",".join(parts)

    @classmethod
    def parse(cls, line: str) -> "Case":
        """Read a line back.

        Raises CaseError for a malformed part or an unknown key, ConfigError for a layer
        that contradicts itself.
        """
        settings: dict[str, Any] = {}
        own: dict[str, Any] = {}
        seen: set[str] = set()
        names = {field.name for field in fields(cls)} - {"config", "tokens"}
        config_names = {field.name for field in fields(MoEConfig)}
        for part in filter(None, map(str.strip, line.split(","))):
            key, equals, text = part.partition("=")
            name = _LONG.get(key, key)
            if not equals:
                raise CaseError(f"{part!r:.80} is not key=value: separate parts with commas")
            if name in seen:
                raise CaseError(f"{key!r:.80} is given twice: a key has one value; drop one")
            seen.add(name)
            if key == "T":
                own["tokens"] = _counts(key, text)
            elif key == "batches":
                own["batches"] = _counts(key, text)
            elif name in names:
                own[name] = _number(key, text, int) if name == "seed" else text
            elif name in config_names:
                settings[name] = _setting(key, name, text)
            else:
                raise CaseError(
                    f"{key!r:.80} is not a key of a case: use T, {', '.join(_LONG)}, "
                    f"{', '.join(sorted(names))} or a setting of MoEConfig"
                )
        if "tokens" not in own:
            raise CaseError(f"{line!r:.200} gives no tokens: add T=3/0/5, one count per rank")
        return cls(config=MoEConfig.from_dict(settings), **own)


def _show(value: Any) -> str:
    if value in DTYPES.values():
        return dtype_name(value)
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def _counts(key: str, text: str) -> tuple[int, ...]:
    return tuple(_number(key, count, int) for count in text.split("/"))


def _number(key: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise CaseError(f"{key}={text!r:.80} is not {kind.__name__}: write a number") from None


def _setting(key: str, name: str, text: str) -> Any:
    """A configuration value from its text, by the type of the field's annotation."""
    kind = {field.name: field.type for field in fields(MoEConfig)}[name]
    if kind in (int, "int"):
        return _number(key, text, int)
    if kind in (bool, "bool"):
        if text not in ("0", "1"):
            raise CaseError(f"{key}={text!r} is not a switch: write 0 or 1")
        return text == "1"
    if "float" in str(kind):
        return None if text == "None" else _number(key, text, float)
    return text


__all__ = ["Case", "CaseError", "ConfigError"]
