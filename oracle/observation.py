"""What a subject shows the judge: outputs, optional taps, and what really ran.

Taps let the judge name the stage at fault.  A subject without taps is judged by its
output alone.  All tensors hold the rank's valid rows only, except the ``gathered_*``
and ``partial`` taps, which hold the padded rows of every rank as the kernels see them, and
``routed_ids`` / ``routed_weights``, which hold those of this rank.

Legend: T tokens of this rank, H hidden_size, K experts per token, N padded rows of one
rank, R ranks, S rows received.
"""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from twinmoe.oracle.verdict import Finding

#: Begins the path of anyone's layer, of whose collectives the judge knows nothing.
PLAIN_PATH = "plain: "


@dataclass(frozen=True)
class Taps:
    """Intermediate tensors of one forward; None where the path has no such tensor.

    ``ids_TK`` / ``weights_TK`` the router's answer; ``routed_ids`` / ``routed_weights`` the same
    with its padding rows, [N, K]; ``gathered_*`` what this rank received from the all-gather,
    [R*N, ...]; ``received_hidden`` [S, H] and ``received_ids`` [S] (ids among this rank's own
    experts) what it received from an AlltoAll, and ``sent_TKH`` the rows that it sent, where they
    are not the tokens themselves; ``expert_output_TKH`` each slot's expert output back at its
    owner (AlltoAll paths); ``partial`` this rank's share of every row, [R*N, H]; ``routed_TH``
    the sum over ranks, before shared expert and rounding.
    """

    ids_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    gathered_hidden: Tensor | None = None
    gathered_ids: Tensor | None = None
    gathered_weights: Tensor | None = None
    expert_output_TKH: Tensor | None = None
    partial: Tensor | None = None
    routed_TH: Tensor | None = None
    routed_ids: Tensor | None = None
    routed_weights: Tensor | None = None
    sent_TKH: Tensor | None = None
    received_hidden: Tensor | None = None
    received_ids: Tensor | None = None


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that is no tensor of numbers in memory: what it was, in words."""

    what: str

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class RankObservation:
    """One rank's answer to one forward: ``output_TH`` in the model's dtype.

    ``path`` is the subject's claim of what ran, in words; ``launches`` what was counted
    while it ran, by kernel or collective name.  ``misshapen``: the fields that the judge could
    not admit, which are then left out (see :mod:`twinmoe.oracle.admission`).
    """

    output_TH: Tensor
    taps: Taps = field(default_factory=Taps)
    path: str = ""
    launches: Counter[str] = field(default_factory=Counter)
    misshapen: tuple[Finding, ...] = ()
