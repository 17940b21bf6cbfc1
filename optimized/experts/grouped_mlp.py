"""InferenceGroupedMLP: this rank's experts, on the routing map of all ranks' tokens.

Shapes: M rows (all ranks' tokens), K experts per row, S dispatched rows, H hidden_size.
"""

from pathlib import Path

import torch
from torch import Tensor

from twinmoe.optimized.experts.choice import AUTO, choose_backend
from twinmoe.optimized.inputs import check_kernels
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights


class InferenceGroupedMLP:
    """The experts of one rank, computed by the backend that suits layer and device.

    ``backend_name`` says which one that is, and ``backend_why`` why.  Every shape is fixed by
    the inputs' shapes, and nothing synchronises with the host (``flashinfer`` does, when it meets
    a number of rows for the first time), so a CUDA graph can capture a call.

    weights_local: this rank's shard.  backend: a name of ``choice.BACKENDS``, or "auto", which
    goes by the measurements in ``record`` (see ``choose_backend``).

    Raises ConfigError if the weights are not the rank's own experts, if the backend
    is unknown or cannot run this layer here, and if the record cannot be read.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights_local: MoEWeights,
        placement: Placement,
        rank: int,
        backend: str = AUTO,
        record: Path | None = None,
    ) -> None:
        owned = placement.experts_of(rank)
        if weights_local.experts != owned:
            raise ConfigError(
                f"weights of experts {weights_local.experts} do not belong on rank {rank}: it owns "
                f"{owned}; pass weights.shard(placement, {rank})"
            )
        device = weights_local.w2_LHI.device
        check_kernels(device)
        choice = choose_backend(backend, config, device, ranks=placement.ep_size, record=record)
        self.backend_name, self.backend_why = choice.backend.name, choice.why
        self._backend = choice.backend(config, weights_local, owned.start)

    def __call__(self, x_MH: Tensor, ids_MK: Tensor, weights_MK: Tensor, out_MH: Tensor) -> None:
        """See ``forward``."""
        self.forward(x_MH, ids_MK, weights_MK, out_MH)

    def forward(self, x_MH: Tensor, ids_MK: Tensor, weights_MK: Tensor, out_MH: Tensor) -> None:
        """Write to ``out_MH`` each row's weighted sum over this rank's experts.

        x_MH: [M, H] in the model dtype.  ids_MK: int32 or int64 global expert ids, -1 in
        padding rows, whose contents are never computed on.  weights_MK: fp32.  out_MH:
        [M, H], fp32 or the model dtype, may hold anything; every element is written,
        exact zeros in rows without a local expert.  The sum is taken in fp32 in the
        order of k and rounded once (``flashinfer`` rounds its terms and the sum to the
        model dtype, whatever out_MH is).  All contiguous.

        Raises ValueError for a tensor that is not contiguous.
        """
        for name, tensor in (
            ("x", x_MH),
            ("ids", ids_MK),
            ("weights", weights_MK),
            ("out", out_MH),
        ):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{name} with strides {tensor.stride()} must be contiguous: the kernels index "
                    "it by row; pass a contiguous tensor"
                )
        self._backend.forward(x_MH, ids_MK, weights_MK, out_MH)

    def expert_rows(self, x_SH: Tensor, local_expert_S: Tensor) -> Tensor:
        """Return the unweighted expert output of each already dispatched row.

        x_SH: [S, H] contiguous, in the model dtype.  local_expert_S: [S], every one a
        local id in [0, L).  The result is [S, H] in ``rows_dtype``.
        """
        return self._backend.expert_rows(x_SH, local_expert_S)

    @property
    def rows_dtype(self) -> torch.dtype:
        """Dtype of ``expert_rows``: fp32 from ``triton``, the model dtype from the others."""
        return self._backend.rows_dtype

    def refresh(self) -> None:
        """Follow weights that were overwritten in place; a captured graph stays valid."""
        self._backend.refresh()
