"""The multicast kernels compile for a GPU that this machine does not have."""

import os
import subprocess
import sys

import pytest
import torch

from twinmoe.optimized.communication.eligibility import Refusal, refused_multicast

#: Runs in a process of its own, where Triton is not the interpreter.
_PROGRAM = """
import os
import subprocess
import sys
import tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from twinmoe.optimized.triton_runtime import INTERPRETED, tl
from twinmoe.optimized.communication.all_gather import all_gather_kernel
from twinmoe.optimized.communication.reduce_scatter import reduce_scatter_kernel

assert not INTERPRETED
common = {"buffer_ptrs": "*i64", "signal_pad_ptrs": "*i64", "multicast_ptr": "i64", "rank": "i32"}

def compiled(kernel, signature, constants):
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
    return {
        f"sm_{major}": triton.compile(source, target=GPUTarget("cuda", major, 32)).asm
        for major in (90, 100)
    }

def show(title, compiled):
    for architecture, asm in compiled.items():
        print("====", architecture, "ptx", title)
        print(asm["ptx"])
        print("====", architecture, "sass", title)
        print(sass_of(asm["cubin"]))

def sass_of(cubin):
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(tools, "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

for leaf in (0, 1):
    show(f"all_gather {leaf}", compiled(
        all_gather_kernel,
        common | {
            "sources": ("*i64",) * 2, "offsets": ("i64",) * 2, "num_lanes": ("i32",) * 2,
            "first_ctas": ("i32",) * 2,
        },
        dict(WORDS=(2, 1), BLOCKS=(512, 128), WORLD=4, THREADS=4, LEAF=leaf, LEADING_BARRIER=True),
    ))
    for dtype, elements in ((tl.float32, 4), (tl.float32, 2), (tl.bfloat16, 8), (tl.float16, 4)):
        show(f"reduce_scatter {leaf} {dtype} {elements}", compiled(
            reduce_scatter_kernel,
            common | {"out": "*fp32", "offset": "i64", "num_lanes": "i32"},
            dict(DTYPE=dtype, ELEMENTS=elements, BLOCK=128, WORLD=4, THREADS=4, LEAF=leaf),
        ))
"""


ARCHITECTURES = ("sm_90", "sm_100")


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    """PTX and SASS by architecture, kernel, leaf and lane, without lines that name sources."""
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
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for section in done.stdout.split("==== ")[1:]:
        title, _, body = section.partition("\n")
        lines = (line.strip() for line in body.splitlines())
        found[title] = "\n".join(x for x in lines if not x.startswith((".loc", ".file")))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_multicast_stores_are_128_and_64_bits_wide(listings, architecture):
    """One instruction per lane reaches all peers; no store to a peer is left."""
    ptx = listings[f"{architecture} ptx all_gather 1"]
    assert "multimem.st.relaxed.sys.global.v4.f32" in ptx
    assert "multimem.st.relaxed.sys.global.b64" in ptx
    assert "st.global.v2.b64" not in ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("lane", "instruction"),
    [
        ("fp32 4", "add.v4.f32"),
        ("fp32 2", "add.v2.f32"),
        ("bf16 8", "add.acc::f32.v4.bf16x2"),
        ("fp16 4", "add.acc::f32.v2.f16x2"),
    ],
)
def test_multicast_sums_accumulate_in_fp32(listings, architecture, lane, instruction):
    """16-bit operands are added with .acc::f32, never in their own precision."""
    ptx = listings[f"{architecture} ptx reduce_scatter 1 {lane}"]
    assert f"multimem.ld_reduce.relaxed.sys.global.{instruction}" in ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aliases_are_fenced_on_both_sides_of_a_barrier(listings, architecture):
    """Rows go in by one address and out by another, but only where there are two."""
    for kernel, fences in {"all_gather": 1, "reduce_scatter": 2}.items():
        for title, ptx in listings.items():
            for leaf in (0, 1):
                if title.startswith(f"{architecture} ptx {kernel} {leaf}"):
                    assert ptx.count("fence.proxy.alias") == fences * leaf, title
    gather = listings[f"{architecture} ptx all_gather 1"]
    fence = gather.index("fence.proxy.alias")
    assert gather.rindex("multimem.st") < fence < gather.rindex("atom.global.sys.release.exch")
    scatter = listings[f"{architecture} ptx reduce_scatter 1 fp32 4"]
    before, after = scatter.index("fence.proxy.alias"), scatter.rindex("fence.proxy.alias")
    assert before < scatter.index("atom.global.sys.release.exch")
    assert scatter.rindex("atom.global.sys.acquire") < after < scatter.index("multimem.ld_reduce")


