"""The shared expert for inference: tensor cores with fp32 results, beside the routed experts.

Legend: T tokens, H hidden_size, F rows of the shared w13, I its intermediate size.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from twinmoe.optimized.experts.activation import activate
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.shared_expert import SharedExpertMLP
from twinmoe.reference.weights import MoEWeights


class InferenceSharedExpert(SharedExpertMLP):
    """Rounds where the reference rounds, without widening the weights at every call.

    GEMMs return fp32 and are rounded once: a library that splits a sum over
    multiprocessors may otherwise round its parts.  On a CPU it is the reference.
    """

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__(config, weights)
        size = config.shared_expert_intermediate_size
        self._as_routed = replace(config, moe_intermediate_size=size)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return [T, H] as the reference does, in the config's dtype where nothing gates it."""
        if x_TH.device.type != "cuda" or len(x_TH) == 0:
            return super().forward(x_TH)
        num_rows = torch.full((1,), len(x_TH), dtype=torch.int32, device=x_TH.device)
        gate_up_TF = _matmul(x_TH, self.w13_FH)
        h_TI = activate(self._as_routed, gate_up_TF, num_rows)
        y_TH = _matmul(h_TI, self.w2_HI).to(self.config.dtype)
        if self.gate_1H is None:
            return y_TH
        wide = self.config.accumulate_dtype
        return _matmul(x_TH, self.gate_1H).sigmoid() * y_TH.to(wide)


def _matmul(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """Multiply x by the transpose of w, with a result in fp32."""
    if x_TK.dtype is torch.float32:
        return x_TK @ w_NK.T
    return torch.mm(x_TK, w_NK.T, out_dtype=torch.float32)


class SideStream:
    """A stream beside the current one; on a CPU, work simply runs when it is started."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Begin ``compute`` after all that was launched so far.

        The function returned makes the current stream wait for the result, and gives it; call it
        once, in the same capture if there is one.
        """
        side = self._stream
        if side is None:
            result = compute()
            return lambda: result
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                result = compute()
        except Exception:
            # a capture that ends with a stream astray would hide this error
            torch.cuda.current_stream().wait_stream(side)
            raise

        def join() -> Tensor:
            current = torch.cuda.current_stream()
            current.wait_stream(side)
            # Its memory belongs to the side stream, which must not reuse it before its readers.
            result.record_stream(current)
            return result

        return join
