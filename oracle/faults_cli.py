"""``twinmoe faults``: plant every known fault and see whether the judge sees it."""

import itertools
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import torch

from twinmoe.oracle import doctor as diagnosis
from twinmoe.oracle import faults_report
from twinmoe.oracle.campaign import Hunt, case_stream, hunt
from twinmoe.oracle.case import Case
from twinmoe.oracle.exit_codes import verdict_code
from twinmoe.oracle.faults import FAULTS, VARIANTS, Fault
from twinmoe.oracle.ledger import Ledger
from twinmoe.oracle.strategies import EP_SIZES
from twinmoe.oracle.terminal import (
    Report,
    check_writable,
    console,
    device_option,
    finish,
    json_option,
    progress,
    say,
    timeout_option,
)
from twinmoe.oracle.trial import Trial
from twinmoe.reference.config import ConfigError

#: Cases after which a fault counts as survivor, and a variant as harmless.
_BUDGET, _BENIGN_CASES = 500, 24


@click.command(name="faults")
@click.option("--only", default="", help="Names, catalogue ids, or classes of ids (CL for CL01).")
@click.option("--benign", is_flag=True, help="Plant correct variations: all of them must pass.")
@click.option(
    "--budget", type=click.IntRange(1),
    help=f"Cases of the stream for each; {_BUDGET}, or {_BENIGN_CASES} with --benign.",
)  # fmt: skip
@click.option(
    "--ep", "ep_sizes", help="Expert-parallel sizes; 1,2,4,8 by default, as far as there are GPUs."
)
@device_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stream of cases.")
@timeout_option(12.0)
@click.option(
    "--ledger", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Known survivors, each with its public issue.",
)  # fmt: skip
@json_option
def faults(
    only: str,
    benign: bool,
    budget: int | None,
    ep_sizes: str | None,
    device: str,
    seed: int,
    timeout: float,
    ledger: Path | None,
    json_file: Path | None,
) -> None:
    """Plant each fault of the registry, search until it is seen, and show what saw it.

    Exit 1 if a fault survives that the ledger does not know, or is seen although it does.
    With --benign, exit 1 if a correct variation is taken for a fault.  Exit 2 if the judge itself
    fails on a case, and nothing else is wrong.  On a GPU, faults that no
    case there can reach are listed; on a CPU there are none such.
    """
    diagnosis.require(device)
    check_writable(json_file, "--json")
    chosen = _chosen(only, VARIANTS if benign else FAULTS)
    known = Ledger.load(ledger)
    if gone := known.unknown_names(name for fault in chosen for name in (fault.name, fault.id)):
        raise ConfigError(
            f"ledger ({ledger}) speaks of {', '.join(gone)}, which is not planted here: remove "
            "the entry, or correct its name"
        )
    cases = budget or (_BENIGN_CASES if benign else _BUDGET)
    stream = case_stream(cases, seed, _sizes(ep_sizes, device), device)
    start = time.perf_counter()
    hunts = _with_progress(chosen, stream, device, timeout, stop_at_first=not benign)
    seconds = time.perf_counter() - start
    if benign:
        faults_report.show_benign(hunts, seconds, console)
        passed = not any(hunt.caught for hunt in hunts)
    else:
        reached = [hunt for hunt in hunts if device == "cpu" or hunt.ran]
        faults_report.show(reached, seconds, known, console)
        if names := ", ".join(str(hunt.fault) for hunt in hunts if hunt not in reached):
            say(f"out of reach on {device}: {names}")
        passed = bool(reached) and not faults_report.unexpected(reached, known)
    finish(
        verdict_code(wrong=not passed, not_judged=any(hunt.defects for hunt in hunts)),
        Report("--json", json_file, partial(faults_report.write_json, hunts, seconds)),
    )


def _chosen(only: str, registry: dict[str, Fault]) -> list[Fault]:
    if not only:
        return list(registry.values())
    wanted = [part.strip() for part in only.split(",")]
    answers = [[fault for fault in registry.values() if _is(fault, name)] for name in wanted]
    if unknown := [name for name, found in zip(wanted, answers, strict=True) if not found]:
        raise ConfigError(
            f"--only ({only}) names {', '.join(map(repr, unknown))}, which is not in the registry: "
            f"use names, ids or classes of {', '.join(map(str, registry.values()))}"
        )
    return list(dict.fromkeys(itertools.chain.from_iterable(answers)))


def _is(fault: Fault, name: str) -> bool:
    """By its name, by its row in the catalogue, or by the class of that row: CL01 is a CL."""
    return name != "" and name in (fault.name, fault.id, fault.id.rstrip("0123456789"))


def _sizes(text: str | None, device: str) -> list[int]:
    if text is None:
        most = torch.cuda.device_count() if device == "cuda" else max(EP_SIZES)
        return [size for size in EP_SIZES if size <= most]
    sizes = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if unknown := [size for size in sizes if size not in EP_SIZES]:
        raise ConfigError(
            f"--ep ({text!r}) has {len(unknown)} size(s) that the stream does not draw: choose "
            f"from {', '.join(map(str, EP_SIZES))}"
        )
    return sizes


def _with_progress(
    chosen: Sequence[Fault],
    stream: Sequence[Case],
    device: str,
    timeout_s: float,
    *,
    stop_at_first: bool,
) -> list[Hunt]:
    with (
        progress("starting workers", len(chosen), columns=40) as advance,
        Trial(device, timeout_s, ("optimized",)) as trial,
    ):

        def tell(fault: Fault, number: int) -> None:
            advance(f"{fault}: case {number}"[:40], steps=0)

        hunts = []
        for fault in chosen:
            hunts.append(hunt(fault, stream, trial, tell, compare_plain=stop_at_first))
            advance()
        return hunts
