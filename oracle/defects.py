"""What the judge itself could not do: a defect of twinmoe is one case's outcome, and no verdict.

Whatever goes wrong in the driver while one case is judged ends that case alone.  The others go
on, all reports are written, and no command says "equivalent" where such a case exists.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twinmoe.oracle.failures import SetUpError, WorkerFailure

_PACKAGE = str(Path(__file__).resolve().parent.parent)

#: What is said by its own name: failures of workers, and a disk that is full.
_NO_DEFECTS = (WorkerFailure, SetUpError, OSError)


class JudgeDefectError(RuntimeError):
    """One case could not be judged: its line, what was raised, the place, and how to replay it."""

    def __init__(self, case: object, error: Exception, replay: str) -> None:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        again = f"\n  reproduce: {replay}" if replay else ""
        super().__init__(
            f"'{case}' could not be judged: a defect of twinmoe, please report it: {said}\n"
            f"  at {_place(error)}{again}"
        )


@contextmanager
def judging(
    case: object, replay: str = "", meant: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise JudgeDefectError for whatever is raised here that is not ``meant``.

    ``replay`` is the command that asks again.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (JudgeDefectError, *_NO_DEFECTS, *meant)):
            raise
        raise JudgeDefectError(case, error, replay) from error


def _place(error: Exception) -> str:
    """``file:line in name`` of the innermost line of this program."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    frame = (ours or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"
