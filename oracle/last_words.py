"""A rank that ends says where: its Python stack is in a file before it has gone.

A dead process cannot be asked.  What ends it from inside passes through one of a few doors,
each of which writes the stack first: fatal signals of native code (faulthandler does it without
Python), ``os._exit``, and signals that the process sends itself (an audit event precedes them).
A process that was killed from outside has written nothing.
"""

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn

#: What the audit hook of this process does: a hook can never be removed.
_writing: list[IO[str]] = []


@contextmanager
def written_to(stack_file: IO[str]) -> Iterator[None]:
    """Write the stack into ``stack_file`` if this process ends itself in the body.

    Processes forked in the body write nothing: their end is not this one's.
    """
    owner, leave = os.getpid(), os._exit

    def write() -> None:
        if os.getpid() == owner:
            with suppress(ValueError):  # the file is closed: the process leaves in good order
                faulthandler.dump_traceback(stack_file, all_threads=False)

    def leaves(status: int) -> NoReturn:
        write()
        leave(status)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.kill" and _writing and arguments[1] and arguments[0] in (0, owner):
            write()

    faulthandler.enable(stack_file, all_threads=False)
    os._exit = leaves
    sys.addaudithook(audited)
    _writing.append(stack_file)
    try:
        yield
    finally:
        _writing.remove(stack_file)
        os._exit = leave
        faulthandler.disable()
