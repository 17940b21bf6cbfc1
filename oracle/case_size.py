"""How much memory a case's tensors take, before any of them is made."""

from collections.abc import Sequence

from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.layout import expected_tensors

#: More than any layer in one machine: 40 times the experts of a DeepSeek-V3 layer.
MAX_BYTES = 2**40


def check_size(config: MoEConfig, tokens: Sequence[int], batches: Sequence[int]) -> None:
    """Raise ConfigError for weights and hidden states that no machine holds."""
    weights = 0
    for spec in expected_tensors(config, config.num_experts).values():
        elements = spec.dtype.itemsize
        for size in spec.shape:
            elements *= size
        weights += elements
    rows = max(sum(tokens), len(tokens) * max(batches, default=0))
    width = max(config.hidden_size, config.num_experts)
    hidden = rows * width * config.accumulate_dtype.itemsize
    if weights + hidden > MAX_BYTES:
        raise ConfigError(
            f"the case needs {_bytes(weights)} for weights and {_bytes(hidden)} for the tokens of "
            f"{len(tokens)} rank(s): more than {_bytes(MAX_BYTES)}, which nobody has; use "
            "smaller sizes"
        )


def _bytes(count: int) -> str:
    return f"{count:_} bytes" if count < 10**18 else f"more than 2**{count.bit_length() - 1} bytes"
