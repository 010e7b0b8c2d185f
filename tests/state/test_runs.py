"""Parts of tensors split along any dim: where they lie, and that any part is put together from any others."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tricorn.errors import CheckpointDamaged
from tricorn.optim import Adam
from tricorn.state import runs as module
from tricorn.state.flat import FlatState, buffer_pieces, fill, flat_pieces, layout, load_buffers
from tricorn.state.runs import Runs, matches
from tricorn.state.shards import CheckpointReader, Piece, write_shard
from tricorn.state.slabs import Slab, mark, slab_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    """So that small tensors are looked at in several."""
    monkeypatch.setattr(module, "WINDOW", 7)


@st.composite
def splits(draw, shape: tuple[int, ...]) -> list[Slab]:
    """A tensor of that shape dealt out along one dim, in ranges of any length, to a few workers."""
    dim = draw(st.integers(0, len(shape) - 1))
    edges = [0, *sorted(draw(st.lists(st.integers(0, shape[dim]), max_size=5))), shape[dim]]
    owners = draw(st.integers(1, 3))
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(owners)]
    for number, piece in enumerate(pairwise(edges)):
        dealt[number % owners].append(piece)
    return [Slab(shape, dim, tuple(ranges) or ((0, 0),)) for ranges in dealt]


def taken(whole: Tensor, slab: Slab) -> Tensor:
    """The part of a tensor that a slab is."""
    return torch.cat([whole.narrow(slab.dim, low, high - low) for low, high in slab.ranges], slab.dim).contiguous()


@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
def test_any_part_is_put_together_from_any_others(tmp_path_factory, data, shape):
    whole = torch.arange(prod(shape), dtype=torch.float64).view(shape)
    folder = tmp_path_factory.mktemp("checkpoint")
    for writer, slab in enumerate(data.draw(splits(shape))):
        part = taken(whole, slab)
        (entry,) = layout([("w", part.shape)])
        entry = entry.__class__(entry.name, entry.shape, entry.start, entry.stop, slab)
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, part.numel()), max_size=2))), part.numel()]
        pieces = [
            p
            for low, high in pairwise(cuts)
            for p in flat_pieces({"param": part.flatten()[low:high]}, [entry], low, high)
        ]
        write_shard(folder, f"worker-{writer}.safetensors", pieces)
    reader = CheckpointReader(folder, 1)
    assert torch.equal(reader.read_whole("param/w", shape), whole.flatten())
    for slab in data.draw(splits(shape)):
        part = taken(whole, slab)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, part.numel())] * 2)))
        got = torch.full((stop - start,), -1.0, dtype=torch.float64)
        (entry,) = layout([("w", part.shape)])
        entry = entry.__class__(entry.name, entry.shape, entry.start, entry.stop, slab)
        fill(reader, {"param": got}, [entry], start, stop)
        assert torch.equal(got, part.flatten()[start:stop])


@given(
    runs=st.builds(Runs, st.integers(0, 9), st.integers(1, 9), st.just(0), st.just(1))
    | st.builds(
        lambda s, n, gap, t: Runs(s, n, n + gap, t),
        *[st.integers(0, 9), st.integers(1, 9), st.integers(0, 9), st.integers(2, 5)],
    )
)
def test_windows_and_positions_are_the_same_elements(runs):
    flat = torch.arange(runs.stop)
    assert runs.legal
    assert torch.equal(runs.of(flat).flatten(), runs.positions())
    assert torch.equal(torch.cat([window.positions() for window in runs.windows()]), runs.positions())
    assert all(window.stop - window.start <= max(7, runs.length) for window in runs.windows())
    found, numbers = runs.find(flat)
    assert torch.equal(flat[found], runs.positions())
    assert torch.equal(numbers, torch.arange(runs.size))


def test_a_split_along_the_first_dim_is_a_plain_slice():
    slab = Slab((6, 4), 0, ((2, 5),))
    assert matches(slab, 0, 12) == [(Runs(8, 12), Runs(0, 12))]
    assert matches(slab, 3, 9) == [(Runs(11, 6), Runs(3, 6))]
    assert matches(None, 3, 9) == [(Runs(3, 6), Runs(3, 6))]
    assert matches(Slab((6, 4), 1, ((1, 3),)), 0, 12) == [(Runs(1, 2, 4, 6), Runs(0, 12))]


def test_what_no_part_has_is_named(tmp_path):
    slab = Slab((4, 6), 1, ((0, 2), (3, 6)))
    part = taken(torch.arange(24.0).view(4, 6), slab)
    pieces = [
        Piece.of("param/w", (4, 6), there, here.of(part.flatten()).reshape(-1)) for there, here in matches(slab, 0, 20)
    ]
    write_shard(tmp_path, "a.safetensors", pieces)
    reader = CheckpointReader(tmp_path, 1)
    assert torch.equal(
        reader.read_part("param/w", (4, 6), Runs(3, 3, 6, 4)),
        torch.tensor([[3.0, 4, 5]] * 4).add(torch.arange(4).mul(6)[:, None]).flatten(),
    )
    with pytest.raises(CheckpointDamaged, match="has no elements 2 to 3 of param/w"):
        reader.read_whole("param/w", (4, 6))


@pytest.mark.parametrize(
    "name", ["param/w", "param/w@", "param/w@x", "param/w@0+3x0", "param/w@0+1x2", "param/w@0+9x3"]
)
def test_a_name_that_says_no_part_is_damage(tmp_path, name):
    save_file({name: torch.zeros(4)}, tmp_path / "a.safetensors", metadata={"shapes": '{"param/w": [4]}'})
    with pytest.raises(CheckpointDamaged, match="a tensor that is no part of one: "):
        CheckpointReader(tmp_path, 1)


def shard(slab: Slab | None, values: Tensor) -> nn.Module:
    """A layer that has a part of a weight and of a buffer, and a whole bias."""
    made = nn.Module()
    made.weight = nn.Parameter(values if slab is None else taken(values, slab))
    made.bias = nn.Parameter(torch.full((3,), 7.0))
    made.register_buffer("seen", made.weight.detach() * 2)
    if slab is not None:
        mark(made.weight, slab)
        mark(made.seen, slab)
    return made


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_state_of_shards_spread_over_copies_is_that_of_the_whole(tmp_path, copies):
    whole = torch.randn(5, 7)
    slabs = [Slab((5, 7), 1, ((0, 2), (4, 5))), Slab((5, 7), 1, ((2, 4), (5, 7)))]
    for number, slab in enumerate(slabs):
        for copy in range(copies):
            state = FlatState(shard(slab, whole), Adam(lr=0.1), CPU, share=(copy, copies))
            assert state.entries[0].whole == (5, 7)
            for slot, flat in state.slots.items():
                everywhere = taken(whole * len(slot), slab).flatten()
                flat.copy_(torch.cat([everywhere, torch.full((3,), len(slot))])[state.own])
            entries = state.entries if number == 0 else state.entries[:1]  # the bias is on both shards
            pieces = flat_pieces(state.tensors(), entries, state.own.start, state.own.stop)
            write_shard(tmp_path, f"worker-{number * copies + copy}.safetensors", pieces + buffer_pieces(state.module))
    reader = CheckpointReader(tmp_path, 4)
    loaded = FlatState(shard(None, torch.zeros(5, 7)), Adam(lr=0.1), CPU)
    loaded.load(reader)
    assert torch.equal(loaded.module.weight, whole)
    assert torch.equal(loaded.module.seen, whole * 2)
    assert torch.equal(loaded.module.bias, torch.full((3,), 7.0))
    for slot, flat in loaded.slots.items():
        assert torch.equal(flat, torch.cat([(whole * len(slot)).flatten(), torch.full((3,), len(slot))]))
    third = shard(Slab((5, 7), 1, ((1, 6),)), torch.zeros(5, 7))
    load_buffers(third, reader)
    assert torch.equal(third.seen, whole[:, 1:6] * 2)


def test_a_mark_stays_with_a_parameter_whose_data_is_replaced():
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert slab_of(parameter) is None
    mark(parameter, Slab((4, 3), 0, ((0, 2),)))
    parameter.data = torch.ones(2, 3)
    assert slab_of(parameter) == ((4, 3), 0, ((0, 2),))
