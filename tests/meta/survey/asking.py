"""Asking the judge: each layer as ``check --subject`` would, each fault as a campaign does."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence

from tests.meta.survey.entries import LAYERS, Layer
from tests.meta.survey.planting import PLANTED, PlantingTrial
from tests.meta.survey.results import Result
from twinmoe.oracle import check as checking
from twinmoe.oracle.campaign import hunt
from twinmoe.oracle.case import Case
from twinmoe.oracle.cell_result import CellResult
from twinmoe.oracle.check import check
from twinmoe.oracle.faults.fault import Fault
from twinmoe.oracle.plan import Plan, plan_cells
from twinmoe.oracle.subject_spec import PlainName
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import DTYPES

#: Files of layers, and of faults.
LAYER_FILES = ("router", "experts", "batches", "ranks", "right")
FAULT_FILES = ("router", "dispatch", "experts", "activations", "combine", "lives")


def load_entries() -> None:
    """Import all entries of both surveys."""
    for name in LAYER_FILES:
        importlib.import_module(f"tests.meta.survey.layers_{name}")
    for name in FAULT_FILES:
        importlib.import_module(f"tests.meta.survey.faults_{name}")


class AskingTrial(Trial):
    """One set of worlds for many layers, one after another."""

    def ask(self, subject: str) -> None:
        """Judge this layer from now on."""
        self._subjects = (subject,)


def ask_layers(
    layers: Sequence[Layer], cases: int, dtype: str, timeout_s: float
) -> Iterator[Result]:
    """Judge each layer on the pinned corners and ``cases`` random cases, until it is seen."""
    checking.SHRINK_TRIALS = 0  # a survey wants to know whether, not the simplest case
    with AskingTrial("cpu", timeout_s, ()) as trial:
        for layer in layers:
            started = time.perf_counter()
            try:
                yield _asked(layer, trial, cases, dtype)
            except Exception as error:  # one broken entry never costs the others their result
                yield _result(layer, started, broken=f"{type(error).__name__}: {error}"[:2000])


def _asked(layer: Layer, trial: AskingTrial, cases: int, dtype: str) -> Result:
    started, subject = time.perf_counter(), PlainName(layer.subject)
    trial.ask(subject.text)
    cells = plan_cells((layer.ep_size,), ("alltoall",), ("eager",), (DTYPES[dtype],))
    result = check(Plan(cells, cases, subject=subject), trial).results[0]
    return _result(layer, started, result)


def _result(
    layer: Layer, started: float, found: CellResult | None = None, broken: str = ""
) -> Result:
    seen_by, stage, line, account = "", "", "", ""
    if found is not None and found.worker_failure is not None:
        case, failure = found.worker_failure
        seen_by, line, account = type(failure).__name__, str(case), str(failure)
    elif found is not None and (outcome := found.first_failure or found.failure) is not None:
        culprit = outcome.verdicts[layer.subject].culprit
        seen_by = (culprit.relation or "truth") if culprit is not None else ""
        stage, line = (culprit.stage if culprit else ""), str(outcome.case)
        account = (found.failure or outcome).explain()
    return Result(
        layer.name,
        "wrong layer" if layer.is_wrong else "right layer",
        layer.source,
        seen_by,
        stage,
        layer.stages,
        found.cases if found is not None else 0,
        found.undecided if found is not None else 0,
        time.perf_counter() - started,
        line,
        account[:2000],
        broken,
    )


def ask_faults(
    faults: Sequence[Fault], stream: Sequence[Case], timeout_s: float
) -> Iterator[Result]:
    """Plant each fault, and run the cases of ``stream`` that it reaches until it is seen."""
    with PlantingTrial("cpu", timeout_s, ("optimized",)) as trial:
        for fault in faults:
            started = time.perf_counter()
            try:
                found = hunt(fault, stream, trial, compare_plain=False)
            except Exception as error:  # one broken entry never costs the others their result
                broken = f"{type(error).__name__}: {error}"[:2000]
                stages = _stages(fault)
                seconds = time.perf_counter() - started
                yield Result(
                    fault.name, "fault", fault.source, "", "", stages, 0, 0, seconds, broken=broken
                )
                continue
            yield Result(
                fault.name,
                "fault",
                fault.source,
                found.seen_by,
                found.stage,
                _stages(fault),
                found.cases,
                0,
                found.seconds,
                str(found.case or ""),
                found.account[:2000],
                reached=found.ran > 0,
            )


def _stages(fault: Fault) -> tuple[str, ...]:
    return tuple(fault.stage.split("|")) if fault.stage else ()


def chosen(only: str) -> tuple[list[Layer], list[Fault]]:
    """Entries by name, all for an empty ``only``."""
    wanted = set(filter(None, only.split(",")))
    layers = [layer for layer in LAYERS.values() if not wanted or layer.name in wanted]
    faults = [fault for fault in PLANTED.values() if not wanted or fault.name in wanted]
    return layers, faults
