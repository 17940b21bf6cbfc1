"""Weight files: round trips, damage, and the proof that every expert is loaded once."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.reference.inputs import EVERYTHING, assert_same_weights
from tests.spmd import run_spmd
from twinmoe.reference.checkpoint import CheckpointError, load_each_expert_once
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.placement import Placement
from twinmoe.reference.weights import MoEWeights

CONFIG = MoEConfig(**EVERYTHING)


@pytest.fixture
def path(tmp_path):
    """Return a file with the weights of CONFIG, seed 1."""
    path = tmp_path / "layer.safetensors"
    MoEWeights.random(CONFIG, 1).save(path, CONFIG)
    return path


def test_round_trip(path):
    """What was saved is loaded, bit for bit, in whole or in part."""
    whole = MoEWeights.random(CONFIG, 1)
    assert_same_weights(MoEWeights.load(path), whole)
    assert_same_weights(
        MoEWeights.load(path, experts=range(4, 8)), whole.shard(Placement(CONFIG.num_experts, 4), 1)
    )


def test_a_rank_reads_only_its_own_rows(path, monkeypatch):
    """The rows of other ranks' experts are never asked of the file."""
    asked = []

    class Watched:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.__exit__(None, None, None)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            asked.append((name, None))
            return self.file.get_tensor(name)

        def get_slice(self, name):
            stored = self.file.get_slice(name)

            class Rows:
                get_dtype, get_shape = stored.get_dtype, stored.get_shape

                def __getitem__(self, rows):
                    asked.append((name, rows))
                    return stored[rows]

            return Rows()

    monkeypatch.setattr(
        "twinmoe.reference.checkpoint.safe_open",
        lambda *args, **kwargs: Watched(safe_open(*args, **kwargs)),
    )
    MoEWeights.load(path, experts=range(5, 6))
    per_expert = {name: rows for name, rows in asked if rows is not None}
    assert per_expert == {"w13_LFH": slice(5, 6), "w2_LHI": slice(5, 6)}
    assert {name for name, rows in asked if rows is None}.isdisjoint(per_expert)


