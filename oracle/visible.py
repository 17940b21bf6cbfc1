"""Text of a layer's making, fit for a terminal, a file and a pipe: bounded, every character seen.

A layer chooses what its exceptions, classes and prints say.  Terminal escapes in them would move
the cursor over a verdict, and hundreds of kilobytes would bury it.
"""

from collections.abc import Iterable

#: Characters of a text, and of one line of it, that are shown.
TEXT, LINE = 4_000, 500

#: Room for the words that stand for what is left out.
_ROOM = 50


def visible(text: str, longest: int = TEXT) -> str:
    """``text`` with its control characters and lone surrogates as backslash escapes, and cut.

    Newline and tab stay.  Lines longer than ``LINE``, and a text longer than ``longest``, lack
    their middle and say how much of it.  What was made visible is made visible again unchanged.
    """
    cut = _cut(text, longest, "\n")
    return "\n".join(_cut(line, LINE, " ") for line in cut.split("\n"))


def printed_text(data: bytes, longest: int = TEXT) -> str:
    """Bytes that somebody printed, as :func:`visible` text; those that are no UTF-8 are escaped."""
    return visible(data.decode("utf-8", "backslashreplace"), longest)


def _cut(text: str, longest: int, around: str) -> str:
    if len(text) <= longest and len(shown := _escaped(text)) <= longest:
        return shown
    side = (longest - _ROOM) // 2
    head, tail = _fitting(text, side), _fitting(reversed(text), side)[::-1]
    left_out = f"[... {len(text) - len(head) - len(tail)} characters left out ...]"
    return "".join((*head, around, left_out, around, *tail))


def _fitting(text: Iterable[str], room: int) -> list[str]:
    """The first characters of ``text``, escaped, that fit into ``room``."""
    shown: list[str] = []
    for character in text:
        shown.append(_escaped(character))
        room -= len(shown[-1])
        if room < 0:
            return shown[:-1]
    return shown


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )
