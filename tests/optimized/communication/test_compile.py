"""The multicast kernels compile for a GPU that this machine does not have."""

import os
import subprocess
import sys

import pytest

#: Runs in a process of its own, where Triton is not the interpreter.
_PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from twinmoe.optimized.triton_runtime import INTERPRETED, tl
from twinmoe.optimized.communication.all_gather import all_gather_kernel
from twinmoe.optimized.communication.reduce_scatter import reduce_scatter_kernel

assert not INTERPRETED
common = {"buffer_ptrs": "*i64", "signal_pad_ptrs": "*i64", "multicast_ptr": "i64", "rank": "i32"}

def ptx_of(kernel, signature, constants):
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    aligned = {}
    for name, kinds in signature.items():
        for j, kind in enumerate(kinds if isinstance(kinds, tuple) else (kinds,)):
            if kind.startswith("*"):
                path = (position[name], j) if isinstance(kinds, tuple) else (position[name],)
                aligned[path] = [["tt.divisibility", 16]]
    constants = {(position[name],): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for leaf in (0, 1):
    print("==== all_gather", leaf)
    print(ptx_of(
        all_gather_kernel,
        common | {
            "sources": ("*i64",) * 2, "offsets": ("i64",) * 2, "num_lanes": ("i32",) * 2,
            "first_ctas": ("i32",) * 2,
        },
        dict(WORDS=(2, 1), BLOCKS=(512, 128), WORLD=4, THREADS=4, LEAF=leaf, LEADING_BARRIER=True),
    ))
    for dtype, elements in ((tl.float32, 4), (tl.float32, 2), (tl.bfloat16, 8), (tl.float16, 4)):
        print("==== reduce_scatter", leaf, dtype, elements)
        print(ptx_of(
            reduce_scatter_kernel,
            common | {"out": "*fp32", "offset": "i64", "num_lanes": "i32"},
            dict(DTYPE=dtype, ELEMENTS=elements, BLOCK=128, WORLD=4, THREADS=4, LEAF=leaf),
        ))
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """PTX of each kernel, by its name, leaf and lane, without the lines that name sources."""
    cache = str(tmp_path_factory.mktemp("triton-cache"))
    program = tmp_path_factory.mktemp("program") / "compile_kernels.py"
    program.write_text(_PROGRAM)
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": cache,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sections = done.stdout.split("==== ")[1:]
    listings = {}
    for section in sections:
        title, _, body = section.partition("\n")
        lines = (line.strip() for line in body.splitlines())
        listings[title] = "\n".join(x for x in lines if not x.startswith((".loc", ".file")))
    return listings


def test_multicast_stores_are_128_and_64_bits_wide(ptx):
    """One instruction per lane reaches all peers; no store to a peer is left."""
    listing = ptx["all_gather 1"]
    assert "multimem.st.relaxed.sys.global.v4.f32" in listing
    assert "multimem.st.relaxed.sys.global.b64" in listing
    assert "st.global.v2.b64" not in listing


@pytest.mark.parametrize(
    ("lane", "instruction"),
    [
        ("fp32 4", "add.v4.f32"),
        ("fp32 2", "add.v2.f32"),
        ("bf16 8", "add.acc::f32.v4.bf16x2"),
        ("fp16 4", "add.acc::f32.v2.f16x2"),
    ],
)
def test_multicast_sums_accumulate_in_fp32(ptx, lane, instruction):
    """16-bit operands are added with .acc::f32, never in their own precision."""
    listing = ptx[f"reduce_scatter 1 {lane}"]
    assert f"multimem.ld_reduce.relaxed.sys.global.{instruction}" in listing


def test_peer_to_peer_moves_whole_lanes_without_multicast(ptx):
    """The same body with the other leaf: 128-bit accesses, no multimem instruction."""
    assert "st.global.v2.b64" in ptx["all_gather 0"]
    assert "ld.global.v4.b32" in ptx["reduce_scatter 0 fp32 4"]
    assert "ld.global.v4.b32" in ptx["reduce_scatter 0 bf16 8"]
    assert all("multimem." not in text for title, text in ptx.items() if " 0" in title)


def test_the_barrier_is_system_wide_with_one_atomic_per_thread(ptx):
    """Release on the way out, acquire on the way in; no compare-and-swap."""
    for listing in ptx.values():
        assert "atom.global.sys.release.exch.b32" in listing
        assert "atom.global.sys.acquire.add.u32" in listing
        assert ".cas." not in listing
