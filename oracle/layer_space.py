"""Which of all layers, and which stories around them, one's own implementation can run.

A drawn case is made to fit, not thrown away: settings that an implementation does not read
take their neutral values, so that every draw is a trial.
"""

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any, TypeVar

from twinmoe.oracle.case import Case
from twinmoe.oracle.relations import RELATIONS
from twinmoe.oracle.session import other_shape
from twinmoe.reference.config import MoEConfig

Narrow = Callable[[MoEConfig], MoEConfig]
Factory = TypeVar("Factory", bound=Callable[..., object])

#: Settings that every layer has.
SIZES = (
    *("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    *("dtype", "router_dtype"),
)

#: Settings of which one value is legal.
_CONSTANT = (
    *("expert_tensor_parallel_size", "moe_expert_capacity_factor"),
    "moe_pad_expert_input_to_capacity",
)

#: Settings that an implementation may or may not read: what a layer *means*.
SEMANTICS = tuple(
    field.name for field in fields(MoEConfig) if field.name not in (*SIZES, *_CONSTANT)
)

#: Steps of a history that anyone's layer can be asked, or its judge in its place; the others
#: choose between this project's own paths, and fill padding that is theirs.
_STEPS = "fcdnkwlp"

_ATTRIBUTE = "__twinmoe_narrow__"


def neutral(config: MoEConfig, *, reads: tuple[str, ...] = (), **fixed: Any) -> MoEConfig:
    """``config`` with every setting of meaning at its default, but for ``reads`` and ``fixed``.

    The defaults are Mixtral's: softmax, renormalised weights, SwiGLU, no groups, no shared
    expert.  ``reads`` names the settings that stay as drawn.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in fields(config)}
    settings = {name: defaults[name] for name in SEMANTICS if name not in reads}
    return replace(config, **(settings | fixed))


def runs(narrow: Narrow) -> Callable[[Factory], Factory]:
    """Declare what a factory's layers run: ``narrow`` takes any config to one of those.

    ``narrow(narrow(c)) == narrow(c)``; a factory without a declaration gets ``neutral``.
    """

    def declare(factory: Factory) -> Factory:
        setattr(factory, _ATTRIBUTE, narrow)
        return factory

    return declare


def narrow_of(factory: Callable[..., object]) -> Narrow:
    """What a factory declared with :func:`runs`."""
    narrow: Narrow = getattr(factory, _ATTRIBUTE, neutral)
    return narrow


def fitted(case: Case, narrow: Narrow) -> Case:
    """``case`` as one that a plain layer of ``narrow`` can be asked: its only path, its settings.

    Of a history, steps that choose between our own paths or fill their padding are dropped, and
    another layer beside this one is, where it is not of that space; a relation stays if the
    changed layers are of it too.
    """
    config = narrow(case.config)
    other = other_shape(replace(case, config=config))
    plain = replace(
        case,
        config=config,
        transport="alltoall",
        mode="eager",
        backend="auto",
        wire="fp32",
        bias=case.bias if _biased(config, case.bias) else "mixed",
        padding="stale",
        history=_played(case.history, beside=narrow(other.config) == other.config),
        relation="",
    )
    plain = replace(plain, batches=plain.batches[: plain.last_batch])
    if not case.relation:
        return plain
    relation = RELATIONS[case.relation]
    if not relation.applies(plain):
        return plain
    changed = [change.config(config) for change in relation.changes(plain)]
    return replace(plain, relation=case.relation) if all(narrow(c) == c for c in changed) else plain


def _biased(config: MoEConfig, bias: str) -> bool:
    """Whether the choice is clear that such biases leave: NaN has no place in everyone's order.

    Nor has an expert that is disabled, beside those of groups that are left out.
    """
    if not config.use_correction_bias or bias in ("nan", "disabled_nan"):
        return False
    return bias != "disabled" or config.n_group == 1


def _played(history: str, beside: bool) -> str:
    kinds = _STEPS + "o" * beside
    words = [word for word in history.split(".") if word and word[0] in kinds]
    return ".".join(words) if len(words) > 1 else ""


def standing_still(configs: Collection[MoEConfig]) -> dict[str, Any]:
    """Settings that had one value in all layers: a check says nothing about other values."""
    seen = {name: {getattr(config, name) for config in configs} for name in SEMANTICS}
    return {name: next(iter(values)) for name, values in seen.items() if len(values) == 1}
