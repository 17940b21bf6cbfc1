"""What ranks do in the communication tests: functions that run in worker processes.

Legend: N rows per rank, R ranks, K experts per token, H hidden size.
"""

import torch

from twinmoe.optimized.communication import (
    Capacity,
    Tier,
    Transport,
    all_gather,
    reduce_scatter,
    select_transport,
)

CPU = torch.device("cpu")
ROOMY = Capacity(1 << 18, 1 << 18)


def choose(group, tier=None, **options) -> Transport:
    """Select a transport on the CPU, with room for any test here unless told otherwise."""
    options.setdefault("capacity", ROOMY)
    return select_transport(group, device=CPU, tier=tier, **options)


def message_of(action) -> str:
    """What ``action`` raises, as "Type: text"; "" if it does not raise."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def random_bytes(seed, shape, dtype):
    """A tensor of arbitrary bits: NaN payloads and subnormals included."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape) if num_bytes else torch.empty(shape, dtype=dtype)


def token_inputs(seed, n, k, h, dtype=torch.bfloat16):
    """Ids [N, K], weights [N, K] and hidden states [N, H] of arbitrary bits."""
    return [
        random_bytes(seed, (n, k), torch.int32),
        random_bytes(seed + 1000, (n, k), torch.float32),
        random_bytes(seed + 2000, (n, h), dtype),
    ]


def same_bits(left, right) -> bool:
    """Whether two contiguous tensors are equal bit for bit."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return left.numel() == 0 or torch.equal(
        left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8)
    )


def partials(seed, rank, rows, hidden, dtype):
    """One rank's partial results, of a scale of their own and some of them subnormal."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    values = torch.randn(rows, hidden, generator=generator) * (rank + 1)
    values[:, ::5] *= 1e-39 if dtype is not torch.float16 else 1e-6
    return values.to(dtype)


def gather_all(rank, group, shapes, num_ctas=1, largest_block=None):
    """Gather every shape on every tier; return what differs from a concatenation."""
    if largest_block:
        all_gather._BLOCK_BOUNDS = (1, largest_block)
    world, wrong = group.size(), []
    for tier in Tier:
        transport = choose(group, tier, num_ctas=num_ctas)
        for seed, (n, k, h) in enumerate(shapes):
            gathered = transport.all_gather(token_inputs(10 * seed + rank, n, k, h))
            for i, result in enumerate(gathered):
                parts = [token_inputs(10 * seed + r, n, k, h)[i] for r in range(world)]
                if not same_bits(result, torch.cat(parts)):
                    wrong.append((tier.value, (n, k, h), i))
    return wrong


def reduce_all(rank, group, cases, num_ctas=1, largest_block=None):
    """Reduce every case on every tier; return tier, dtype, sums and the [R, N, H] terms of each."""
    if largest_block:
        reduce_scatter._BLOCK_BOUNDS = (1, largest_block)
    world, results = group.size(), []
    for tier in Tier:
        transport = choose(group, tier, num_ctas=num_ctas)
        for seed, (n, h, dtype) in enumerate(cases):
            buffer = transport.partial_buffer(n * world, h, dtype)
            buffer.copy_(partials(seed, rank, n * world, h, dtype))
            result = transport.reduce_scatter(buffer)
            own = slice(rank * n, (rank + 1) * n)
            terms = [partials(seed, r, n * world, h, dtype)[own] for r in range(world)]
            results.append((tier, dtype, result, torch.stack(terms)))
    return results
