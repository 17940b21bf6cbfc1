"""What a survey found of one entry, as a line of JSON and in a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Result:
    """One entry of a survey before the judge.

    ``kind`` is "fault", "wrong layer" or "right layer".  ``cases`` were asked until the judge
    saw something, or in all; ``seen_by`` names what saw it, empty for nothing; ``stage`` is the
    one that the verdict names, ``stages`` those that it may name.  ``line`` replays it.
    ``broken`` says why the entry could not be asked at all, ``reached`` whether any case was such
    that the mistake could matter.
    """

    name: str
    kind: str
    source: str
    seen_by: str
    stage: str
    stages: tuple[str, ...]
    cases: int
    undecided: int
    seconds: float
    line: str = ""
    account: str = ""
    broken: str = ""
    reached: bool = True

    @property
    def named_right(self) -> bool:
        """Whether the verdict names a stage that it may name; a failed process names none."""
        return self.stage in self.stages or (not self.stages and not self.stage)


def keep(result: Result, file: Path | None) -> None:
    """Append ``result`` to ``file``: one that is interrupted has what came before."""
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")


def load(file: Path) -> list[Result]:
    """Read what :func:`keep` wrote."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [Result(**record | {"stages": tuple(record["stages"])}) for record in records]


def refuted(results: Sequence[Result]) -> str:
    """The lines of ``refuted.txt``: each entry that was seen, and the case that refuted it."""
    return "".join(
        f"{result.name} {result.line}\n"
        for result in results
        if result.seen_by and result.kind != "right layer"
    )


def summary(results: Sequence[Result]) -> str:
    """Detection, median cases, stages named right, and what was not seen, by kind."""
    told = []
    for kind in ("fault", "wrong layer"):
        asked = [r for r in results if r.kind == kind and r.reached and not r.broken]
        seen = [r for r in asked if r.seen_by]
        if not asked:
            continue
        told.append(
            f"{kind}s: {len(seen)} of {len(asked)} seen, median "
            f"{median([r.cases for r in seen]) if seen else '-'} cases, stage named right "
            f"{sum(r.named_right for r in seen)} of {len(seen)}"
        )
        told += [f"  not seen: {r.name} ({r.source})" for r in asked if not r.seen_by]
        told += [
            f"  stage {r.stage or 'none'} for {r.name}, expected {' or '.join(r.stages) or 'none'}"
            for r in seen
            if not r.named_right
        ]
    right = [r for r in results if r.kind == "right layer" and not r.broken]
    if right:
        alarms = [r for r in right if r.seen_by]
        told.append(f"right layers: {len(alarms)} alarms over {len(right)}")
        told += [f"  ALARM: {r.name} at {r.line}" for r in alarms]
    told += [f"not reached by any case: {r.name}" for r in results if not r.reached]
    told += [f"broken: {r.name}: {r.broken}" for r in results if r.broken]
    return "\n".join(told)
