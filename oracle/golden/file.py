"""The file: safetensors, whose header says what it is, which format, and proves its content.

Tensors are named ``case.forward.name``.  The header's metadata has four strings: ``format``,
``version``, ``content`` (JSON) and ``digest``, a SHA-256 of the content and every tensor.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from twinmoe.oracle.case import Case, CaseError, ConfigError
from twinmoe.oracle.golden.content import NORM, SHOWN, Figures, Forward, Golden, Recorded
from twinmoe.oracle.golden.norm import tensors_digest
from twinmoe.oracle.session import other_shape
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.files import open_regular, parse_json

FORMAT = "twinmoe golden"

#: Rises whenever a file of before would be read wrongly.
VERSION = 1

#: What safetensors itself allows.
_MAX_HEADER = 100_000_000

_METADATA = ("format", "version", "content", "digest")


class GoldenError(ValueError):
    """A golden file that cannot be used, here or anywhere: what, why and the remedy."""


def save(golden: Golden, path: Path) -> None:
    """Write ``golden``; the same recording gives the same content and digest.

    Raises ConfigError if there is a file of that name.
    """
    tensors = {
        f"{number}.{place}.{name}": tensor.contiguous()
        for number, recorded in enumerate(golden.cases)
        for place, forward in enumerate(recorded.forwards)
        for name, tensor in forward.tensors.items()
    }
    content = json.dumps(
        {
            "device": golden.device,
            "environment": dict(golden.environment),
            "cases": [_as_json(recorded) for recorded in golden.cases],
        },
        sort_keys=True,
    )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "content": content,
        "digest": _digest(content, tensors),
    }
    # A half-written file must not carry the name of a whole one, nor a new one that of an old.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(save_tensors(tensors, metadata))
        _name(part, path)
    finally:
        part.unlink(missing_ok=True)


def _name(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        raise ConfigError(occupied(path)) from None
    except OSError:  # a file system without hard links
        part.replace(path)


def occupied(path: Path) -> str:
    """Why nothing is recorded into a file that is there."""
    return (
        f"FILE ({path}) exists: a recording is a norm, which nobody overwrites by accident; "
        "remove it first, or choose another name"
    )


def load(path: Path) -> Golden:
    """Read a golden file; raises GoldenError for one that is not, or not whole."""
    refuse = _Refusal(path)
    try:
        with open_regular(path) as file:
            # Somebody else's file may be a model of many GiB: its header is enough to refuse it.
            metadata = _metadata(file, os.fstat(file.fileno()).st_size, refuse)
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise refuse(
            "cannot be read", str(error.strerror), "name a file that was recorded"
        ) from None
    try:
        tensors = load_tensors(data)
    except Exception as error:  # safetensors has classes of its own for each kind of damage
        raise refuse("is damaged", f"its tensors cannot be read ({error})", _AGAIN) from None
    content = metadata["content"]
    if _digest(content, tensors) != metadata["digest"]:
        raise refuse(
            "is damaged", "its content is not what its digest was made of: bits changed", _AGAIN
        )
    try:
        return _golden(parse_json(content), tensors)
    except (CaseError, ConfigError) as error:
        told = f"a case of it means nothing to this version ({error})"
        raise refuse("cannot be used", told, "record it again with this version") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        told = f"it lacks a part ({type(error).__name__}: {error!s:.200})"
        raise refuse("is incomplete", told, "record it again with twinmoe golden record") from None


_AGAIN = "copy it again from where it was recorded"


class _Refusal:
    """Words a GoldenError about one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, what: str, why: str, remedy: str) -> GoldenError:
        return GoldenError(f"golden file ({self._path}) {what}: {why}; {remedy}")


