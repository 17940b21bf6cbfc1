"""Lines of code to click on: where a rank raised, stood or ended, in the layer's own file.

A traceback and a dumped stack list the same frames, the one innermost last and the other
innermost first.  Of anyone's layer, the place is the last line in its own file, however deep
it went from there; elsewhere it is the innermost line that is no library and no bookkeeping.
"""

import re
import sysconfig
from pathlib import Path

from twinmoe.optimized import launch

#: Beyond it, calls are those of anyone's layer.
ADAPTER = str(Path(__file__).with_name("plain_layer.py"))

#: File, line and function.
Frame = tuple[str, str, str]

_FRAME = re.compile(r'^  File "(.+)", line (\d+),? in (\S+)', re.MULTILINE)
#: Heads each stack that faulthandler writes; the last one is the latest.
_HEAD = "(most recent call first):"

_BOOKKEEPING = (str(Path(__file__).with_name("breadcrumbs.py")), launch.__file__)
_LIBRARIES = (*sysconfig.get_paths().values(), *_BOOKKEEPING, "<")


def raised_at(traceback: str) -> str:
    """``file:line in name`` that raised; empty if the traceback does not say."""
    frames = _frames(traceback)
    return _written(_in_layer(frames)[-1:] or ([] if _reaches_layer(frames) else frames[-1:]))


def standing_at(stack: str) -> str:
    """``file:line in name`` of a stack that faulthandler wrote; empty if it wrote none."""
    frames = _latest(stack)
    return _written(_in_layer(frames)[-1:] or _own(frames)[-1:])


def way_to(stack: str) -> list[str]:
    """The frames of a written stack that lead to where it stands, in anyone's layer or ours."""
    frames = _latest(stack)
    beyond = frames[_adapter(frames) + 1 :] if _reaches_layer(frames) else frames
    return [_written([frame]) for frame in _own(beyond)]


def is_in_layer(traceback: str) -> bool:
    """Whether a traceback leads through anyone's layer: its code, or what the judge says of it."""
    return _reaches_layer(_frames(traceback))


def _frames(text: str) -> list[Frame]:
    return [(file, line, name) for file, line, name in _FRAME.findall(text)]


def _latest(stack: str) -> list[Frame]:
    """Frames of the last stack in a file of stacks, outermost first."""
    _, head, latest = stack.rpartition(_HEAD)
    return _frames(latest)[::-1] if head else []


def _reaches_layer(frames: list[Frame]) -> bool:
    return any(frame[0] == ADAPTER for frame in frames)


def _adapter(frames: list[Frame]) -> int:
    """The number of the last frame of the adapter; -1 without one."""
    return max((number for number, frame in enumerate(frames) if frame[0] == ADAPTER), default=-1)


def _in_layer(frames: list[Frame]) -> list[Frame]:
    """Frames in the file that the adapter called; none where it called nobody."""
    if not _reaches_layer(frames):
        return []
    beyond = [frame for frame in frames[_adapter(frames) + 1 :] if not _is_ours(frame[0])]
    return [frame for frame in beyond if frame[0] == beyond[0][0]]


def _own(frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]


def _is_ours(file: str) -> bool:
    return Path(file).parent == Path(ADAPTER).parent


def _written(frames: list[Frame]) -> str:
    return "{}:{} in {}".format(*frames[-1]) if frames else ""