def _rewrite(path, tensors=None, **metadata):
    """Write the file again with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = file.metadata()
    save_file(kept if tensors is None else tensors(kept), path, header | metadata)


def _without(name):
    return lambda kept: {key: tensor for key, tensor in kept.items() if key != name}


def _with(name, tensor):
    return lambda kept: kept | {name: tensor}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b"not a tensor file"), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a readable safetensors file"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "has format None"),
        (lambda path: _rewrite(path, format_version="99"), "format version 99"),
        (lambda path: _rewrite(path, config="{}"), "no usable config"),
        (lambda path: _rewrite(path, config="{"), "no usable config"),
        (lambda path: _rewrite(path, _without("w2_LHI")), "w2_LHI is missing"),
        (lambda path: _rewrite(path, _with("w2_LHI", torch.zeros(2))), r"w2_LHI is \[2\]"),
        (lambda path: _rewrite(path, _with("extra", torch.zeros(2))), "extra is not used"),
        (
            lambda path: _rewrite(path, _with("router_EH", torch.zeros(16, 24))),
            "router_EH is .* torch.float32 instead of .* torch.bfloat16",
        ),
    ],
)
def test_damaged_files_are_named(path, damage, words):
    """A file that cannot be used is refused by name, with what is wrong with it."""
    damage(path)
    with pytest.raises(CheckpointError, match=words) as refusal:
        MoEWeights.load(path)
    assert str(path) in str(refusal.value)


def test_a_file_of_another_layer_is_refused(path):
    """Equal shapes are not enough: the stored config has to be the given one."""
    other = replace(CONFIG, routed_scaling_factor=1.0)
    with pytest.raises(CheckpointError, match="routed_scaling_factor differ"):
        MoEWeights.load_for_rank(path, other, Placement(16, 1), 0, None)


def test_the_header_holds_the_config(path):
    """Other tools can read the layer's settings from the file's metadata."""
    with safe_open(path, "pt") as file:
        assert MoEConfig.from_dict(json.loads(file.metadata()["config"])) == CONFIG


def _load_on(rank, group, path, wrong_rank):
    """Load by rank; then pretend that rank 1 loads like ``wrong_rank``."""
    placement = Placement(CONFIG.num_experts, group.size())
    loaded = MoEWeights.load_for_rank(path, CONFIG, placement, rank, group)
    message = ""
    try:
        MoEWeights.load_for_rank(path, CONFIG, placement, wrong_rank if rank == 1 else rank, group)
    except CheckpointError as error:
        message = str(error)
    return loaded, message


def test_each_expert_is_loaded_by_exactly_one_rank(path, tmp_path):
    """Ranks together hold every expert once; otherwise all raise, naming experts and ranks."""
    answers = run_spmd(_load_on, 2, tmp_path, path, 0)
    whole = MoEWeights.random(CONFIG, 1)
    for rank, (loaded, message) in enumerate(answers):
        assert_same_weights(loaded, whole.shard(Placement(CONFIG.num_experts, 2), rank))
        assert "expert 0 was loaded by ranks [0, 1]" in message
        assert "and 12 more alike" in message


def test_a_lone_rank_has_to_load_everything():
    """Without a group the proof covers this process alone."""
    whole = MoEWeights.random(CONFIG, 1)
    assert load_each_expert_once(lambda: whole, CONFIG.num_experts, None) is whole
    half = whole.shard(Placement(CONFIG.num_experts, 2), 0)
    with pytest.raises(CheckpointError, match="expert 8 was loaded by no rank"):
        load_each_expert_once(lambda: half, CONFIG.num_experts, None)


def _load_beside_a_rank_that_cannot(rank, group, path):
    """Rank 1 has no file; return what is raised, and what can be loaded afterwards."""
    placement, mine = Placement(CONFIG.num_experts, group.size()), path
    if rank == 1:
        mine = path.with_name("elsewhere.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        MoEWeights.load_for_rank(mine, CONFIG, placement, rank, group)
    return str(refusal.value), MoEWeights.load_for_rank(path, CONFIG, placement, rank, group)


def test_nobody_waits_for_a_rank_that_cannot_load(path, tmp_path):
    """All ranks raise, the others naming it and its reason; and all can load afterwards."""
    answers = run_spmd(_load_beside_a_rank_that_cannot, 2, tmp_path, path, timeout=30)
    (told, first), (own, second) = answers
    assert own.endswith("nothing to load; write it with MoEWeights.save")
    assert told.startswith("rank 1 (")
    assert "elsewhere.safetensors does not exist" in told
    assert "load on all ranks again" in told
    assert [len(part.w2_LHI) for part in (first, second)] == [8, 8]


# --- damage ------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(path):
    """Whatever bit changes, in header or tensors, is refused or changes nothing that is read."""
    whole, data = MoEWeights.random(CONFIG, 1), path.read_bytes()
    draw = random.Random(0)
    start = 8 + int.from_bytes(data[:8], "little")
    for place in [draw.randrange(start) for _ in range(60)] + [
        draw.randrange(start, len(data)) for _ in range(20)
    ]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = MoEWeights.load(path)
        except CheckpointError:
            continue
        assert place < start  # padding of the header, or the name of what proves the content
        assert_same_weights(loaded, whole)


def test_a_file_of_before_has_no_digests_and_is_read(path):
    """Files without digests load as they did."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = {name: text for name, text in file.metadata().items() if name != "digests"}
    save_file(tensors, path, metadata)
    assert_same_weights(MoEWeights.load(path), MoEWeights.random(CONFIG, 1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_named(path, value):
    """Tensor, expert and index, also where a rank reads only its own experts."""
    weights = MoEWeights.random(CONFIG, 1)
    weights.w2_LHI[5, 3, 2] = value
    weights.save(path, CONFIG)
    words = rf"w2_LHI\[5, 3, 2\] \(expert 5\) in .* is {value}: a weight is a finite number"
    for experts in (None, range(4, 8)):
        with pytest.raises(CheckpointError, match=words):
            MoEWeights.load(path, experts=experts)
    assert MoEWeights.load(path, experts=range(4)).experts == range(4)


def test_a_fifo_is_not_waited_for(tmp_path):
    """A path that leads to no regular file is refused before it is opened."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="it is a FIFO, not a regular file"):
        MoEWeights.load(tmp_path / "fifo")
