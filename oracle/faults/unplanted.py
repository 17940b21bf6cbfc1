"""The catalogue's rows that are not planted, and why not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unplanted:
    """A public fault that has no place in this layer: ``source`` and ``what`` as of a Fault."""

    source: str
    what: str
    reason: str


_FP8 = "fp8 experts are not built in the optimized twin"
_REPLICAS = "expert replicas (EPLB) are not built"
_TENSOR_PARALLEL = "expert tensor parallelism is not built: a group's ranks share out experts only"
_BIASES = "expert biases are not built: an expert has two matrices and nothing else"

#: By row of the catalogue.
UNPLANTED: dict[str, Unplanted] = {
    "DP03": Unplanted(
        "ggml-org/llama.cpp#26295, ggml-org/llama.cpp#24591",
        "the second slot of an expert that a token names twice is lost",
        "the router never names an expert twice and no routing table can be passed in",
    ),
    "EX11": Unplanted(
        "NVIDIA-NeMo/Automodel#2591",
        "the bias of the down projection is added without the router's weight",
        _BIASES,
    ),
    "CB06": Unplanted(
        "vllm-project/tpu-inference#3435",
        "the shared expert's partial sums are never reduced over tensor parallel ranks",
        _TENSOR_PARALLEL,
    ),
    "CB08": Unplanted(
        "Avarok-Cybersecurity/atlas#240",
        "outputs are summed over ranks that each computed all experts",
        "replicated experts are not built: with several ranks, each owns its part",
    ),
    "CB09": Unplanted(
        "sgl-project/sglang#32963",
        "with expert and tensor parallelism together, the sum covers the expert ranks only",
        _TENSOR_PARALLEL,
    ),
    "GR09": Unplanted(
        "vllm-project/vllm#40047, flashinfer-ai/flashinfer#3057, vllm-project/vllm#38148",
        "NaN in padding rows enters the quantisation scales of real rows",
        _FP8,
    ),
    "QT01": Unplanted(
        "sgl-project/sglang#13162",
        "input scales of experts that no replica map names are never written",
        _FP8,
    ),
    "QT03": Unplanted(
        "sgl-project/sglang#21602, sgl-project/sglang#36597, sgl-project/sglang#31503",
        "input scales of all experts meet the weight scales of this rank's",
        _FP8,
    ),
    "QT04": Unplanted(
        "sgl-project/sglang#36237",
        "rows of scales are padded to 16 bytes and addressed as if packed",
        _FP8,
    ),
    "QT06": Unplanted(
        "ROCm/composable_kernel#2391",
        "the second GEMM's input scales are found by token, not by slot",
        _FP8,
    ),
    "QT08": Unplanted(
        "vllm-project/vllm#47733",
        "the exchange quantises with a scale of the wrong kind",
        _FP8,
    ),
    "QT09": Unplanted(
        "PaddlePaddle/PaddleFleet#1474",
        "the layout of scales is not passed on to the experts",
        _FP8,
    ),
    "QT10": Unplanted(
        "flashinfer-ai/flashinfer#2372",
        "scales cover padded columns whose valid number is not given",
        _FP8,
    ),
    "QT11": Unplanted(
        "flashinfer-ai/flashinfer#2848",
        "the width of a scale block is derived from a padded size",
        _FP8,
    ),
    "QT13": Unplanted(
        "InternLM/lmdeploy#3009",
        "scales of activations are loaded without a mask",
        _FP8,
    ),
    "EB01": Unplanted(
        "sgl-project/sglang#32962",
        "ranks that share their tokens choose different replicas",
        _REPLICAS,
    ),
    "EB02": Unplanted(
        "deepseek-ai/EPLB#22, vllm-project/vllm#18343",
        "of two replicas on one rank only one receives its weights",
        _REPLICAS,
    ),
    "EB04": Unplanted(
        "vllm-project/vllm#38128",
        "padding tokens count as load",
        _REPLICAS,
    ),
    "EB06": Unplanted(
        "vllm-project/vllm#22167",
        "every rank records the gathered tokens, so load counts once for each rank",
        _REPLICAS,
    ),
    "EB07": Unplanted(
        "vllm-project/vllm#40810",
        "the hash that chooses replicas prefers some of them",
        _REPLICAS,
    ),
    "EB09": Unplanted(
        "sgl-project/sglang#25882",
        "moving replicas after the first iteration gives wrong results",
        _REPLICAS,
    ),
    "EB11": Unplanted(
        "sgl-project/sglang#5524",
        "each rank stores its own load where the sum is meant",
        _REPLICAS,
    ),
    "CF07": Unplanted(
        "vllm-project/vllm#57016",
        "batch invariance, asked for, is not kept by one kernel",
        "batch invariance is not promised by any path",
    ),
    "LC02": Unplanted(
        "vllm-project/vllm#39015, vllm-project/vllm#31230, verl-project/verl#6677",
        "a port is probed, closed, and taken by someone else before it is bound",
        "no port is ever probed: rendezvous is by file",
    ),
}
