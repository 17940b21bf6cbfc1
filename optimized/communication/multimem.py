"""The leaves: how a tile reaches all peers, and how all peers' tiles become one sum.

This is the only file with inline PTX, and the leaf is the only difference between the
multicast and the peer-to-peer kernels:

- ``P2P``: a loop over peers' addresses; sums in fp32 in rank order 0..R-1.
- ``MULTICAST``: one ``multimem`` instruction on the multicast address; the NVLink switch
  does the loop, in an order it does not promise (PTX ISA, ``multimem``).
- ``MULTICAST_EMULATED``: what the switch does, said with loops, for the interpreter.  Its
  sums start at the caller's own rank, so that nobody comes to rely on rank order.

``multimem.ld_reduce`` with ``.acc::f32`` adds 16-bit operands in fp32 but *returns* the
operand type: with a 16-bit wire the sum is rounded to it once.  So does the emulation.
"""

from enum import IntEnum

from twinmoe.optimized.numerics import round_to, to_fp32
from twinmoe.optimized.triton_runtime import tl, triton


class Leaf(IntEnum):
    """Which leaf a kernel is built with (a ``constexpr``)."""

    P2P = 0
    MULTICAST = 1
    MULTICAST_EMULATED = 2


_MULTICAST = tl.constexpr(int(Leaf.MULTICAST))
_MULTICAST_EMULATED = tl.constexpr(int(Leaf.MULTICAST_EMULATED))


