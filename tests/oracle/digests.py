"""What a line draws, as a SHA-256: of a case, or of an input kind (``kind/dtype``).

Run as a module it prints the digests of its arguments, so that another process can be asked.
"""

import hashlib
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from twinmoe.oracle.case import Case
from twinmoe.oracle.emulation import draw_inputs
from twinmoe.oracle.inputs import hidden_for, weights_for
from twinmoe.reference.config import DTYPES, MoEConfig


def sha256(tensors: Iterable[Tensor]) -> str:
    """Return a hash over the bytes of all tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def of_case(case: Case) -> str:
    """Return the digest of the weights, then of two batches of each rank."""
    batches = [hidden_for(case, rank, step) for rank in range(case.ep_size) for step in (0, 1)]
    return sha256([*weights_for(case).tensors().values(), *batches])


def of_line(line: str) -> str:
    """Return the digest of a case line, or of ``kind/dtype`` for two ranks."""
    kind, _, dtype = line.partition("/")
    if dtype not in DTYPES:
        return of_case(Case.parse(line))
    config = MoEConfig(
        hidden_size=100, moe_intermediate_size=17, num_experts=6, num_experts_per_tok=2,
        use_correction_bias=True, shared_expert_intermediate_size=8, dtype=DTYPES[dtype],
    )  # fmt: skip
    inputs = draw_inputs(kind, config, (9, 5), seed=3)
    return sha256([*inputs.weights.tensors().values(), *inputs.hidden_by_rank])


if __name__ == "__main__":
    print(*map(of_line, sys.argv[1:]))
