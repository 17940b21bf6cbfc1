"""A check's results on disk as they come, so that an end of any kind costs the case at hand alone.

A journal is a file of JSON lines: what is checked, then one entry for each case that was tried.
An entry is written in one piece and flushed to the disk before the next case starts.  A resumed
check draws the same cases again and takes what the journal says of those that passed; a case that
failed is run anew, since a failure is worth a diagnosis.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import twinmoe.optimized
import twinmoe.oracle
import twinmoe.reference
from twinmoe.oracle.case_figures import CaseFigures
from twinmoe.reference.config import ConfigError

_FORMAT = "twinmoe journal"

#: Rises whenever a journal of before would be read wrongly.
_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One case of one cell: its figures, None if a worker failed, and what was wrong with it.

    ``undecided``: near ties left the answer of a layer open that shows no expert ids.
    """

    cell: str
    case: str
    figures: CaseFigures | None
    failure: str = ""
    undecided: bool = False

    @property
    def passed(self) -> bool:
        """It was answered, and nothing was wrong."""
        return self.figures is not None and not self.failure

    @classmethod
    def read(cls, content: Any) -> Self:
        """Read what :func:`json.loads` made of a line; raises ValueError for anything else."""
        if not isinstance(content, dict) or set(content) != set(cls.__dataclass_fields__):
            raise ValueError(f"its keys are not {', '.join(cls.__dataclass_fields__)}")
        figures = content["figures"]
        entry = cls(**content | {"figures": CaseFigures.read(figures) if figures else None})
        texts = entry.cell, entry.case, entry.failure
        if not all(isinstance(text, str) for text in texts) or type(entry.undecided) is not bool:
            raise ValueError("a value is of another type than its key says")
        return entry


class Journal:
    """The journal of one check; without a path it keeps nothing and knows nothing.

    ``plan`` identifies what is checked: a JSON value.  ``error`` is what the system said when an
    entry could not be written, after which none is: the check itself goes on.
    """

    def __init__(self, path: Path | None = None, plan: Any = None, resume: bool = False) -> None:
        """Start a journal, or go on with the one at ``path``.

        Raises ConfigError for a file that exists already, or with ``resume`` for one that is no
        journal of this plan and these sources.
        """
        self.path, self.error = path, ""
        self._entries: dict[tuple[str, str], Entry] = {}
        self._file: int | None = None
        if path is None:
            return
        header = {"format": _FORMAT, "version": _VERSION, "plan": plan, "sources": _sources()}
        if resume:
            whole = self._read(path, json.loads(json.dumps(header)))
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._file, whole)  # a line that an end cut short is no entry
            return
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise ConfigError(
                f"--journal ({path}) exists: its results would be mixed with others; add --resume "
                "to go on with it, or name another file"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"--journal ({path}) cannot be written: {error.strerror}; name another file"
            ) from None
        self._write(header)

    def recorded(self, cell: str, case: str) -> Entry | None:
        """What an earlier run left about this case of this cell."""
        return self._entries.get((cell, case))

    def add(self, entry: Entry) -> None:
        """Keep an entry; it is on the disk when this returns."""
        self._write(asdict(entry))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, content: dict[str, Any]) -> None:
        if self._file is None or self.error:
            return
        line = json.dumps(content).encode() + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                self.error = "the device is full"
            os.fsync(self._file)
        except OSError as error:
            self.error = error.strerror or str(error)

    def _read(self, path: Path, header: dict[str, Any]) -> int:
        """Take in the entries of ``path``; return how many of its bytes are whole lines."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"--journal ({path}) cannot be read: {error.strerror}; drop --resume to start one"
            ) from None
        whole = content.rfind(b"\n") + 1
        lines = _lines(path, content[:whole])
        _require_same(path, next(lines, (1, None))[1], header)
        for number, line in lines:
            try:
                entry = Entry.read(line)
            except (ValueError, TypeError) as error:
                raise _damaged(path, number, str(error)) from None
            self._entries[entry.cell, entry.case] = entry
        return whole


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number, str(error)) from None


def _damaged(path: Path, number: int, why: str) -> ConfigError:
    return ConfigError(
        f"--journal ({path}), line {number}, is no entry: {why}; drop --resume and name another "
        "file to start anew"
    )


def _require_same(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Raise ConfigError unless a journal's first line says that it is about the same check."""
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ConfigError(f"--journal ({path}) is no journal: name the file of an earlier check")
    reasons = {
        "version": "was written in another format",
        "plan": "is of another check: other cells, cases, seed, device, model, fault or layer",
        "sources": "was written by another version of this program, which may judge otherwise",
    }
    for key, reason in reasons.items():
        if found.get(key) != wanted[key]:
            raise ConfigError(
                f"--journal ({path}) {reason}: its results do not belong to this check; drop "
                "--resume and name another file"
            )


@cache
def _sources() -> str:
    """A digest of every module of ours."""
    digest = hashlib.sha256()
    for package in (twinmoe.reference, twinmoe.optimized, twinmoe.oracle):
        folder = Path(package.__file__ or "").parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package.__name__}/{file.relative_to(folder)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
