"""CUDA graphs of anyone's layer, captured and replayed by the judge; on a CPU, their stand-in.

Legend: T tokens of this rank, H hidden_size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twinmoe.optimized.cpu_graph import CpuGraph
from twinmoe.optimized.graph import CudaGraph
from twinmoe.oracle.observation import Taps

#: What a forward returns, once it is known to be an answer.
Answer = tuple[Tensor, Taps]


class PlainGraph:
    """One forward, captured on a batch of zeros: the next batch is what it must answer."""

    def __init__(self, forward: Callable[[Tensor], Answer], hidden_TH: Tensor) -> None:
        self._hidden_TH = torch.zeros_like(hidden_TH)
        self._graph = CudaGraph() if hidden_TH.is_cuda else CpuGraph()
        if hidden_TH.is_cuda:
            _warm_up(lambda: forward(self._hidden_TH))
        with self._graph.capture():
            self._output_TH, self._taps = forward(self._hidden_TH)

    def replay(self, hidden_TH: Tensor) -> Answer:
        """Answer another batch of the same shape; the next replay fills the same taps."""
        self._hidden_TH.copy_(hidden_TH)
        self._graph.replay()
        return self._output_TH.clone(), self._taps

    def poison(self) -> None:
        """Fill the static input and output with NaN."""
        self._hidden_TH.fill_(torch.nan)
        self._output_TH.fill_(torch.nan)


def _warm_up(forward: Callable[[], object]) -> None:
    """Compile kernels and fill caches before the capture, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
