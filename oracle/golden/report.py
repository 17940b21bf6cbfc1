"""A comparison for people: a table, what ran, what is wrong and the verdict."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from twinmoe.oracle.golden.compare import Compared, Comparison
from twinmoe.oracle.golden.content import Figures
from twinmoe.oracle.golden.target import counted
from twinmoe.oracle.verdict import STAGES

#: Full accounts of so many failed cases are printed; the JSON has them all.
_ACCOUNTS = 5


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, what ran, accounts of failed cases, the machines and the verdict."""
    console.print(stage_table(comparison))
    for line in (*facts(comparison), ran_line(comparison)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    failed = comparison.failed
    for compared in failed[:_ACCOUNTS]:
        text = f"\ncase {compared.question.number}: {compared.account}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(failed) > _ACCOUNTS:
        console.print(f"\n... and {len(failed) - _ACCOUNTS} more failed cases", markup=False)
    for compared in comparison.not_judged[:_ACCOUNTS]:
        text = f"\ncase {compared.question.number}: {compared.account}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for line in (*machines(comparison), *left_open(comparison), verdict_line(comparison)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def stage_table(comparison: Comparison) -> Table:
    """One row for each stage: its worst ratio now and then, and whose bits changed."""
    table = Table(title="error / allowed error by stage (<= 1 is inside)", title_justify="left")
    for heading in ("stage", "worst", "recorded", "at fault", "bits changed since"):
        justify = "right" if heading in ("worst", "recorded") else "left"
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for stage in STAGES:
        at_fault = sum(_at_fault(compared, stage) for compared in comparison.cases)
        table.add_row(
            stage,
            _worst([compared.figures for compared in comparison.cases], stage),
            _worst([one.question.recorded.figures for one in comparison.cases], stage),
            f"[red]{_cases(at_fault)}[/red]" if at_fault else "-",
            _bits(comparison, stage),
        )
    return table


def _cases(count: int) -> str:
    return f"{count} case" if count == 1 else f"{count} cases"


def _at_fault(compared: Compared, stage: str) -> bool:
    findings = [] if compared.verdict is None else compared.verdict.findings
    return any(finding.stage == stage for finding in findings)


def _worst(figures: Sequence[Figures], stage: str) -> str:
    """The largest ratio that any case had there; a gather is a copy, judged by its bits."""
    ratios = [each.ratios[stage] for each in figures if stage in each.ratios]
    worst = max(ratios, default=None)
    return "-" if worst is None else f"{worst:.2f}" if worst < 100 else f"{worst:.2g}"


def facts(comparison: Comparison) -> list[str]:
    """Near ties, blind slots, flips and their direction: what a ratio does not say."""
    now = [compared.figures for compared in comparison.cases]
    # in fp32 hardly any two orders of summation agree: flips mean little there
    narrow = [c for c in comparison.cases if c.question.case.config.dtype.itemsize == 2]
    flips = _share([c.figures for c in narrow], "flips", "elements")
    before = _share([c.question.recorded.figures for c in narrow], "flips", "elements")
    signed = sum(c.figures.signed for c in narrow)
    sign = sum(c.figures.sign for c in narrow) / max(signed, 1)
    tokens, slots = (sum(getattr(each, name) for each in now) for name in ("tokens", "slots"))
    ambiguous = sum(each.ambiguous for each in now)
    blind = slots - sum(each.visible for each in now)
    lines = [
        f"{ambiguous} of {tokens} tokens have near-tied scores; {blind} of {slots} slots blind"
    ]
    if narrow:
        lines.append(
            f"16-bit outputs: {flips} differ from the rounded truth (recorded {before}); "
            f"mean sign {sign:+.2f} in {signed} tokens"
        )
    return lines


def _share(figures: Sequence[Figures], part: str, whole: str) -> str:
    total = sum(getattr(each, whole) for each in figures)
    return (
        f"{100 * sum(getattr(each, part) for each in figures) / total:.2f} %" if total else "none"
    )


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
    other = sum(one.changed is None and one.verdict is not None for one in comparison.cases)
    bits = f"; {other} on another path than recorded: no bits compared" if other else ""
    return f"ran: {', '.join(f'{count}x {path}' for path, count in counts.items())}{bits}"


def _ran(compared: Compared) -> str:
    before, now = compared.question.recorded.case.ep_size, compared.question.ep_size
    size = f"EP {now}" if before == now else f"EP {before} -> {now}"
    return f"{size} {compared.verdict.contract.name if compared.verdict else 'failed'}"


def machines(comparison: Comparison) -> list[str]:
    """Where it was recorded and where it was compared; one line where that is the same."""
    before, now = dict(comparison.golden.environment), comparison.environment
    recorded = f"recorded on {', '.join(before.values())}"
    if before == now:
        return [f"{recorded}; compared there"]
    return [recorded, f"compared on {', '.join(now.values())}"]


def left_open(comparison: Comparison) -> list[str]:
    """Cases about which nothing was shown, and why."""
    total, subject = len(comparison.golden.cases), comparison.target.subject
    lines = []
    if not_run := comparison.not_run:
        lines.append(
            f"not run: {len(not_run)} of {total} cases: {subject} does not declare their "
            f"{counted(not_run)}"
        )
    if undecided := sum(one.undecided for one in comparison.cases):
        lines.append(
            f"undecided: {undecided} of {total} cases: scores nearly tie, and {subject} shows no "
            "expert ids; return (out, Taps(ids_TK=...)) to have them judged"
        )
    return lines


def verdict_line(comparison: Comparison) -> str:
    """The verdict, and where it is not equivalent the first stages at fault."""
    not_judged = len(comparison.not_judged)
    count = sum(not compared.undecided for compared in comparison.cases) - not_judged
    if not_judged and not comparison.failed:
        return f"no verdict: {_cases(not_judged)} not judged: a defect of twinmoe"
    if not comparison.decided:
        return "nothing shown: every case is undecided"
    if comparison.equivalent:
        worst = max((c.figures.ratios.get("output", 0.0) for c in comparison.cases), default=0.0)
        return f"equivalent: {_cases(count)}, worst ratio {worst:.2f}"
    failed = comparison.failed
    named = dict.fromkeys(culprit_stage(compared) for compared in failed)
    proven = sum(compared.proven for compared in failed)
    grade = f", {proven} of them beyond any rounding" if proven else ""
    return f"NOT equivalent: {len(failed)} of {_cases(count)}, at fault: {', '.join(named)}{grade}"


def culprit_stage(compared: Compared) -> str:
    """The stage at fault in a failed case, or what else is wrong."""
    if not compared.judged:
        return "not judged"
    if compared.verdict is None:
        return "a worker failed"
    culprit = compared.verdict.culprit
    return culprit.stage if culprit else "undecided"
