"""One property for a test file of your own: pytest draws the layers, the judge decides.

::

    from twinmoe.oracle.testing import equivalence_property

    test_my_layer = equivalence_property("my_package.my_layer:make", ep_sizes=(1, 2))

It is parametrised by expert-parallel size and dtype, so ``-k "ep2 and bf16"`` picks and
pytest-xdist spreads; Hypothesis' own profile and database apply.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hypothesis import HealthCheck, given, reject, settings

from twinmoe.oracle.case import Case
from twinmoe.oracle.corners import CORNERS
from twinmoe.oracle.defects import JudgeDefectError
from twinmoe.oracle.failures import WorkerFailure
from twinmoe.oracle.layer_space import neutral, runs
from twinmoe.oracle.plain_layer import JudgedLayer, LayerFactory, PlainLayer
from twinmoe.oracle.strategies import Cell, cases
from twinmoe.oracle.subject_spec import PlainName, spec_of
from twinmoe.oracle.trial import Outcome, Trial
from twinmoe.reference.config import DTYPES, MoEConfig

__all__ = ["JudgedLayer", "LayerFactory", "PlainLayer", "equivalence_property", "neutral", "runs"]


def equivalence_property(
    factory: str | LayerFactory,
    *,
    ep_sizes: Sequence[int] = (1,),
    dtypes: Sequence[str] = ("bf16", "fp16", "fp32"),
    model: MoEConfig | None = None,
    device: str = "cpu",
    timeout_s: float = 15.0,
) -> Callable[[int, str], None]:
    """Return a test function: layers of ``factory`` are equivalent to the truth.

    ``factory`` is ``package.module:name``, ``file.py:name``, or the function itself if it
    stands at the top of a module: worker processes import it.  ``model`` draws layers of
    that geometry only.  The pinned corners of ``twinmoe check`` come first, then as many
    drawn cases as Hypothesis' profile says.  The test fails with the verdict, the mistake
    that explains it where one is known, and the line that replays it.

    Raises ConfigError where the factory cannot be imported.
    """
    import pytest  # noqa: PLC0415 - layers import this module too, where nothing is tested

    subject = PlainName(spec_of(factory))

    @pytest.mark.parametrize("dtype", dtypes)
    @pytest.mark.parametrize("ep_size", ep_sizes, ids=[f"ep{size}" for size in ep_sizes])
    def test_layer_is_equivalent(ep_size: int, dtype: str) -> None:
        """Every element of every rank's output lies inside the envelope of the contract."""
        cell = Cell(ep_size, "alltoall", "eager", DTYPES[dtype])
        with Trial(device, timeout_s, (subject.text,)) as trial, _diagnosed(trial):

            def search(case: Case) -> None:
                if not _decided(trial, case):
                    reject()

            # Hypothesis files what it found under the function's name.
            search.__name__ = re.sub(r"\W", "_", f"{subject.text}_{cell}")
            corners = [] if model is not None else [corner(cell) for corner in CORNERS.values()]
            for case in {str(case): case for case in map(subject.fit, corners)}.values():
                _decided(trial, case)
            drawn = cases(cell, model, device).map(subject.fit)
            untimed = settings(
                deadline=None,
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            )
            untimed(given(drawn)(search))()
            trial.require_alive(ep_size)
            assert not trial.cut_off, f"no verdict: ended from outside: {trial.cut_off}"

    return test_layer_is_equivalent


class NotEquivalentError(AssertionError):
    """An answer outside the envelope."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.explain())
        self.outcome = outcome


@contextmanager
def _diagnosed(trial: Trial) -> Iterator[None]:
    """Name the mistake once, for the simplest case that Hypothesis has found."""
    try:
        yield
    except NotEquivalentError as found:
        try:
            trial.diagnose(found.outcome)
        except (WorkerFailure, JudgeDefectError) as failure:  # what was found stands
            found.add_note(f"no diagnosis: {failure}")
        for mistake in found.outcome.diagnosis:
            found.add_note(f"this is what one gets if {mistake}")
        raise


def _decided(trial: Trial, case: Case) -> bool:
    """Whether near ties left nothing open; raises NotEquivalentError for a wrong answer."""
    try:
        outcome = trial.run(case)
        if outcome.findings:
            raise NotEquivalentError(outcome)
    except WorkerFailure as failure:
        failure.add_note(f"case: {case}")
        raise
    return outcome.equivalent
