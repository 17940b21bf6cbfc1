"""Case: one line that says everything, and what is said to a line that says nonsense."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmoe.oracle.case import MAX_SEED, MODES, TRANSPORTS, Case, CaseError
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.plan import plan_cells
from twinmoe.oracle.strategies import DTYPES, EP_SIZES, cases
from twinmoe.reference.config import ConfigError

#: A valid line, to be spoiled.
LINE = "T=3/0,H=16,I=16,E=4,k=2"

PATHS = sorted({(c.transport, c.mode) for c in plan_cells((1,), TRANSPORTS, MODES, DTYPES)})


@pytest.mark.parametrize(("transport", "mode"), PATHS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_line_reads_back_as_the_case_it_was(
    transport: str, mode: str, data: st.DataObject
) -> None:
    """Whatever the strategies draw, parse(str(case)) is the case, and the line is one line."""
    cell = data.draw(st.sampled_from(plan_cells(EP_SIZES, [transport], [mode], DTYPES)))
    case = data.draw(cases(cell))
    assert Case.parse(str(case)) == case
    assert "\n" not in str(case)
    assert " " not in str(case)


def test_corners_read_back_in_every_cell() -> None:
    """Every pinned corner survives the trip through its line, in every cell there is."""
    for cell in plan_cells(EP_SIZES, TRANSPORTS, MODES, DTYPES):
        for corner in CORNERS.values():
            case = corner(cell)
            assert Case.parse(str(case)) == case


def test_a_line_names_only_what_is_not_neutral() -> None:
    """A neutral case is written as its sizes and its dtype; a fault and a seed are added."""
    case = Case.parse(LINE)
    assert str(case) == f"{LINE},dtype=bf16"
    assert case.tokens == (3, 0)
    assert case.ep_size == 2
    assert str(Case.parse(f"{LINE},fault=zeros,seed=7")).endswith("seed=7,fault=zeros")


def test_spaces_around_parts_do_not_matter() -> None:
    """A line pasted with spaces after its commas is the same case."""
    assert Case.parse(f" {LINE.replace(',', ', ')}\n") == Case.parse(LINE)


@pytest.mark.parametrize(
    ("line", "value", "why", "remedy"),
    [
        (f"{LINE},foo=1", "'foo'", "not a key of a case", "use T, H,"),
        (f"{LINE},tokens=1", "'tokens'", "not a key of a case", "use T, H,"),
        (f"{LINE},gated", "'gated'", "not key=value", "commas"),
        ("T=3/x,H=16,I=16,E=4,k=2", "T='x'", "not int", "write a number"),
        ("T=,H=16,I=16,E=4,k=2", "T=''", "not int", "write a number"),
        (f"{LINE},rsf=big", "rsf='big'", "not float", "write a number"),
        (f"{LINE},seed=1.5", "seed='1.5'", "not int", "write a number"),
        (f"{LINE},gated=yes", "gated='yes'", "not a switch", "write 0 or 1"),
        (f"{LINE},gated=2", "gated='2'", "not a switch", "write 0 or 1"),
        (f"{LINE},seed={'9' * 5000}", "seed='9999", "not int", "write a number"),
        (f"{LINE},k=1", "'k'", "given twice", "drop one"),
        (f"{LINE},num_experts=8", "'num_experts'", "given twice", "drop one"),
        (f"{LINE},T=1/1", "'T'", "given twice", "drop one"),
        ("H=16,I=16,E=4,k=2", "'H=16,I=16,E=4,k=2'", "no tokens", "add T="),
        ("", "''", "no tokens", "add T="),
        ("T=3/-1,H=16,I=16,E=4,k=2", "(3, -1)", "at least 0", "write T="),
        (f"{LINE},batches=0", "(0,)", "at least 1", "write batches="),
        (f"{LINE},batches=x", "batches='x'", "not int", "write a number"),
        (f"{LINE},seed=-1", "seed (-1)", "derives its own seed", "0 .. "),
        (f"{LINE},seed={MAX_SEED + 1}", f"({MAX_SEED + 1})", "derives its own seed", "0 .. "),
        (f"{LINE},transport=tcp", "transport ('tcp')", "unknown", "use one of p2p"),
        (f"{LINE},mode=slow", "mode ('slow')", "unknown", "use one of eager"),
        (f"{LINE},wire=int8", "wire ('int8')", "unknown", "use one of fp32"),
        (f"{LINE},values=zero", "values ('zero')", "unknown", "use one of normal"),
        (f"{LINE},routing=fair", "routing ('fair')", "unknown", "use one of free"),
        (f"{LINE},bias=none", "bias ('none')", "unknown", "use one of mixed"),
        (f"{LINE},layout=odd", "layout ('odd')", "unknown", "use one of plain"),
        (f"{LINE},padding=inf", "padding ('inf')", "unknown", "use one of stale"),
        (
            f"{LINE},transport=alltoall,mode=graphed",
            "mode ('graphed')",
            "split sizes are read on the host",
            "use mode=eager",
        ),
    ],
)
def test_a_malformed_line_is_told_what_why_and_what_instead(
    line: str, value: str, why: str, remedy: str
) -> None:
    """CaseError quotes the value, gives the reason and the remedy, in one line."""
    with pytest.raises(CaseError) as caught:
        Case.parse(line)
    message = str(caught.value)
    assert value in message
    assert why in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("T=3", ("hidden_size", "no default", "add them")),
        ("T=1/1/1,H=16,I=16,E=4,k=2", ("num_experts (4)", "ep_size (3)", "divides 4")),
        ("T=3,H=16,I=16,E=4,k=5", ("num_experts_per_tok (5)", "num_experts (4)", "at most 4")),
        (f"{LINE},dtype=int8", ("dtype (int8)", "use one of fp64")),
        (f"{LINE},hidden_act=tanh", ("hidden_act (tanh)", "use one of silu")),
        (f"{LINE},rsf=nan", ("routed_scaling_factor (nan)", "finite", "use 1.0")),
        (f"{LINE},rsf=1e999", ("routed_scaling_factor (inf)", "finite", "use 1.0")),
        ("T=1000000000000,H=16,I=16,E=4,k=2", ("64_000_000_000_000 bytes for the tokens",)),
        (f"T=1,H={10**12},I=16,E=4,k=2", ("bytes for weights", "smaller sizes")),
        (f"T=1,H={10**4000},I=16,E=4,k=2", ("hidden_size (1000", "must be at most", "use less")),
        (f"{LINE},batches={10**12}", ("bytes for the tokens", "smaller sizes")),
    ],
)
def test_a_layer_that_contradicts_itself_is_refused_by_its_config(
    line: str, parts: tuple[str, ...]
) -> None:
    """ConfigError comes through unchanged where the parts are well formed, the layer is not."""
    with pytest.raises(ConfigError) as caught:
        Case.parse(line)
    assert all(part in str(caught.value) for part in parts)


@given(
    st.one_of(
        st.text(max_size=40),
        st.tuples(
            st.sampled_from(
                ["T", "H", "k", "seed", "rsf", "gated", "dtype", "mode", "swiglu_limit"]
            ),
            st.text(alphabet="0123456789.-/eNan_x", max_size=6),
        ).map(lambda pair: f"{LINE},{pair[0]}={pair[1]}"),
        st.tuples(st.integers(0, len(LINE) - 1), st.characters()).map(
            lambda edit: LINE[: edit[0]] + edit[1] + LINE[edit[0] + 1 :]
        ),
    )
)
def test_no_line_breaks_the_parser(line: str) -> None:
    """Any text is a case that reads back, or one of the two errors: never another exception."""
    try:
        case = Case.parse(line)
    except (CaseError, ConfigError):
        return
    assert Case.parse(str(case)) == case