#: How the assembler spells .acc::f32: an addition in a higher precision than the operands'.
WIDE_ADD = {"sm_90": "F32ADD", "sm_100": "HPADD"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "instruction"),
    [
        ("all_gather 1", "STG.E.128.STRONG.SYS"),
        ("all_gather 1", "STG.E.64.STRONG.SYS"),
        ("reduce_scatter 1 fp32 4", "LDGMC.E.ADD.F32x4.RN.STRONG.SYS"),
        ("reduce_scatter 1 fp32 2", "LDGMC.E.ADD.F32x2.RN.STRONG.SYS"),
        ("reduce_scatter 1 bf16 8", "LDGMC.E.{wide}.BF16x8.RN.STRONG.SYS"),
        ("reduce_scatter 1 fp16 4", "LDGMC.E.{wide}.F16x4.RN.STRONG.SYS"),
    ],
)
def test_multicast_instructions_survive_assembly(listings, architecture, kernel, instruction):
    """Machine code: whole-lane stores to the system, and loads that add through the switch."""
    expected = instruction.format(wide=WIDE_ADD[architecture])
    assert expected in listings[f"{architecture} sass {kernel}"]
    peer_to_peer = listings[f"{architecture} sass {kernel.replace(' 1', ' 0', 1)}"]
    assert "LDGMC" not in peer_to_peer
    assert "STG.E.128.STRONG.SYS" not in peer_to_peer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peer_to_peer_moves_whole_lanes_without_multicast(listings, architecture):
    """The same body with the other leaf: 128-bit accesses, no multimem instruction."""
    ptx = {t: text for t, text in listings.items() if t.startswith(f"{architecture} ptx")}
    prefix = f"{architecture} ptx"
    assert "st.global.v2.b64" in ptx[f"{prefix} all_gather 0"]
    assert "ld.global.v4.b32" in ptx[f"{prefix} reduce_scatter 0 fp32 4"]
    assert "ld.global.v4.b32" in ptx[f"{prefix} reduce_scatter 0 bf16 8"]
    assert all("multimem." not in text for title, text in ptx.items() if " 0" in title)


def test_the_barrier_is_system_wide_with_one_atomic_per_thread(listings):
    """Release on the way out, acquire on the way in; no compare-and-swap."""
    for title, listing in listings.items():
        if " ptx " in title:
            assert "atom.global.sys.release.exch.b32" in listing
            assert "atom.global.sys.acquire.add.u32" in listing
            assert ".cas." not in listing


def test_the_clock_is_read_by_those_who_still_wait_only(listings):
    """No wait that ends in good time looks at it: it stands behind the first look at the peers."""
    for title, listing in listings.items():
        if " ptx " in title:
            clock = listing.index("%globaltimer")
            assert listing.index("atom.global.sys.acquire.add.u32") < clock, title
            assert "atom.global.gpu.relaxed.max" in listing, title


def test_multicast_is_open_only_to_memory_that_has_an_address_for_it(monkeypatch):
    """On a capable GPU a zero multicast pointer closes the tier, whatever else is there."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert refused_multicast(cuda, 0, emulate=False) is Refusal.MULTICAST_UNAVAILABLE
    assert refused_multicast(cuda, 0, emulate=True) is Refusal.MULTICAST_UNAVAILABLE
    assert refused_multicast(cuda, 4096, emulate=False) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert refused_multicast(cuda, 4096, emulate=False) is Refusal.COMPUTE_CAPABILITY
