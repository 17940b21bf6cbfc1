"""``python -m tests.meta.survey``: both surveys before the judge; see docs/faults.md."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tests.meta.survey.asking import ask_faults, ask_layers, chosen, load_entries
from tests.meta.survey.results import Result, keep, load, refuted, summary
from twinmoe.oracle.campaign import case_stream


@click.command()
@click.option("--only", default="", help="Entries by name, parted by commas.")
@click.option("--layers/--no-layers", default=True, help="Ask layers of public style.")
@click.option("--faults/--no-faults", default=True, help="Plant faults in the optimized twin.")
@click.option("--cases", default=20, show_default=True, help="Random cases for each layer.")
@click.option("--dtype", default="bf16", show_default=True, help="Of the layers.")
@click.option("--budget", default=300, show_default=True, help="Cases of the faults' stream.")
@click.option("--ep", default="1,2,4", show_default=True, help="Ranks in the faults' stream.")
@click.option("--seed", default=0, show_default=True, help="Of the faults' stream.")
@click.option("--timeout", default=20.0, show_default=True, help="Seconds a worker may take.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Append results here.")
@click.option("--show", type=click.Path(exists=True, path_type=Path), help="Only sum these up.")
@click.option("--refuted", "lines", is_flag=True, help="With --show: the lines of refuted.txt.")
def main(
    only: str,
    layers: bool,
    faults: bool,
    cases: int,
    dtype: str,
    budget: int,
    ep: str,
    seed: int,
    timeout: float,
    file: Path | None,
    show: Path | None,
    lines: bool,
) -> None:
    """Print detection, cases until seen, stages, and what was not seen; exit 1 on an alarm."""
    if show is not None:
        click.echo(refuted(load(show)) if lines else summary(load(show)), nl=not lines)
        return
    load_entries()
    results: list[Result] = []
    asked_layers, asked_faults = chosen(only)

    def note(result: Result) -> None:
        results.append(result)
        keep(result, file)
        seen = result.broken or result.seen_by or "not seen"
        click.echo(f"{result.kind} {result.name}: {seen} {result.stage} ({result.cases} cases)")

    if layers:
        for result in ask_layers(asked_layers, cases, dtype, timeout):
            note(result)
    if faults and asked_faults:
        stream = case_stream(budget, seed, [int(size) for size in ep.split(",")])
        for result in ask_faults(asked_faults, stream, timeout):
            note(result)
    click.echo(summary(results))
    sys.exit(1 if any(r.kind == "right layer" and r.seen_by for r in results) else 0)


if __name__ == "__main__":
    main()
