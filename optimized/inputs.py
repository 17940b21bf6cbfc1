"""What a forward of the layer takes.

Legend: T tokens of this rank, H hidden_size.
"""

import torch
from torch import Tensor

from twinmoe.reference.config import MoEConfig


def check_hidden(hidden_TH: Tensor, config: MoEConfig, device: torch.device) -> None:
    """Raise ValueError unless these are [tokens, hidden_size], stored as the weights are."""
    shaped = hidden_TH.dim() == 2 and hidden_TH.shape[1] == config.hidden_size
    if not shaped or hidden_TH.dtype is not config.dtype or hidden_TH.device != device:
        raise ValueError(
            f"hidden states of shape {tuple(hidden_TH.shape)} and {hidden_TH.dtype} on "
            f"{hidden_TH.device} do not fit the layer: rows are multiplied as they are; pass "
            f"[tokens, {config.hidden_size}] in {config.dtype} on {device}"
        )


def check_num_valid(num_valid: Tensor | None, device: torch.device, *, is_graphed: bool) -> None:
    """Raise ValueError unless this is a row count that the layer's path can read, or None."""
    if num_valid is None:
        return
    if not is_graphed:
        raise ValueError(
            "num_valid is for the graphed path: the eager path takes exactly the valid rows; "
            "slice them, or call set_inference_cuda_graphed_iteration() first"
        )
    is_integer = num_valid.dtype in (torch.int32, torch.int64)
    if num_valid.numel() != 1 or not is_integer or num_valid.device != device:
        raise ValueError(
            f"num_valid of shape {tuple(num_valid.shape)} and {num_valid.dtype} on "
            f"{num_valid.device} is no row count: kernels read one integer; pass one int32 or "
            f"int64 on {device}"
        )
