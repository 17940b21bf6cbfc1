"""``twinmoe bench``: latencies per stage beside their floors and beside the other paths."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.table import Table

from twinmoe.optimized.experts import BACKENDS, choose_backend
from twinmoe.optimized.experts.timings import Shape, Timing, Timings
from twinmoe.oracle import doctor
from twinmoe.oracle.bench import LINK_RATE, MEMORY_RATE, Request, Row, measure, slowest
from twinmoe.oracle.exit_codes import EQUIVALENT
from twinmoe.oracle.terminal import (
    Report,
    check_writable,
    console,
    finish,
    json_option,
    ranks_of,
    timeout_option,
)
from twinmoe.oracle.torchrun import largest_world, open_world
from twinmoe.reference.config import ConfigError
from twinmoe.reference.published import PUBLISHED, published, scaled

#: Tokens of a rank; more are no decode step, and symmetric memory would have to hold them.
_MOST_TOKENS = 65536


@click.command()
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(PUBLISHED)),
    default=("qwen3-30b-a3b", "deepseek-v3"), show_default=True, help="Published geometries.",
)  # fmt: skip
@click.option(
    "--gpus", default="", help="Expert-parallel sizes, as 1,2,4; by default what is here."
)
@click.option("--tokens", default="1,4,16,64", show_default=True, help="Tokens of each rank.")
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(list(BACKENDS)),
    help="Expert backends; all usable by default.",
)  # fmt: skip
@click.option(
    "--scale", type=click.IntRange(1), default=1, help="Divide the models' widths by this."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True,
    help="On a CPU the figures mean nothing.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@timeout_option(180.0)
@json_option
@click.option(
    "--record", "record_file", type=click.Path(path_type=Path),
    help="Add the experts' times to this file: InferenceOptions(experts_record=...) goes by it.",
)  # fmt: skip
def bench(
    models: Sequence[str],
    gpus: str,
    tokens: str,
    backends: Sequence[str],
    scale: int,
    device: str,
    seed: int,
    timeout: float,
    json_file: Path | None,
    record_file: Path | None,
) -> None:
    """Time router, collectives, experts and whole layers in graph replay.

    Slowest rank, median of 20 replays of 16 calls with weights colder than L2.  The floor is
    the time that the bytes of the experts in use, or the bytes on the links, need at least.
    """
    doctor.require(device)
    check_writable(json_file, "--json")
    check_writable(record_file, "--record")
    sizes = ranks_of(gpus, "--gpus") if gpus else _sizes_here(device)
    counts = _counts(tokens)
    for model, size, backend in itertools.product(models, sizes, backends):
        config = scaled(published(model), scale)
        choose_backend(backend, config, torch.device(device), ranks=size)
    known = Timings()
    if record_file is not None and record_file.exists():
        known = Timings.load(record_file)
    rows: list[Row] = []
    for size in sizes:
        with open_world(size, device, timeout) as world:
            for model in models:
                config = scaled(published(model), scale)
                config.check_ep_size(size)
                for count in counts:
                    request = Request(model, config, count, tuple(backends), seed=seed)
                    rows += slowest(world.run(measure, request))
    console.print(table(rows))
    rates = {"memory_rate": MEMORY_RATE, "link_rate": LINK_RATE, "versions": doctor.versions()}
    measured = json.dumps(rates | {"rows": [asdict(row) for row in rows]}, indent=1)
    timings = known.updated(expert_timings(rows, scale, torch.device(device)))
    finish(
        EQUIVALENT,
        Report("--json", json_file, lambda path: path.write_text(measured)),
        Report("--record", record_file, timings.save),
    )


def expert_timings(rows: Sequence[Row], scale: int, device: torch.device) -> Timings:
    """What was measured of expert backends, by the shape of one rank's share."""
    taken: dict[tuple[Shape, int], dict[str, float]] = {}
    for row in rows:
        if row.stage == "experts":
            shape = Shape.of(scaled(published(row.model), scale), row.gpus, device)
            taken.setdefault((shape, row.gpus * row.tokens), {})[row.path] = row.us
    return Timings(Timing(shape, count, us) for (shape, count), us in taken.items())


def table(rows: Sequence[Row]) -> Table:
    """One line per measurement; ``ratio`` is to the quickest path of the same stage and size."""
    shown = Table(title="microseconds in graph replay, slowest rank", title_justify="left")
    for name in ("model", "GPUs", "tokens/rank", "stage", "path"):
        shown.add_column(name, overflow="fold")
    for name in ("us", "floor", "% of floor rate", "ratio"):
        shown.add_column(name, justify="right", no_wrap=name != "% of floor rate")
    for row in rows:
        alike = [r.us for r in rows if _where(r) == _where(row)]
        shown.add_row(
            *map(str, _where(row)),
            row.path,
            f"{row.us:.1f}",
            f"{row.floor_us:.1f}",
            f"{100 * row.floor_us / row.us:.0f}",
            f"{row.us / min(alike):.2f}",
        )
    return shown


def _where(row: Row) -> tuple[str, int, int, str]:
    return row.model, row.gpus, row.tokens, row.stage


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--tokens ({text!r}) is not a list of counts: write 1,2,4") from None
    if not 1 <= min(counts) <= max(counts) <= _MOST_TOKENS:
        raise ConfigError(
            f"--tokens ({text!r}) must be counts from 1 to {_MOST_TOKENS}: each rank holds so many "
            "rows in symmetric memory; write 1,2,4"
        )
    return counts


def _sizes_here(device: str) -> list[int]:
    here = largest_world() or (torch.cuda.device_count() if device == "cuda" else 1)
    return [size for size in (1, 2, 4, 8) if size <= here]
