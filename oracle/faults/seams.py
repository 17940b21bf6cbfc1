"""Where a fault is planted: functions wrapped in place, and put back at the end of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from twinmoe.oracle.case import Case

if TYPE_CHECKING:
    from twinmoe.oracle.worker import RankContext

#: ``wrong(original, *args, **kwargs)`` takes the place of ``original(*args, **kwargs)``.
Wrong = Callable[..., Any]


class Seams:
    """One rank's seams for one case: ``context`` and ``case`` say where and on what."""

    def __init__(self, context: RankContext, case: Case) -> None:
        self.context, self.case = context, case
        #: How often something planted was met; what is put in place is met by being there.
        self.met = 0
        self._restore = ExitStack()

    @property
    def is_last_rank(self) -> bool:
        """Many faults of the field spare rank 0: they are planted on the last one."""
        return self.context.rank == self.context.world_size - 1

    def around(self, owner: type | ModuleType, name: str, wrong: Wrong) -> None:
        """Let ``owner.name`` call ``wrong`` with the original function as first argument.

        ``owner`` is a class (methods, also static and class methods) or the module in which
        callers look the name up.
        """
        raw = owner.__dict__[name]
        kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
        original = raw.__func__ if kind else raw

        @functools.wraps(original)
        def planted(*args: Any, **kwargs: Any) -> Any:
            self.met += 1
            return wrong(original, *args, **kwargs)

        # A Triton kernel is launched through an attribute that the counters read.
        setattr(owner, name, kind(planted) if kind else planted)
        self._restore.callback(setattr, owner, name, raw)

    def put(self, owner: object, name: str, value: Any) -> None:
        """Let ``owner.name`` be ``value``: a constant, a class, a kernel."""
        self.met += 1
        self._restore.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore.close()
