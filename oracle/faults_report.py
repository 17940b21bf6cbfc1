"""A campaign's outcome for people (a table) and for programs (JSON)."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from twinmoe.oracle.campaign import Hunt
from twinmoe.oracle.faults import UNPLANTED
from twinmoe.oracle.ledger import Ledger


def show(hunts: Sequence[Hunt], seconds: float, ledger: Ledger, console: Console) -> None:
    """Print the table fault by fault, survivors, and the kill rate."""
    console.print(_table(hunts, ledger))
    for line in summary(hunts, seconds):
        console.print(line, highlight=False, soft_wrap=True)
    for line in unexpected(hunts, ledger):
        console.print(f"NOT as expected: {line}", highlight=False, soft_wrap=True)
    _show_defects(hunts, console)


def _show_defects(hunts: Sequence[Hunt], console: Console) -> None:
    """Tell the first case of each hunt that could not be judged; the JSON has them all."""
    for hunt in hunts:
        if hunt.defects:
            told = f"\n{hunt.fault}: {len(hunt.defects)} not judged: {hunt.defects[0]}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def _table(hunts: Sequence[Hunt], ledger: Ledger) -> Table:
    table = Table(title="planted faults, and what saw them", title_justify="left")
    for name in ("fault", "seen by", "stage"):
        table.add_column(name, overflow="fold")
    for name in ("cases", "seconds", "assert_close"):
        table.add_column(name, justify="right", overflow="fold")
    for hunt in hunts:
        known = ledger.known(hunt.fault.name, hunt.fault.id)
        unseen = f"survived ({known.issue})" if known else "[red]survived[/red]"
        if hunt.defects:
            unseen = f"[red]{len(hunt.defects)} not judged[/red]"
        table.add_row(
            str(hunt.fault) + ("" if hunt.fault.changes_output else " (state)"),
            hunt.seen_by or unseen,
            hunt.stage,
            str(hunt.cases),
            f"{hunt.seconds:.1f}",
            {True: "sees it", False: "blind", None: "-"}[hunt.plain],
        )
    return table


def unexpected(hunts: Sequence[Hunt], ledger: Ledger) -> list[str]:
    """Survivors that the ledger does not know, and faults seen although it does."""
    told = []
    for hunt in hunts:
        known = ledger.known(hunt.fault.name, hunt.fault.id)
        if not hunt.caught and known is None and not hunt.defects:
            told.append(
                f"{hunt.fault} survived {hunt.cases} cases, {hunt.ran} of which could show it"
            )
        elif hunt.caught and known is not None:
            told.append(
                f"{hunt.fault} is seen, though the ledger expects it to survive "
                f"({known.issue}): remove the entry"
            )
    return told


def summary(hunts: Sequence[Hunt], seconds: float) -> list[str]:
    """Kill rate, with state-only faults apart, cases to detection, and the contrast."""
    visible = [hunt for hunt in hunts if hunt.fault.changes_output]
    state = [hunt for hunt in hunts if not hunt.fault.changes_output]
    caught = [hunt for hunt in hunts if hunt.caught]
    lines = [
        f"seen: {_share(visible)} faults of output, {_share(state)} of state alone; "
        f"{sum(bool(hunt.fault.id) for hunt in hunts)} catalogue rows planted, "
        f"{len(UNPLANTED)} listed with the reason why not"
    ]
    if caught:
        cases = [hunt.cases for hunt in caught]
        lines.append(
            f"cases until seen: median {median(cases):.0f}, worst {max(cases)}; {seconds:.0f} s"
        )
    tried = [hunt for hunt in hunts if hunt.plain is not None]
    plain = sum(bool(hunt.plain) for hunt in tried)
    lines.append(
        f"assert_close(atol=2e-2) between the twins, on one plain case each, would have seen "
        f"{plain} of {len(tried)}"
    )
    return lines


def _share(hunts: Sequence[Hunt]) -> str:
    return f"{sum(hunt.caught for hunt in hunts)} of {len(hunts)}"


def show_benign(hunts: Sequence[Hunt], seconds: float, console: Console) -> None:
    """Print each correct variation, and every alarm raised over one."""
    table = Table(title="correct variations, which must pass", title_justify="left")
    for name in ("variation", "what it does"):
        table.add_column(name, overflow="fold")
    table.add_column("cases", justify="right")
    table.add_column("alarms", justify="right")
    for hunt in hunts:
        alarm = "[red]1[/red]" if hunt.caught else "0"
        table.add_row(hunt.fault.name, hunt.fault.what, str(hunt.ran), alarm)
    console.print(table)
    alarms = [hunt for hunt in hunts if hunt.caught]
    for hunt in alarms:
        console.print(f"\n{hunt.account}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(alarms)} alarms over {len(hunts)} correct variations, "
        f"{sum(hunt.ran for hunt in hunts)} cases, {seconds:.0f} s",
        highlight=False,
    )
    _show_defects(hunts, console)


def as_json(hunts: Sequence[Hunt], seconds: float) -> dict[str, Any]:
    """Everything that the tables show, and each failure's account."""
    return {
        "seconds": round(seconds, 1),
        "faults": [
            {
                "name": hunt.fault.name,
                "id": hunt.fault.id,
                "source": hunt.fault.source,
                "what": hunt.fault.what,
                "changes_output": hunt.fault.changes_output,
                "seen_by": hunt.seen_by,
                "stage": hunt.stage,
                "cases": hunt.cases,
                "ran": hunt.ran,
                "seconds": round(hunt.seconds, 2),
                "assert_close": hunt.plain,
                "case": str(hunt.case) if hunt.case else "",
                "account": hunt.account,
                "not_judged": list(hunt.defects),
            }
            for hunt in hunts
        ],
        "unplanted": {row: why.reason for row, why in UNPLANTED.items()},
    }


def write_json(hunts: Sequence[Hunt], seconds: float, path: Path) -> None:
    """Write the JSON report."""
    path.write_text(json.dumps(as_json(hunts, seconds), indent=2) + "\n")