def _metadata(
    file: BinaryIO, size: int, refuse: Callable[[str, str, str], GoldenError]
) -> dict[str, str]:
    """The header's strings, once header and size show a whole file of ours in this format."""
    if not size:
        raise refuse("is empty", "not even a header was written", _AGAIN)
    first = file.read(9)
    length = int.from_bytes(first[:8], "little")
    foreign = "record one with twinmoe golden record"
    if size < 10 or first[8:] != b"{" or length > _MAX_HEADER:
        raise refuse("is no safetensors file", "it does not begin with such a header", foreign)
    if size < 8 + length:
        told = f"its header has {length} bytes, of which {size - 8} are there"
        raise refuse("is truncated", told, _AGAIN)
    try:
        header = parse_json(first[8:] + file.read(length - 1))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("metadata are strings")
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise refuse("is damaged", "its header cannot be read", _AGAIN) from None
    if metadata.get("format") != FORMAT:
        told = f"a safetensors file of {len(header)} tensors that does not call itself one"
        raise refuse("is no golden file", told, foreign)
    _check_version(metadata.get("version", ""), refuse)
    if missing := [name for name in _METADATA if name not in metadata]:
        raise refuse("is incomplete", f"its header lacks {', '.join(missing)}", foreign)
    if (there := size - 8 - length) != end:
        what = "is truncated" if there < end else "has something appended"
        raise refuse(what, f"its tensors have {end} bytes, the file {there} for them", _AGAIN)
    return dict(metadata)


def _check_version(version: str, refuse: Callable[[str, str, str], GoldenError]) -> None:
    if version == str(VERSION):
        return
    if re.fullmatch("[1-9][0-9]*", version) and version != str(VERSION):
        raise refuse(
            "is of a newer format",
            f"format {version:.40}, while this version of twinmoe reads {VERSION}",
            "use the twinmoe that recorded it, or a later one",
        )
    told = f"format {version!r:.40}, while this version of twinmoe reads {VERSION}"
    raise refuse("has an unknown format", told, "record it again with this version")


def _digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    seen = hashlib.sha256(f"{FORMAT} {VERSION}\n{content}\n".encode())
    seen.update(tensors_digest(sorted(tensors.items())).encode())
    return seen.hexdigest()


# --- between values and JSON ------------------------------------------------------------------


def _as_json(recorded: Recorded) -> dict[str, Any]:
    return {
        "case": str(recorded.case),
        "figures": asdict(recorded.figures),
        "forwards": [
            {
                "path": forward.path,
                "contract": forward.contract,
                "points": forward.points,
                "tokens": forward.tokens,
                "digests": forward.digests,
                "shown": [name for name in SHOWN if name in forward.tensors],
            }
            for forward in recorded.forwards
        ],
    }


def _golden(content: Any, tensors: dict[str, Tensor]) -> Golden:
    """The value; raises KeyError, TypeError or ValueError where a part is missing or odd."""
    cases = []
    for number, told in enumerate(content["cases"]):
        case = Case.parse(told["case"])
        layers = [
            other_shape(case).config if step.kind == "o" else case.config
            for step in case.steps()
            if step.is_forward
        ]
        if len(told["forwards"]) != len(layers):
            raise ValueError(f"case {number} has {len(told['forwards'])} forwards, its line others")
        forwards = tuple(
            _forward(config, forward, f"{number}.{place}", tensors)
            for place, (config, forward) in enumerate(zip(layers, told["forwards"], strict=True))
        )
        cases.append(Recorded(case, forwards, Figures.of_json(told["figures"])))
    if tensors:
        raise ValueError(f"tensors {', '.join(sorted(tensors)[:3])} belong to no case")
    return Golden(tuple(cases), content["environment"], content["device"])


def _forward(config: MoEConfig, told: Any, prefix: str, tensors: dict[str, Tensor]) -> Forward:
    names = (*NORM, *told["shown"])
    own = {name: tensors.pop(f"{prefix}.{name}") for name in names}
    tokens = tuple(told["tokens"])
    if not all(type(count) is int and count >= 0 for count in tokens):
        raise ValueError(f"tokens of {prefix} are {tokens!s:.80}")
    for part in (told["points"], told["digests"]):
        if not isinstance(part, dict) or not all(isinstance(text, str) for text in part.values()):
            raise TypeError(f"points and digests of {prefix} are names and texts")
    if not (isinstance(told["path"], str) and isinstance(told["contract"], str)):
        raise TypeError(f"path and contract of {prefix} are texts")
    for name, tensor in own.items():
        wide = name not in ("ids", "weights")
        width = config.hidden_size if wide else config.num_experts_per_tok
        if tensor.shape != torch.Size((sum(tokens), width)):
            raise ValueError(f"tensor {prefix}.{name} has shape {tuple(tensor.shape)}")
    return Forward(
        path=told["path"],
        contract=told["contract"],
        points=told["points"],
        tokens=tokens,
        digests=told["digests"],
        tensors=own,
    )