@triton.jit
def load_bases(buffer_ptrs, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """All ranks' base addresses, [THREADS], in registers.

    Loaded where they are needed, each would cost its own round trip to memory, one after the
    other, since no load passes the store before it.
    """
    peer = tl.arange(0, THREADS)
    return tl.load(buffer_ptrs + peer, mask=peer < WORLD, other=0)


@triton.jit
def fence_aliases(LEAF: tl.constexpr):
    """Order what every thread did through the multicast address, and through ranks' own.

    They are addresses of the same memory, and a barrier orders accesses through one of them only
    (PTX ISA, ``fence.proxy``; CUDA C++ Programming Guide, "Use Multicast Mappings").
    """
    if LEAF == _MULTICAST:
        tl.inline_asm_elementwise(
            "fence.proxy.alias; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def store_to_all(
    value, offset, lane, element, live, bases, multicast_ptr, rank,
    WORLD: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Store a tile of words at byte ``offset`` of every rank's buffer.

    ``value`` and ``element`` (word numbers) are [BLOCK, words per lane]; ``lane`` and ``live``
    are [BLOCK] lane numbers and mask.
    """
    WORDS: tl.constexpr = value.shape[1]
    if LEAF == _MULTICAST:
        width: tl.constexpr = WORDS * value.dtype.primitive_bitwidth // 8
        address = multicast_ptr.to(tl.int64) + offset + lane.to(tl.int64) * width
        _multimem_store(value, address, live)
    else:
        for step in tl.static_range(WORLD):
            # Start at the own rank: all ranks storing to rank 0 first would jam its links.
            peer = _lanes_of((rank + step) % WORLD, offset, bases, value.dtype, WORDS)
            tl.store(peer + element, value, mask=live[:, None])


@triton.jit
def sum_from_all(
    offset, lane, element, live, bases, multicast_ptr, rank,
    DTYPE: tl.constexpr, WORLD: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """fp32 sums over ranks of a tile at byte ``offset``; shapes as in `store_to_all`."""
    ELEMENTS: tl.constexpr = element.shape[1]
    if LEAF == _MULTICAST:
        width: tl.constexpr = ELEMENTS * DTYPE.primitive_bitwidth // 8
        address = multicast_ptr.to(tl.int64) + offset + lane.to(tl.int64) * width
        return _multimem_load_reduce(address, live, DTYPE, ELEMENTS)
    else:  # noqa: RET505 - the compiler needs both returns in one constexpr branch
        first = rank if LEAF == _MULTICAST_EMULATED else 0
        total = _load_from(first, offset, element, live, bases, DTYPE)
        for step in tl.static_range(1, WORLD):
            total += _load_from((first + step) % WORLD, offset, element, live, bases, DTYPE)
        if LEAF == _MULTICAST_EMULATED:
            total = to_fp32(round_to(total, DTYPE))
        return total


@triton.jit
def _load_from(peer, offset, element, live, bases, DTYPE: tl.constexpr):
    ELEMENTS: tl.constexpr = element.shape[1]
    lanes = _lanes_of(peer, offset, bases, DTYPE, ELEMENTS)
    return to_fp32(tl.load(lanes + element, mask=live[:, None], other=0.0))


@triton.jit
def _lanes_of(peer, offset, bases, DTYPE: tl.constexpr, PER_LANE: tl.constexpr):
    # The packing aligns every slice to its lanes; the compiler cannot know that of an address
    # from memory, and would move single words.
    width: tl.constexpr = PER_LANE * DTYPE.primitive_bitwidth // 8
    is_peer = tl.arange(0, bases.shape[0]) == peer
    address = tl.sum(tl.where(is_peer, bases, 0)) + offset
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), width)


# In the assembly the predicate is an operand: a branch around it would not be elementwise.
_STORE_128 = tl.constexpr("""
{
    .reg .pred p;
    .reg .b32 w<4>;
    setp.ne.s32 p, $4, 0;
    mov.b64 {w0, w1}, $2;
    mov.b64 {w2, w3}, $3;
    @p multimem.st.relaxed.sys.global.v4.f32 [$1], {w0, w1, w2, w3};
    mov.b32 $0, 0;
}
""")
_STORE_64 = tl.constexpr("""
{
    .reg .pred p;
    setp.ne.s32 p, $3, 0;
    @p multimem.st.relaxed.sys.global.b64 [$1], $2;
    mov.b32 $0, 0;
}
""")


@triton.constexpr_function
def _load_reduce(registers, dtype):
    """Assembly that sums lanes of ``registers`` 32-bit registers; 16-bit operands add in fp32."""
    kind = {
        tl.float32: f"add.v{registers}.f32",
        tl.bfloat16: f"add.acc::f32.v{registers}.bf16x2",
        tl.float16: f"add.acc::f32.v{registers}.f16x2",
    }[dtype]
    outputs = [f"${i}" for i in range(registers)]
    clear = " ".join(f"mov.b32 {output}, 0;" for output in outputs)
    return f"""
{{
    .reg .pred p;
    setp.ne.s32 p, ${registers + 1}, 0;
    {clear}
    @p multimem.ld_reduce.relaxed.sys.global.{kind} {{{", ".join(outputs)}}}, [${registers}];
}}
"""


@triton.jit
def _multimem_store(value, address, live):
    if value.shape[1] == 2:
        low, high = tl.split(value)
        tl.inline_asm_elementwise(
            _STORE_128,
            "=r,l,l,l,r",
            [address, low, high, live.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.static_assert(value.dtype.primitive_bitwidth == 64, "multicast lanes have >= 64 bits")
        tl.inline_asm_elementwise(
            _STORE_64,
            "=r,l,l,r",
            [address, tl.reshape(value, (value.shape[0],)), live.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _multimem_load_reduce(address, live, DTYPE: tl.constexpr, ELEMENTS: tl.constexpr):
    BLOCK: tl.constexpr = address.shape[0]
    REGISTERS: tl.constexpr = ELEMENTS * DTYPE.primitive_bitwidth // 32
    if REGISTERS == 4:
        a, b, c, d = tl.inline_asm_elementwise(
            _load_reduce(4, DTYPE),
            "=r,=r,=r,=r,l,r",
            [address, live.to(tl.int32)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
        # join() appends a dimension, so this pairing reads a, b, c, d once it is flattened.
        registers = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK, 4))
    else:
        tl.static_assert(REGISTERS == 2, "multicast lanes have 64 or 128 bits")
        a, b = tl.inline_asm_elementwise(
            _load_reduce(2, DTYPE),
            "=r,=r,l,r",
            [address, live.to(tl.int32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
        registers = tl.join(a, b)
    if DTYPE == tl.float32:  # noqa: SIM300
        return registers.to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        low = (registers & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        high = (registers >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        return tl.reshape(tl.join(low, high), (BLOCK, ELEMENTS)).to(tl.float32)
