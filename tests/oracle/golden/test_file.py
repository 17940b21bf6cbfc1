"""Golden files: what is written is what is read, and no damage goes unnoticed or unnamed."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from twinmoe.oracle.bits import same_bits
from twinmoe.oracle.golden import Golden, GoldenError, load, save
from twinmoe.oracle.golden import file as golden_file
from twinmoe.reference.config import ConfigError

Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="session")
def whole(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of an undamaged file."""
    path = tmp_path_factory.mktemp("golden") / "whole.safetensors"
    save(golden, path)
    return path.read_bytes()


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the parsed header and the tensors' bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: dict[str, Any], rest: bytes) -> bytes:
    """Put a header before tensors."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def metadata_changed(**changes: str | None) -> Damage:
    """Return a damage that sets, or for None drops, strings of the header's metadata."""

    def damage(data: bytes) -> bytes:
        header, rest = header_of(data)
        metadata = {**header["__metadata__"], **changes}
        kept = {name: text for name, text in metadata.items() if text is not None}
        return with_header({**header, "__metadata__": kept}, rest)

    return damage


def signed_anew(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Damage:
    """Return a damage to content or tensors whose digest is right: a writer that is wrong."""

    def damage(data: bytes) -> bytes:
        header, _ = header_of(data)
        tensors = load_tensors(data)
        content = json.loads(header["__metadata__"]["content"])
        change(content, tensors)
        text = json.dumps(content)
        metadata = {**header["__metadata__"], "content": text}
        metadata["digest"] = golden_file._digest(text, tensors)
        return save_tensors(tensors, metadata)

    return damage


def signed_text(text: str) -> Damage:
    """Return a damage that is some other text in place of the content, with a right digest."""

    def damage(data: bytes) -> bytes:
        header, _ = header_of(data)
        tensors = load_tensors(data)
        digest = golden_file._digest(text, tensors)
        return save_tensors(tensors, {**header["__metadata__"], "content": text, "digest": digest})

    return damage


def bit_flipped(data: bytes) -> bytes:
    """Flip the lowest bit of the last byte of the last tensor."""
    return data[:-1] + bytes([data[-1] ^ 1])


def header_scrambled(data: bytes) -> bytes:
    """Overwrite some of the header's JSON."""
    return data[:20] + b"}}}}" + data[24:]


def foreign(_data: bytes) -> bytes:
    """Return somebody else's safetensors file."""
    return save_tensors({"model.weight": torch.zeros(4)}, {"format": "pt"})


def other_case(content: dict[str, Any], _tensors: dict[str, torch.Tensor]) -> None:
    """Write a case line with a key that no version knows."""
    content["cases"][0]["case"] += ",colour=red"


DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty": (lambda _: b"", ("is empty", "copy it again")),
    "text": (lambda _: b"twinmoe golden\n" * 9, ("no safetensors file", "twinmoe golden record")),
    "cut in the header": (lambda d: d[:200], ("is truncated", "its header has", "copy it again")),
    "cut in the tensors": (lambda d: d[:-7], ("is truncated", "its tensors have", "copy it again")),
    "appended": (lambda d: d + b"more", ("something appended", "copy it again")),
    "header scrambled": (header_scrambled, ("is damaged", "header cannot be read", "copy it")),
    "foreign": (foreign, ("is no golden file", "1 tensors", "twinmoe golden record")),
    "newer": (
        metadata_changed(version="2"),
        ("newer format", "format 2", "reads 1", "use the twinmoe that recorded it"),
    ),
    "no such format": (metadata_changed(version="zero"), ("unknown format", "'zero'")),
    "no digest": (metadata_changed(digest=None), ("is incomplete", "lacks digest")),
    "flipped bit": (bit_flipped, ("is damaged", "bits changed", "copy it again")),
    "content changed": (
        metadata_changed(content='{"cases": []}'),
        ("is damaged", "bits changed", "copy it again"),
    ),
    "another version's case": (
        signed_anew(other_case),
        ("cannot be used", "'colour' is not a key", "record it again"),
    ),
    "a part is gone": (
        signed_anew(lambda content, _: content["cases"][0].pop("forwards")),
        ("is incomplete", "'forwards'", "record it again"),
    ),
    "a forward is gone": (
        signed_anew(lambda content, _: content["cases"][0]["forwards"].pop()),
        ("is incomplete", "case 0 has 1 forwards", "record it again"),
    ),
    "a tensor is gone": (
        signed_anew(lambda _, tensors: tensors.pop("1.0.radius")),
        ("is incomplete", "'1.0.radius'", "record it again"),
    ),
    "a tensor of another shape": (
        signed_anew(lambda _, tensors: tensors.update({"0.0.value": torch.zeros(1)})),
        ("is incomplete", "0.0.value has shape (1,)", "record it again"),
    ),
    "a version of 5,000 digits": (
        metadata_changed(version="9" * 5000),
        ("newer format", "99999", "use the twinmoe that recorded it"),
    ),
    "nested content": (
        signed_text("[" * 2000 + "]" * 2000),
        ("is incomplete", "record it again"),
    ),
    "a figure that is NaN": (
        signed_anew(lambda content, _: content["cases"][0]["figures"].update(flips=float("nan"))),
        ("is incomplete", "NaN is no JSON number", "record it again"),
    ),
    "a figure of another type": (
        signed_anew(lambda content, _: content["cases"][0]["figures"].update(flips="3")),
        ("is incomplete", "figure 3 is no finite number", "record it again"),
    ),
    "cases that are none": (
        signed_anew(lambda content, _: content.update(cases=[None])),
        ("is incomplete", "record it again"),
    ),
    "tokens that are none": (
        signed_anew(lambda content, _: content["cases"][0]["forwards"][0].update(tokens=["x"])),
        ("is incomplete", "tokens of 0.0 are", "record it again"),
    ),
    "a case of terabytes": (
        signed_anew(
            lambda content, _: content["cases"][0].update(case=f"T={10**12},H=8,I=8,E=1,k=1")
        ),
        ("cannot be used", "bytes for the tokens", "record it again"),
    ),
    "a tensor too many": (
        signed_anew(lambda _, tensors: tensors.update(stray=torch.zeros(1))),
        ("is incomplete", "stray belong to no case", "record it again"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_has_its_own_words(name: str, whole: bytes, tmp_path: Path) -> None:
    """A file that is not whole, not ours or not of this format is refused: what, why, remedy."""
    damage, words = DAMAGES[name]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(whole))
    with pytest.raises(GoldenError) as refusal:
        load(path)
    text = str(refusal.value)
    assert str(path) in text
    assert all(word in text for word in words), text


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A path without a file, a folder, and a FIFO, which nobody waits for, are refused as such."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "fifo"):
        with pytest.raises(GoldenError, match="cannot be read"):
            load(path)


def test_what_is_read_is_what_was_written(golden: Golden, whole: bytes, tmp_path: Path) -> None:
    """Cases, figures, paths and every bit of every tensor survive, and so does the digest."""
    path = tmp_path / "again.safetensors"
    path.write_bytes(whole)
    read = load(path)
    assert read.environment == golden.environment
    for before, after in zip(golden.cases, read.cases, strict=True):
        assert (before.case, before.figures) == (after.case, after.figures)
        for one, other in zip(before.forwards, after.forwards, strict=True):
            assert replace(one, tensors={}) == replace(other, tensors={})
            assert one.tensors.keys() == other.tensors.keys()
            assert all(same_bits(one.tensors[name], other.tensors[name]) for name in one.tensors)
    again = tmp_path / "once more.safetensors"
    save(read, again)
    digests = [header_of(data)[0]["__metadata__"]["digest"] for data in (whole, again.read_bytes())]
    assert digests[0] == digests[1]


def test_a_file_that_appears_meanwhile_is_not_overwritten(golden: Golden, tmp_path: Path) -> None:
    """Of two recordings into one name the later is refused, and leaves nothing."""
    path = tmp_path / "golden.safetensors"
    path.write_bytes(b"somebody else's")
    with pytest.raises(ConfigError, match="exists: a recording is a norm"):
        save(golden, path)
    assert path.read_bytes() == b"somebody else's"
    assert list(tmp_path.iterdir()) == [path]


def test_the_norm_is_wide(golden: Golden) -> None:
    """The truth and its radius are fp64, and a forward is named by path, contract and digests."""
    for recorded in golden.cases:
        for forward in recorded.forwards:
            assert forward.tensors["value"].dtype is torch.float64
            assert forward.tensors["radius"].dtype is torch.float64
            assert (forward.tensors["radius"] >= 0).all()
            assert set(forward.digests) == {"weights", "hidden"}
            assert forward.contract in ("p2p + grouped_mm", "alltoall + grouped_mm")


def test_a_recording_that_cannot_be_written_leaves_nothing(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted or out of room while writing: neither the file nor a part of it is there."""

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        save(golden, tmp_path / "golden.safetensors")
    assert not list(tmp_path.iterdir())


def test_somebody_elses_large_file_is_not_read_to_be_refused(tmp_path: Path) -> None:
    """A model of 1 TiB by its header: only that is read."""
    path = tmp_path / "model.safetensors"
    shape = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    path.write_bytes(with_header({"model.weight": shape}, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**40)
    with pytest.raises(GoldenError, match="is no golden file: a safetensors file of 1 tensors"):
        load(path)
