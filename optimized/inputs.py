"""What a layer is made of, and what its forward takes.

Legend: T tokens of this rank, H hidden_size.
"""

import torch
from torch import Tensor

from twinmoe.optimized.triton_runtime import kernels_run_on
from twinmoe.reference.config import ConfigError, MoEConfig
from twinmoe.reference.weights import MoEWeights

#: By the device of the weights: what Triton is in this process, and what to do about it.
_REMEDY = {
    "cpu": "compiled where a CUDA device was found; move them to cuda, or start Python with "
    "TRITON_INTERPRET=1",
    "cuda": "interpreted; move them to cpu, or start Python with TRITON_INTERPRET=0",
}


def check_weights(weights: MoEWeights) -> None:
    """Raise ConfigError unless kernels, which read rows by address, can read these here."""
    device = weights.router_EH.device
    for name, tensor in weights.tensors().items():
        if tensor.device != device or not tensor.is_contiguous():
            raise ConfigError(
                f"{name} with strides {tensor.stride()} on {tensor.device} must be contiguous and "
                f"on {device}, where router_EH is: kernels read its rows by address; pass "
                f"{name}.to({str(device)!r}).contiguous()"
            )
    check_kernels(device)


def check_kernels(device: torch.device) -> None:
    """Raise ConfigError unless this process' kernels reach ``device``."""
    if not kernels_run_on(device):
        raise ConfigError(
            f"weights on {device} have no kernels in this process: Triton runs either compiled on "
            "CUDA or interpreted on a CPU, and is "
            + _REMEDY.get(device.type, "neither elsewhere; move them to cuda or cpu")
        )


def check_cuda(config: MoEConfig, device: torch.device) -> None:
    """Raise ConfigError where this process' CUDA settings would change what the layer computes."""
    if device.type != "cuda":
        return
    current = torch.cuda.current_device()
    if device.index != current:
        raise ConfigError(
            f"weights on {device} are not on the current device (cuda:{current}), where kernels "
            f"are launched: call torch.cuda.set_device({device.index}) first"
        )
    precision = torch.backends.cuda.matmul.fp32_precision
    if config.dtype is torch.float32 and precision == "tf32":
        raise ConfigError(
            f"dtype (torch.float32) is not kept by matrix products of fp32_precision "
            f"({precision!r}): they cut operands to 11 bits; call "
            "torch.set_float32_matmul_precision('highest')"
        )


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
