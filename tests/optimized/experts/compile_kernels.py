"""Not a test: compiles every kernel of router and experts for sm_90, without a GPU.

Run with TRITON_INTERPRET=0, as a program of its own, since Triton decides between
interpreter and compiler once per process.  Forwards run on CPU tensors with launches
recorded instead of started, so that what is compiled are the launches of the real
code: its tiles, its constants, its argument types.  Prints one JSON object, the
matrix and copy instructions in the PTX of each kernel.
"""

import json
import re
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twinmoe.optimized.experts import slots
from twinmoe.optimized.experts.choice import BACKENDS
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.optimized.triton_runtime import INTERPRETED, triton
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")
INSTRUCTIONS = re.compile(r"wgmma\.mma_async|mma\.sync|cp\.async\.cg")

MIXTRAL = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 512,
    "swiglu_limit": 7.0,
}
DEEPSEEK = {
    "num_experts": 160,
    "num_experts_per_tok": 6,
    "hidden_size": 1024,
    "n_group": 8,
    "topk_group": 3,
    "scoring_func": "sigmoid",
    "use_correction_bias": True,
}
ODD = {
    "num_experts": 3,
    "num_experts_per_tok": 3,
    "hidden_size": 77,
    "hidden_act": "relu2",
    "gated": False,
}
#: Label: settings, and rows: 8 decode, 600 fill tiles of 64 rows.
LAYERS: dict[str, tuple[dict[str, Any], int]] = {
    "decode": (MIXTRAL, 8),
    "prefill": (MIXTRAL, 600),
    "grouped": (DEEPSEEK, 8),
    "odd": (ODD, 5),
    "on_input": (MIXTRAL | {"router_weight_on_input": True, "hidden_act": "gelu"}, 8),
    "fp32": (MIXTRAL | {"dtype": torch.float32, "scoring_func": "sqrtsoftplus"}, 8),
}


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Compile one recorded launch; return the instructions of interest in its PTX."""
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name not in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in kwargs or value is None:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return set(INSTRUCTIONS.findall(ptx))


def compile_layer(settings: dict[str, Any], rows: int) -> dict[str, list[str]]:
    """Compile what one layer launches, router and every backend that supports it."""
    config = MoEConfig(**({"moe_intermediate_size": 256} | settings))
    weights = MoEWeights.random(config, 0)
    recorded: list[Any] = []
    for module in (
        "router",
        "experts.slots",
        "experts.activation",
        "experts.combine",
        "experts.fused",
    ):
        _record_launches(f"twinmoe.optimized.{module}", recorded)
    # What a kernel would have filled, and what PyTorch then indexes with.
    slots._sections = lambda sizes, _device: [torch.zeros(n, dtype=torch.int32) for n in sizes]
    x_MH = torch.zeros(rows, config.hidden_size, dtype=config.dtype)
    routing = InferenceTopKRouter(config, weights)(x_MH, torch.tensor(rows, dtype=torch.int32))
    routing.ids_TK.zero_()
    for backend in BACKENDS.values():
        if backend.unsupported(config, x_MH.device) is None:
            experts = backend(config, weights, 0)
            experts.forward(x_MH, routing.ids_TK, routing.weights_TK, torch.empty_like(x_MH))
    return {kernel.fn.__name__: sorted(compiled(kernel, a, k)) for kernel, a, k in recorded}


def _record_launches(module: str, recorded: list[Any]) -> None:
    namespace = __import__(module, fromlist=["launch"]).__dict__
    namespace["launch"] = lambda kernel, _grid, *args, **kwargs: recorded.append(
        (kernel, args, kwargs)
    )


if __name__ == "__main__":
    assert not INTERPRETED, "run with TRITON_INTERPRET=0"
    print(json.dumps({name: compile_layer(*layer) for name, layer in LAYERS.items()}))
