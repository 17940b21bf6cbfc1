"""A comparison for programs (JSON) and for CI servers (JUnit XML)."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from twinmoe.oracle.golden.compare import Compared, Comparison
from twinmoe.oracle.golden.content import Figures
from twinmoe.oracle.golden.report import culprit_stage

#: Characters that XML 1.0 has no way to hold, and a layer's error message may: terminal colours.
_UNTELLABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_json(comparison: Comparison, path: Path) -> None:
    """Write the JSON report."""
    path.write_text(json.dumps(as_json(comparison), indent=2) + "\n")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything the table shows, and the recorded figures beside it."""
    return {
        "equivalent": comparison.equivalent,
        "recorded": dict(comparison.golden.environment),
        "compared": comparison.environment,
        "subject": comparison.target.subject,
        "fault": comparison.target.fault or None,
        "cases": [_case_json(compared) for compared in comparison.cases],
        "not_run": [
            {"recorded_case": str(one.recorded.case), "why": list(one.why)}
            for one in comparison.not_run
        ],
    }


def _case_json(compared: Compared) -> dict[str, Any]:
    return {
        "recorded_case": str(compared.question.recorded.case),
        "case": str(compared.question.case),
        "ep_size": compared.question.ep_size,
        "equivalent": compared.equivalent,
        "undecided": compared.undecided,
        "proven": compared.proven,
        "stage": None if compared.equivalent else culprit_stage(compared),
        "path": compared.verdict.path if compared.verdict else None,
        "contract": compared.verdict.contract.name if compared.verdict else None,
        "figures": _figures_json(compared.figures),
        "recorded_figures": _figures_json(compared.question.recorded.figures),
        "bits_changed": compared.changed,
        "mistakes": list(compared.mistakes),
        "account": compared.account or None,
    }


def _figures_json(figures: Figures) -> dict[str, Any]:
    told = asdict(figures)
    # JSON has no infinity
    told["ratios"] = {
        stage: ratio if math.isfinite(ratio) else str(ratio)
        for stage, ratio in figures.ratios.items()
    }
    return told


def junit(comparison: Comparison) -> Xml.Element:
    """One test case for each case, with figures as properties; a failure tells its account.

    In the format that CI servers read from Ant's junit task: testsuite, testcase, failure, error,
    and skipped for a case that shows nothing.
    """
    failed = comparison.failed
    broken = [compared for compared in failed if compared.verdict is None]
    not_judged = comparison.not_judged
    undecided = [compared for compared in comparison.cases if compared.undecided]
    suite = Xml.Element(
        "testsuite",
        name="twinmoe golden",
        tests=str(len(comparison.golden.cases)),
        failures=str(len(failed) - len(broken)),
        errors=str(len(broken) + len(not_judged)),
        skipped=str(len(undecided) + len(comparison.not_run)),
    )
    compared_at = {one.question.number: one for one in comparison.cases}
    why_not_at = {one.number: ", ".join(one.why) for one in comparison.not_run}
    for number, recorded in enumerate(comparison.golden.cases):
        name = f"case {number}: {recorded.case}"
        test = Xml.SubElement(suite, "testcase", classname="twinmoe.golden", name=name)
        if number in why_not_at:
            Xml.SubElement(test, "skipped", message=f"not run: {why_not_at[number]}")
        else:
            _tell(test, compared_at[number])
    return suite


def _tell(test: Xml.Element, compared: Compared) -> None:
    properties = Xml.SubElement(test, "properties")
    for stage, ratio in compared.figures.ratios.items():
        Xml.SubElement(properties, "property", name=f"ratio.{stage}", value=f"{ratio:.6g}")
    if compared.undecided:
        Xml.SubElement(test, "skipped", message="undecided: near ties, and no expert ids shown")
    elif not compared.equivalent:
        kind = "error" if compared.verdict is None else "failure"
        told = Xml.SubElement(test, kind, message=culprit_stage(compared))
        told.text = _UNTELLABLE.sub("?", compared.account)


def write_junit(comparison: Comparison, path: Path) -> None:
    """Write the JUnit report."""
    suite = junit(comparison)
    Xml.indent(suite)
    Xml.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
