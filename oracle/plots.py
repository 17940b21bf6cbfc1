"""Pictures of measurements, for those who have matplotlib (the extra ``twinmoe[plot]``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twinmoe.oracle.calibrate import PathRecord
from twinmoe.oracle.compare_criteria import CORRECT, SUBJECTS, CriteriaTable
from twinmoe.oracle.criteria import CRITERIA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PlotError(RuntimeError):
    """A picture was asked for that cannot be drawn here."""


def require_matplotlib(path: Path) -> None:
    """Raise PlotError, before any measuring, unless ``path`` can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - an optional extra
    except ImportError:
        raise PlotError(
            f"--plot ({path}) needs matplotlib, which is not installed: "
            "run pip install 'twinmoe[plot]', or leave the option out"
        ) from None
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise PlotError(
            f"--plot ({path}) has no known format: name a file that ends in .png, .pdf or .svg"
        )


def draw_criteria(table: CriteriaTable, path: Path) -> None:
    """Save a heat map: criteria against subjects, the share flagged in each cell."""
    figure = _figure(width=10.5, height=4.6)
    axes = figure.add_subplot()
    names = list(CRITERIA)
    shares = [[100 * table.share(name, subject) for subject in SUBJECTS] for name in names]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=200, aspect="auto")
    for row, name in enumerate(names):
        for column, subject in enumerate(SUBJECTS):
            wrong = shares[row][column] > 0 if subject == CORRECT else shares[row][column] < 100
            axes.text(
                column,
                row,
                f"{shares[row][column]:.0f}",
                ha="center",
                va="center",
                color="firebrick" if wrong else "black",
                weight="bold" if name == names[-1] else "normal",
            )
    axes.axvline(0.5, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(SUBJECTS)), SUBJECTS, rotation=40, ha="right")
    axes.set_title(
        f"% of {table.draws} layers ({table.size}, bf16) called wrong; red: should be 0 "
        "for correct, 100 for the rest",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)


def draw_paths(records: Sequence[PathRecord], path: Path) -> None:
    """Save two panels: each case's worst ratio, and its flips beside what was expected."""
    figure = _figure(width=10.5, height=1.6 + 0.24 * len(records))
    ratios, flips = figure.subplots(1, 2, sharey=True)
    names = [f"{record.path}, EP {record.ep_size}" for record in records]
    for row, record in enumerate(records):
        _dots(ratios, record.ratios, row, "steelblue")
        _dots(flips, [100 * share for share in record.expected], row, "lightgrey")
        _dots(flips, [100 * share for share in record.flips], row, "steelblue")
    flips.set_xscale("symlog", linthresh=0.1)
    ratios.axvline(1, color="firebrick", linewidth=1)
    ratios.set_yticks(range(len(names)), names, fontsize=8)
    ratios.invert_yaxis()
    ratios.set_xlabel("worst error / allowed error of a case (1: the bound)")
    flips.set_xlabel("% of elements that differ from the rounded truth\n(grey: expected bound)")
    figure.savefig(path, dpi=100)


def _dots(axes: "Axes", values: Sequence[float], row: int, color: str) -> None:
    axes.plot(values, [row] * len(values), "o", color=color, markersize=3.5, alpha=0.7)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    return Figure(figsize=(width, height), layout="constrained")
