"""Measured times of expert backends, by shape of the layer, and who was the quickest.

``twinmoe bench --record FILE`` measures and writes them; ``h200.json`` beside this module holds
those of docs/h200.md.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any, Self

import torch

from twinmoe.reference.config import ConfigError, MoEConfig, dtype_name
from twinmoe.reference.files import parse_json, read_text

#: Measured for this project, and used where no other record is named.
SHIPPED = Path(__file__).with_name("h200.json")


@dataclass(frozen=True)
class Shape:
    """What decides how long one rank's experts take, beside their rows."""

    device: str
    dtype: str
    hidden_size: int
    moe_intermediate_size: int
    gated: bool
    local_experts: int
    num_experts_per_tok: int

    @classmethod
    def of(cls, config: MoEConfig, ranks: int, device: torch.device) -> Self:
        """The share that one of ``ranks`` has of a layer, on a device like ``device``."""
        on_gpu = device.type == "cuda"
        return cls(
            torch.cuda.get_device_name(device) if on_gpu else device.type,
            dtype_name(config.dtype),
            config.hidden_size,
            config.moe_intermediate_size,
            config.gated,
            config.num_experts // ranks,
            config.num_experts_per_tok,
        )


@dataclass(frozen=True)
class Timing:
    """Microseconds of each backend, by name, on so many rows of all ranks."""

    shape: Shape
    rows: int
    us: Mapping[str, float]


class Timings:
    """A record of measurements; one for each shape and number of rows."""

    def __init__(self, measured: Iterable[Timing] = ()) -> None:
        self._measured = {(timing.shape, timing.rows): timing for timing in measured}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record.  Raises ConfigError for a file that is none."""
        try:
            told = parse_json(read_text(path))
            if not isinstance(told, list):
                raise ValueError("no list of them")
            return cls(map(_timing, told))
        except OSError as error:
            raise ConfigError(
                f"expert timings ({path}) cannot be read: {error.strerror or error}; name a file "
                "that twinmoe bench --record has written"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"expert timings ({path}) are no record of measurements ({error!s:.200}); name a "
                "file that twinmoe bench --record has written"
            ) from None

    def save(self, path: Path) -> None:
        """Write the record, one measurement a line."""
        lines = ",\n".join(json.dumps(asdict(timing)) for timing in self._measured.values())
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")

    def updated(self, newer: "Timings") -> "Timings":
        """Both records; of the same measurement the ``newer`` one."""
        return Timings([*self._measured.values(), *newer._measured.values()])

    def quickest(self, shape: Shape, usable: Sequence[str]) -> str | None:
        """The backend that loses least against the best of each measurement, on average.

        Of the ``usable`` ones, those that every measurement of the shape has; None if there are
        none, or if nothing was measured at this shape.
        """
        measured = [timing.us for (of, _), timing in self._measured.items() if of == shape]
        rivals = [name for name in usable if measured and all(name in us for us in measured)]
        best = [min(us[name] for name in rivals) for us in measured if rivals]

        def loss(name: str) -> float:
            return mean(us[name] / least for us, least in zip(measured, best, strict=True))

        return min(rivals, key=loss, default=None)


def _timing(told: dict[str, Any]) -> Timing:
    shape = Shape(**{field.name: told["shape"][field.name] for field in fields(Shape)})
    for field in fields(Shape):
        if type(value := getattr(shape, field.name)) is not field.type:
            raise TypeError(f"{field.name} ({value!s:.80}) of a shape is of another type")
    us, rows = told["us"], told["rows"]
    if type(rows) is not int or rows < 0:
        raise TypeError(f"rows ({rows!s:.80}) are no count")
    for name, value in us.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"the time of {name!s:.40} ({value!s:.40}) is not positive and finite")
    return Timing(shape, rows, {name: float(value) for name, value in us.items()})
