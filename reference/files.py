"""Files that somebody names: opened only if regular, read only up to a size, parsed strictly."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, Never

#: No text that is read here comes near this size.
MAX_TEXT = 256 * 2**20

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: Path) -> None:
    """Raise OSError for a path that leads to no regular file; nothing is opened."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; raises OSError for anything else, and never waits."""
    require_regular(path)
    # What it was a moment ago need not be what is opened now.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def read_text(path: Path) -> str:
    """Read a UTF-8 text; raises OSError, or ValueError for bytes that are none or far too many."""
    with open_regular(path) as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"it has more than {MAX_TEXT} bytes")
    return data.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON; raises ValueError for what is none, NaN and Infinity among it."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply to be read") from None


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")
