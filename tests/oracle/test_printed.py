"""What ranks print stays out of the report, costs little memory, and waits for nobody."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from twinmoe.oracle import printed
from twinmoe.oracle.printed import RunRecord, Streams
from twinmoe.oracle.printed_report import say_printed


@pytest.fixture
def streams() -> Iterator[Streams]:
    """Two ranks' streams, whose writers this process holds."""
    printed.start_run()
    opened = Streams([multiprocessing.Pipe(duplex=False) for _ in range(2)])
    yield opened
    opened.close()


def test_each_rank_has_its_last_lines(streams: Streams) -> None:
    """Of this task alone, escaped, with how much it was."""
    streams.begin()
    os.write(streams.writers[0].fileno(), b"of the task before\n")
    streams.begin()
    assert streams.tail() == ""
    os.write(streams.writers[1].fileno(), b"\x1b[2Jone\ntwo \xff")
    assert streams.tail() == (
        "  rank 1 printed 13 bytes, at last:\n    | \\x1b[2Jone\n    | two \\xff"
    )


def test_what_is_printed_around_the_tasks_is_no_layers(streams: Streams) -> None:
    """A start and an end have words of torch's own, which no line counts."""
    writer = streams.writers[0].fileno()
    os.write(writer, b"joining")
    streams.begin()
    os.write(writer, b"layer")
    streams.end()
    os.write(writer, b"leaving")
    streams.close()
    assert printed.run.written() == "--- rank 0 of 2 ---\nlayer"


def test_a_pipe_holds_nobody_up(streams: Streams) -> None:
    """Megabytes go through while the driver does something else, and little of them is kept."""
    streams.begin()
    for _ in range(8):
        os.write(streams.writers[0].fileno(), b"x" * (1 << 20))  # blocks until it is all read
    assert "printed 8388608 bytes" in streams.tail()
    assert len(streams.tail()) < 3_000
    assert len(printed.run.written()) < 1 << 20


def test_a_run_has_its_beginning_and_its_end() -> None:
    """With what is left out between them, in bytes."""
    record = RunRecord()
    for number in range(100_000):
        record.add(f"rank {number // 50_000} of 2", f"line {number}\n".encode())
    text = record.written()
    assert text.startswith("--- rank 0 of 2 ---\nline 0\nline 1\n")
    assert text.endswith("line 99998\nline 99999\n")
    assert "bytes left out ...]" in text
    assert record.bytes == 1_088_890


def test_the_file_is_named_and_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for a run that printed, none for another; a folder that refuses it is said."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    printed.start_run()
    say_printed()
    assert not list(tmp_path.iterdir())
    printed.run.add("rank 0 of 1", b"\x1b" * 3_000_000)
    say_printed()
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_size < 1 << 20
    assert capsys.readouterr().err == f"layers printed 3000000 bytes (kept in {kept})\n"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    say_printed()
    assert "(not kept: No such file or directory)" in capsys.readouterr().err
