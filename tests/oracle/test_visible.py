"""Text of a layer is bounded, and every character of it can be seen."""

import pytest

from twinmoe.oracle.visible import LINE, TEXT, printed_text, visible


def test_plain_text_stays() -> None:
    """Lines, tabs, letters and signs of any language are what they were."""
    text = "one\n\ttwo: größer als 3 ± 4 %, 専門家 🧪\n"
    assert visible(text) == text


@pytest.mark.parametrize(
    ("hidden", "seen"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x00c\x7f", r"a\rb\x00c\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("\ud800", r"\ud800"),
        ("equivalent\u202e", r"equivalent\u202e"),
        ("line\u2028line", r"line\u2028line"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(hidden: str, seen: str) -> None:
    """Controls, lone surrogates, and characters that turn or break a line."""
    assert visible(hidden) == seen
    assert visible(seen) == seen


def test_bytes_that_are_no_text_are_escaped() -> None:
    """Whatever a native library writes can be shown."""
    assert printed_text(b"caf\xc3\xa9 \xff\xfe\x1b") == r"café \xff\xfe\x1b"


@pytest.mark.parametrize(
    "text",
    ["x" * 200_000, "\x1b" * 200_000, "line\n" * 50_000, "x" * (LINE + 1), "\x1b[1m\n" * TEXT],
    ids=["one line", "escapes", "lines", "a little", "both"],
)
def test_what_is_long_lacks_its_middle_and_says_how_much(text: str) -> None:
    """Bounded as a whole and by lines; once cut, it is left alone."""
    shown = visible(text)
    assert len(shown) <= TEXT
    assert all(len(line) <= LINE for line in shown.split("\n"))
    assert "characters left out ...]" in shown
    assert visible(shown) == shown


def test_the_count_is_of_what_is_left_out() -> None:
    """Head, tail and count are the whole."""
    shown = visible("a" * (LINE + 100))
    head, _, rest = shown.partition(" [... ")
    count, _, tail = rest.partition(" characters left out ...] ")
    assert int(count) + len(head) + len(tail) == LINE + 100
