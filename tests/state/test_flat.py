"""Flat state: one tensor that the module's parameters are views of, saved and loaded in any slices."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tricorn.errors import UsageError
from tricorn.optim import SGD, Adam
from tricorn.state.flat import FlatState, flat_pieces, layout
from tricorn.state.shards import CheckpointReader, write_shard

CPU = torch.device("cpu")


class Net(nn.Module):
    """Parameters of several shapes, a frozen one, a tied one, an empty one and a buffer."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.tied = self.first
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.last = nn.Linear(width, 2, bias=False)
        self.register_buffer("seen", torch.tensor(3, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)) * self.scale


def state_of(seed: int, width: int = 5) -> FlatState:
    torch.manual_seed(seed)
    return FlatState(Net(width), Adam(lr=0.1), CPU)


def trained(seed: int, updates: int = 3) -> FlatState:
    state = state_of(seed)
    for _ in range(updates):
        state.module(torch.randn(4, 3)).square().mean().backward()
        state.update(lr=0.1)
    state.module.seen.fill_(updates)
    return state


def test_parameters_and_gradients_are_views() -> None:
    state = state_of(0)
    parameters = {name: p for name, p in state.module.named_parameters() if p.requires_grad}
    assert [entry.name for entry in state.entries] == list(parameters)
    assert state.weights_N.numel() == sum(p.numel() for p in parameters.values()) == 3 * 5 + 5 + 1 + 0 + 5 * 2
    state.weights_N.fill_(0.5)
    assert all((p == 0.5).all() for p in parameters.values())
    state.module(torch.ones(1, 3)).sum().backward()
    for entry in state.entries:
        view = state.grads_N[entry.start : entry.stop].view(entry.shape)
        assert parameters[entry.name].grad.data_ptr() == view.data_ptr()
    assert state.grads_N.abs().sum() > 0


def test_an_update_equals_torchs_and_clears_the_gradient() -> None:
    state, reference = state_of(0), Net()
    reference.load_state_dict(state.module.state_dict())
    optimizer = torch.optim.Adam([p for p in reference.parameters() if p.requires_grad], lr=0.1, fused=True)
    x = torch.randn(4, 3)
    for module in (state.module, reference):
        module(x).square().mean().backward()
    state.update(lr=0.1)
    optimizer.step()
    assert state.step == 1
    assert not state.grads_N.any()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state.module.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_a_module_without_parameters_has_empty_state(tmp_path: Path) -> None:
    state = FlatState(nn.ReLU(), SGD(lr=0.1), CPU)
    write_shard(tmp_path, "a.safetensors", state.pieces())
    state.load(CheckpointReader(tmp_path, 4))
    assert (state.step, state.weights_N.numel(), state.pieces()) == (4, 0, [])


@given(cuts=st.lists(st.integers(0, 31), max_size=5), shards=st.integers(1, 3))
def test_any_slices_in_any_shards_load_whole(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], shards: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    saved = trained(1)
    edges = [0, *sorted(cuts), saved.weights_N.numel()]
    slices = [
        flat_pieces({prefix: flat[low:high] for prefix, flat in saved.tensors().items()}, saved.entries, low, high)
        for low, high in pairwise(edges)
    ]
    for shard in range(shards):
        pieces = [piece for index, part in enumerate(slices) if index % shards == shard for piece in part]
        write_shard(folder, f"{shard}.safetensors", pieces + (saved.buffer_pieces() if shard == 0 else []))
    loaded = state_of(2)
    loaded.grads_N.fill_(1)
    loaded.load(CheckpointReader(folder, saved.step))
    assert loaded.step == saved.step == 3
    assert not loaded.grads_N.any()
    for prefix, flat in saved.tensors().items():
        assert torch.equal(loaded.tensors()[prefix], flat), prefix
    for name, value in saved.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value), name


def test_pieces_are_copies() -> None:
    state = trained(1)
    pieces = state.pieces()
    before = [piece.data.clone() for piece in pieces]
    state.weights_N.zero_()
    state.module.seen.zero_()
    assert all(torch.equal(piece.data, data) for piece, data in zip(pieces, before, strict=True))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    saved = trained(1)
    write_shard(
        tmp_path, "a.safetensors", [piece for piece in saved.pieces() if piece.key != "optim/exp_avg/last.weight"]
    )
    with pytest.raises(UsageError, match=r"has no optim/exp_avg/last\.weight"):
        state_of(2).load(CheckpointReader(tmp_path, 3))


@pytest.mark.parametrize("width", [4, 6])
def test_a_model_of_another_width_is_refused(tmp_path: Path, width: int) -> None:
    write_shard(tmp_path, "a.safetensors", trained(1).pieces())
    message = rf"param/first.weight has the shape \(5, 3\) in the checkpoint .*, but \({width}, 3\) in the model"
    with pytest.raises(UsageError, match=message) as refusal:
        state_of(2, width).load(CheckpointReader(tmp_path, 3))
    assert "Resume with the model" in refusal.value.remedy


def test_a_transposed_parameter_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, "a.safetensors", FlatState(nn.Linear(3, 5, bias=False), SGD(lr=0.1), CPU).pieces())
    other = FlatState(nn.Linear(5, 3, bias=False), SGD(lr=0.1), CPU)
    with pytest.raises(UsageError, match=r"param/weight has the shape \(5, 3\) .*, but \(3, 5\) in the model"):
        other.load(CheckpointReader(tmp_path, 0))


def test_a_buffer_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved, other = state_of(1), state_of(1)
    write_shard(tmp_path, "a.safetensors", saved.pieces())
    other.module.seen = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"buffer/seen has the shape \(\) in .*, but \(1,\) in the model"):
        other.load(CheckpointReader(tmp_path, 0))


def test_layout_lays_end_to_end() -> None:
    entries = layout([("a", (2, 3)), ("b", ()), ("c", (0,)), ("d", (4,))])
    assert [(entry.start, entry.stop) for entry in entries] == [(0, 6), (6, 7), (7, 7), (7, 11)]
