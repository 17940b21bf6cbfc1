"""A comparison for people (a table), for programs (JSON) and for CI servers (JUnit XML)."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from rich.console import Console
from rich.table import Table

from twinmoe.oracle.golden.compare import Compared, Comparison
from twinmoe.oracle.golden.content import Figures
from twinmoe.oracle.verdict import STAGES

#: Full accounts of so many failed cases are printed; the JSON has them all.
_ACCOUNTS = 5


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, what ran, accounts of failed cases, the machines and the verdict."""
    console.print(stage_table(comparison))
    console.print(ran_line(comparison), markup=False, highlight=False, soft_wrap=True)
    failed = [compared for compared in comparison.cases if not compared.equivalent]
    for compared in failed[:_ACCOUNTS]:
        number = comparison.cases.index(compared)
        text = f"\ncase {number}: {compared.account}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(failed) > _ACCOUNTS:
        console.print(f"\n... and {len(failed) - _ACCOUNTS} more failed cases", markup=False)
    for line in (*machines(comparison), verdict_line(comparison)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def stage_table(comparison: Comparison) -> Table:
    """One row for each stage: its worst ratio now and then, and what else it shows."""
    table = Table(title="error / allowed error by stage (<= 1 is inside)", title_justify="left")
    for heading in ("stage", "worst", "recorded", "at fault", "also", "bits changed"):
        justify = "right" if heading in ("worst", "recorded") else "left"
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    also = _also(comparison)
    for stage in STAGES:
        at_fault = sum(_at_fault(compared, stage) for compared in comparison.cases)
        cases = "case" if at_fault == 1 else "cases"
        table.add_row(
            stage,
            _worst([compared.figures for compared in comparison.cases], stage),
            _worst([compared.recorded.figures for compared in comparison.cases], stage),
            f"[red]{at_fault} {cases}[/red]" if at_fault else "-",
            also.get(stage, ""),
            _bits(comparison, stage),
        )
    return table


def _at_fault(compared: Compared, stage: str) -> bool:
    findings = [] if compared.verdict is None else compared.verdict.findings
    return any(finding.stage == stage for finding in findings)


def _worst(figures: Sequence[Figures], stage: str) -> str:
    """The largest ratio that any case had there; a gather is a copy, and has none."""
    ratios = [each.ratios[stage] for each in figures if stage in each.ratios]
    worst = max(ratios, default=None)
    return "-" if worst is None else f"{worst:.2f}" if worst < 100 else f"{worst:.2g}"


def _also(comparison: Comparison) -> dict[str, str]:
    now = [compared.figures for compared in comparison.cases]
    # in fp32 hardly any two orders of summation agree: flips mean little there
    narrow = [c for c in comparison.cases if c.case.config.dtype.itemsize == 2]
    flips = _share([c.figures for c in narrow], "flips", "elements")
    before = _share([c.recorded.figures for c in narrow], "flips", "elements")
    signed = sum(c.figures.signed for c in narrow)
    mean = sum(c.figures.sign for c in narrow) / max(signed, 1)
    sign = f"mean sign {mean:+.2f} in {signed} tokens"
    ambiguous = sum(each.ambiguous for each in now)
    slots = sum(each.slots for each in now)
    blind = slots - sum(each.visible for each in now)
    return {
        "router": f"{ambiguous} of {sum(each.tokens for each in now)} tokens ambiguous",
        "experts": f"{blind} of {slots} slots blind",
        "dispatch": "a copy: judged by its bits",
        "output": f"16 bit: {flips} flips (recorded {before}), {sign}",
    }


def _share(figures: Sequence[Figures], part: str, whole: str) -> str:
    total = sum(getattr(each, whole) for each in figures)
    return f"{100 * sum(getattr(each, part) for each in figures) / total:.2f} %" if total else "no"


#: The stage that makes each tensor whose bits are compared.
_MADE_BY = {"ids": "router", "weights": "router", "routed": "combine", "output": "output"}


def _bits(comparison: Comparison, stage: str) -> str:
    told = []
    for name, maker in _MADE_BY.items():
        pairs = [(c.changed or {}).get(name, (0, 0)) for c in comparison.cases]
        changed, total = (sum(column) for column in zip(*pairs, strict=True))
        if maker == stage and total:
            told.append(f"{name} {changed} of {total}")
    return ", ".join(told) or "-"


def ran_line(comparison: Comparison) -> str:
    """How many cases took which path, on how many ranks, and for how many that was new."""
    counts = Counter(_ran(compared) for compared in comparison.cases)
    other = sum(compared.changed is None for compared in comparison.cases)
    bits = f"; {other} on another path than recorded: no bits compared" if other else ""
    return f"ran: {', '.join(f'{count}x {path}' for path, count in counts.items())}{bits}"


def _ran(compared: Compared) -> str:
    before, now = compared.recorded.case.ep_size, compared.ep_size
    size = f"EP {now}" if before == now else f"EP {before} -> {now}"
    return f"{size} {compared.verdict.contract.name if compared.verdict else 'failed'}"


def machines(comparison: Comparison) -> list[str]:
    """Where it was recorded and where it was compared; one line where that is the same."""
    before, now = dict(comparison.golden.environment), comparison.environment
    recorded = f"recorded on {', '.join(before.values())}"
    if before == now:
        return [f"{recorded}; compared there"]
    return [recorded, f"compared on {', '.join(now.values())}"]


def verdict_line(comparison: Comparison) -> str:
    """The verdict, and where it is not equivalent the first stage at fault."""
    count = len(comparison.cases)
    if comparison.equivalent:
        worst = max((c.figures.ratios.get("output", 0.0) for c in comparison.cases), default=0.0)
        return f"equivalent: {count} cases, worst ratio {worst:.2f}"
    failed = [compared for compared in comparison.cases if not compared.equivalent]
    named = dict.fromkeys(culprit_stage(compared) for compared in failed)
    return f"NOT equivalent: {len(failed)} of {count} cases, at fault: {', '.join(named)}"


def culprit_stage(compared: Compared) -> str:
    """The stage at fault in a failed case, or what else is wrong."""
    if compared.verdict is None:
        return "a worker failed"
    culprit = compared.verdict.culprit
    return culprit.stage if culprit else "inconclusive"


# --- for programs -----------------------------------------------------------------------------


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything the table shows, and the recorded figures beside it."""
    return {
        "equivalent": comparison.equivalent,
        "recorded": dict(comparison.golden.environment),
        "compared": comparison.environment,
        "fault": comparison.target.fault or None,
        "cases": [_case_json(compared) for compared in comparison.cases],
    }


def _case_json(compared: Compared) -> dict[str, Any]:
    return {
        "recorded_case": str(compared.recorded.case),
        "case": str(compared.case),
        "ep_size": compared.ep_size,
        "equivalent": compared.equivalent,
        "stage": None if compared.equivalent else culprit_stage(compared),
        "path": compared.verdict.path if compared.verdict else None,
        "contract": compared.verdict.contract.name if compared.verdict else None,
        "figures": _figures_json(compared.figures),
        "recorded_figures": _figures_json(compared.recorded.figures),
        "bits_changed": compared.changed,
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

    In the format that CI servers read from Ant's junit task: testsuite, testcase, failure, error.
    """
    failed = [c for c in comparison.cases if not c.equivalent]
    broken = [c for c in failed if c.verdict is None]
    suite = Xml.Element(
        "testsuite",
        name="twinmoe golden",
        tests=str(len(comparison.cases)),
        failures=str(len(failed) - len(broken)),
        errors=str(len(broken)),
    )
    for number, compared in enumerate(comparison.cases):
        name = f"case {number}: {compared.recorded.case}"
        test = Xml.SubElement(suite, "testcase", classname="twinmoe.golden", name=name)
        properties = Xml.SubElement(test, "properties")
        for stage, ratio in compared.figures.ratios.items():
            Xml.SubElement(properties, "property", name=f"ratio.{stage}", value=f"{ratio:.6g}")
        if not compared.equivalent:
            kind = "error" if compared.verdict is None else "failure"
            told = Xml.SubElement(test, kind, message=culprit_stage(compared))
            told.text = compared.account
    return suite


def write_junit(comparison: Comparison, path: Path) -> None:
    """Write the JUnit report."""
    suite = junit(comparison)
    Xml.indent(suite)
    Xml.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
