"""Graph capture by bucket, and replay with new inputs, routing and token counts.

Legend: T this rank's tokens, N rows of the bucket, H hidden_size.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from twinmoe.optimized import launch
from twinmoe.optimized.communication.agreement import (
    all_or_none,
    describe,
    exchange,
    raise_failure,
)
from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.cpu_graph import CpuGraph
from twinmoe.optimized.inputs import check_hidden
from twinmoe.optimized.layer import MoELayer


class CudaGraph:
    """A CUDA graph that keeps the launch counters true: a replay repeats the launches."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._launches: Counter[str] = Counter()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record on a side stream; a host synchronisation inside raises."""
        before = launch.COUNTS.copy()
        try:
            with torch.cuda.graph(self._graph):
                yield
        finally:
            self._launches = launch.COUNTS - before
            launch.COUNTS.subtract(self._launches)  # capturing launches nothing

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()
        launch.COUNTS.update(self._launches)


@dataclass
class _Captured:
    """One bucket's graph and the static tensors it reads and writes."""

    graph: CpuGraph | CudaGraph
    generation: int
    hidden_NH: Tensor
    num_valid: Tensor
    output_NH: Tensor
    replays: int = 0
    taps: dict[str, Tensor] = field(default_factory=dict)


class GraphRunner:
    """Runs a MoELayer's graphed path: pad to a bucket, replay, cut the padding off.

    ``buckets`` are row counts per rank, ascending.  All ranks use the bucket of the rank
    with the most tokens, so that every rank replays the same collectives; a rank with
    few or no tokens pads.  Graphs are captured on first use, by all ranks together, and again
    where their symmetric memory was replaced.
    """

    def __init__(self, layer: MoELayer, buckets: tuple[int, ...]) -> None:
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise ValueError(
                f"buckets {buckets} must be distinct positive row counts in ascending order: "
                "a batch takes the first bucket that holds it"
            )
        capacity = layer.options.max_tokens_per_rank
        if buckets[-1] > capacity:
            raise ValueError(
                f"bucket {buckets[-1]} exceeds max_tokens_per_rank ({capacity}): the symmetric "
                "buffers were sized for that many rows; raise it in InferenceOptions"
            )
        self.layer = layer
        self.buckets = buckets
        self._captured: dict[tuple[int, Tier], _Captured] = {}
        self.last: _Captured | None = None
        self.last_bucket: int | None = None

    @torch.no_grad()
    def __call__(self, hidden_TH: Tensor, max_tokens: int | None = None) -> Tensor:
        """Run T valid rows [T, H]; returns [T, H], a copy out of the static buffer.

        ``max_tokens``: the largest T over all ranks, where the caller's scheduler knows
        it; None asks the group, which costs one small collective on the host.  All ranks
        pass the same: given numbers are believed, and ranks that believe different ones
        replay graphs of different sizes, which ends in a hang or in wrong numbers.

        Raises ValueError, on all ranks, if no bucket holds the batch; and on this rank
        for hidden states that do not fit the layer, or more of them than ``max_tokens``.
        Such a rank keeps nobody waiting: having been asked, its peers raise PeerError; with
        ``max_tokens`` given nobody may ask, and it replays with no tokens before it raises,
        so that its peers' answers stand.  A failed capture raises on all ranks, PeerError
        where it did not fail.  Who waits for a rank that died gives up in the end (see
        ``communication/patience.py``): PeerTimeout, here or from ``layer.check_peers()``.
        """
        refusal = self._refusal(hidden_TH, max_tokens)
        if refusal is not None and self.layer.group is None:
            raise refusal
        tokens = len(hidden_TH) if refusal is None else 0
        if max_tokens is None:
            max_tokens = self._largest(tokens, refusal)
        bucket = self.bucket_for(max_tokens)
        captured = self.capture(bucket)
        if refusal is None:
            captured.hidden_NH[:tokens].copy_(hidden_TH)
        captured.num_valid.fill_(tokens)
        captured.graph.replay()
        self.layer.check_peers()
        captured.replays += 1
        self.last, self.last_bucket = captured, bucket
        if refusal is not None:
            raise refusal
        return captured.output_NH[:tokens].clone()

    def static_tensors(self) -> list[Tensor]:
        """What captured graphs read or write at fixed addresses, apart from weights and counts."""
        return [
            tensor
            for captured in self._captured.values()
            for tensor in (captured.hidden_NH, captured.output_NH, *captured.taps.values())
        ]

    def bucket_for(self, tokens: int) -> int:
        """The smallest bucket that holds ``tokens`` rows."""
        for bucket in self.buckets:
            if tokens <= bucket:
                return bucket
        raise ValueError(
            f"{tokens} tokens on a rank exceed the largest bucket ({self.buckets[-1]}): "
            "add a bucket or split the batch"
        )

    def capture(self, bucket: int) -> _Captured:
        """The graph of ``bucket`` under the layer's current transport and its memory."""
        transport = self.layer.transport
        key = (bucket, transport.tier)
        captured = self._captured.get(key)
        if captured is None or captured.generation != transport.generation:
            captured = self._captured[key] = self._capture(bucket)
        return captured

    # Tensors made in inference mode could never be written outside it again, replays included.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, bucket: int) -> _Captured:
        config, device = self.layer.config, self.layer.device
        doing, group = f"to capture a graph of {bucket} rows", self.layer.group
        with all_or_none(doing, group):  # before the first collective that waits for all
            hidden_NH = torch.zeros(bucket, config.hidden_size, dtype=config.dtype, device=device)
            num_valid = torch.zeros(1, dtype=torch.int32, device=device)
        transport = self.layer.transport
        try:
            with all_or_none(doing, group), self.layer.graphed():
                self._warm_up(hidden_NH, num_valid)
                graph = CudaGraph() if device.type == "cuda" else CpuGraph()
                with graph.capture():
                    output_NH = self.layer(hidden_NH, num_valid)
        except Exception:
            transport.mistrust()
            raise
        taps = dict(self.layer.taps or {})
        return _Captured(graph, transport.generation, hidden_NH, num_valid, output_NH, taps=taps)

    def _warm_up(self, hidden_NH: Tensor, num_valid: Tensor) -> None:
        """Compile kernels and fill caches before recording; a CPU has neither."""
        if hidden_NH.device.type == "cpu":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.layer(hidden_NH, num_valid)
        torch.cuda.current_stream().wait_stream(stream)

    def _refusal(self, hidden_TH: Tensor, max_tokens: int | None) -> Exception | None:
        """Why this rank cannot run the batch."""
        try:
            check_hidden(hidden_TH, self.layer.config, self.layer.device)
        except Exception as error:  # whatever was passed, the peers must hear of it
            return error
        tokens = len(hidden_TH)
        if max_tokens is None or tokens <= max_tokens:
            return None
        return ValueError(
            f"max_tokens ({max_tokens}) must be the largest count of all ranks, but this rank has "
            f"{tokens} tokens: ranks would take different buckets; pass the maximum or None"
        )

    def _largest(self, tokens: int, refusal: Exception | None) -> int:
        """The most tokens of any rank; raises, on all ranks, if one has a ``refusal``."""
        group = self.layer.group
        if group is None:
            return tokens
        count = torch.tensor([tokens, refusal is not None], device=self.layer.device)
        launch.run("largest_batch", lambda: self._maximum(count))
        most, refused = count.tolist()
        if refused:
            raise_failure(refusal, exchange(describe(refusal), group))
        return int(most)

    def _maximum(self, count: Tensor) -> None:
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self.layer.group)
