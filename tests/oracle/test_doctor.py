"""The doctor: what this machine can run, why not the rest, and what no run here can show."""

from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from twinmoe.optimized.communication.eligibility import Tier
from twinmoe.optimized.communication.errors import TransportError
from twinmoe.optimized.experts import BACKENDS
from twinmoe.oracle import doctor
from twinmoe.oracle.case import Case
from twinmoe.reference.config import ConfigError

CPU = torch.device("cpu")

#: A line that can be run, to be spoiled.
LINE = "T=3/0,H=16,I=16,E=4,k=2"


def rows() -> list[list[str]]:
    """Return the cells of the doctor's table on a CPU, row by row."""
    console = Console(width=160, record=True, file=StringIO())
    console.print(doctor.table(CPU))
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_every_tier_and_backend_has_a_row() -> None:
    """Each transport tier once, each expert backend once for each dtype, all answered."""
    listed = [(part, name) for part, name, _, _ in rows()]
    tiers = [name for part, name in listed if part == "transport"]
    assert tiers == [Tier.NVLS.value, Tier.P2P.value, "gloo"]
    for dtype in ("bfloat16", "float16", "float32"):
        assert [n for part, n in listed if part == f"experts, {dtype}"] == list(BACKENDS)
    assert {available for _, _, available, _ in rows()} <= {"yes", "no"}


def test_an_emulated_tier_says_that_it_is() -> None:
    """On a CPU nvls is available, and never called multicast hardware."""
    (nvls,) = [row for row in rows() if row[1] == Tier.NVLS.value]
    assert nvls[2:] == ["yes", "nvls (emulated)"]


def test_a_refused_tier_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier that cannot be set up is a row with "no" and what the transport said."""

    def refuse(*_: Any, tier: Tier, **__: Any) -> None:
        raise TransportError(f"tier ({tier.value}) was demanded but is refused: no memory")

    monkeypatch.setattr(doctor, "select_transport", refuse)
    told = [row for row in rows() if row[0] == "transport"]
    assert [row[2] for row in told] == ["no"] * len(Tier)
    assert all("refused: no memory" in row[3] for row in told)


def test_a_backend_that_cannot_run_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert backend's refusal is shown beside its "no"."""
    reasons = {"grouped_mm": None, "triton": "dtype (x) is too narrow: use y"}
    monkeypatch.setattr(doctor, "backend_report", lambda *_: reasons)
    told = {row[1]: row[2:] for row in rows() if row[0] == "experts, float32"}
    assert told == {"grouped_mm": ["yes", ""], "triton": ["no", "dtype (x) is too narrow: use y"]}


def test_versions_name_what_a_bug_report_needs() -> None:
    """Python, torch, triton and how kernels run, in one line; a missing package is said."""
    line = doctor.versions()
    assert "\n" not in line
    assert f"torch {torch.__version__.partition('+')[0]}" in line
    assert "Triton kernels are interpreted" in line
    assert "flashinfer-python" in line


def test_what_was_not_verified_depends_on_the_device() -> None:
    """A CPU run owns up to CUDA and multicast, a CUDA run to multicast; one line each."""
    on_cpu, on_cuda = doctor.not_verified("cpu"), doctor.not_verified("cuda")
    assert "CUDA" in on_cpu
    assert "emulated" in on_cpu
    assert "multicast hardware" in on_cuda
    assert "interpreter" not in on_cuda
    assert "\n" not in on_cpu + on_cuda


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    """Asking for CUDA without a CUDA device names the value, the reason and the remedy."""
    with pytest.raises(ConfigError, match=r"device \('cuda'\) is not available: .*use --device"):
        doctor.require("cuda")


def test_a_case_that_can_run_is_let_through() -> None:
    """A sound case, also with a fault within its reach, is not refused."""
    doctor.require_case(Case.parse(LINE), "cpu")
    doctor.require_case(Case.parse(f"{LINE},fault=swapped_segments"), "cpu")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (f"{LINE},dtype=fp64", ("float64", "no inference kernels", "use bfloat16")),
        (f"{LINE},router_dtype=fp64", ("router_dtype (fp64)", "score in fp32", "leave it out")),
        (f"{LINE},backend=magic", ("'magic'", "unknown", "use one of")),
        (
            "T=3,H=17,I=16,E=4,k=2,backend=grouped_mm",
            ("hidden_size (17)", "multiple of 8", "use the triton backend"),
        ),
        ("T=3/1025,H=16,I=16,E=4,k=2", ("T (1025)", "bucket (1024)", "at most 1024")),
        ("T=3,H=16,I=16,E=4,k=2,batches=63", ("batches (1 sizes)", "no forward takes", "history")),
        (f"{LINE},fault=gremlin", ("'gremlin'", "not in the registry", "use one of zeros")),
        (f"{LINE},fault=bias_in_weights", ("'bias_in_weights'", "out of this case's reach", "use")),
        ("T=3,H=16,I=16,E=4,k=2,fault=swapped_segments", ("'swapped_segments'", "reach", "use")),
    ],
)
def test_a_case_that_no_worker_could_run_is_refused_beforehand(
    line: str, parts: tuple[str, ...]
) -> None:
    """What would only fail inside the workers is a ConfigError before there are any."""
    with pytest.raises(ConfigError) as caught:
        doctor.require_case(Case.parse(line), "cpu")
    assert all(part in str(caught.value) for part in parts)
