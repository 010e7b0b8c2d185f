"""What is split, what is not, and what is said about it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import data, optim
from tricorn.job import Job
from tricorn.mp.tensor import Part, apply, find, find_for
from tricorn.state.slabs import Slab, slab_of
from tricorn.table import Table

from . import models as make

X = torch.randn(2, 8)


def dims(splits):
    return {name: part.dim for name, part in splits.of.items()}


def test_a_pair_is_split_and_its_layers_keep_what_they_share():
    model = nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    splits = find(model, X, 2)
    assert splits.of == {
        "0.weight": Part(0, ((13, 13),)),
        "0.bias": Part(0, ((13, 13),)),
        "2.weight": Part(1, ((13, 13),)),
    }
    assert splits.whole == {"4.weight": "what it makes goes into the model's output"}
    assert splits.refusal() is None


def test_nothing_to_split_says_what_stands_in_the_way():
    model = nn.Sequential(nn.Linear(8, 13), nn.LayerNorm(13), nn.Linear(13, 1))
    refusal = find(model, X, 2).refusal()
    assert "Sequential has no layers to split among 2 workers" in refusal
    assert "0.weight: what it makes goes into layer_norm" in refusal
    assert "2.weight: its 1 outputs are fewer than the 2 workers" in refusal
    assert refusal.endswith("use replicas or stages instead of tensor")


def test_large_layers_without_a_partner_are_split_and_gathered():
    model = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 90), nn.LayerNorm(90), nn.Linear(90, 50))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert dims(find(model, tokens, 2, large=10_000)) == {}
    splits = find(model, tokens, 2, large=400)
    assert dims(splits) == {"0.weight": 0, "2.weight": 0, "2.bias": 0, "4.weight": 0, "4.bias": 0}
    assert [name for name, part in splits.of.items() if part.gathers] == ["2.weight"]


def test_more_workers_than_heads_leave_attention_whole():
    splits = find(make.Encoder(4), make.tokens(2), 6)
    assert "its 4 heads are fewer than the 6 workers" in splits.whole["cross.out_proj.weight"]
    assert "encoder.layers.0.linear1.weight" in splits.of


class BySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.sum(-1, keepdim=True) + (gradient * x).sum(-1, keepdim=True)


class Hidden(nn.Module):
    """What a function of the user's own does with its input cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.third, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.second(BySum.apply(torch.relu(self.first(x))))
        return self.last(torch.relu(self.third(x)))


def test_what_goes_into_a_function_of_the_users_own_stays_whole(shards):
    model = Hidden().double()
    splits = find(model, X.double(), 2)
    assert "BySumBackward, which is not an operation of torch" in splits.whole["first.weight"]
    assert dims(splits) == {"second.weight": 0, "second.bias": 0, "third.weight": 1}
    expected = model(X.double()).detach()

    def run(group):
        mine = copy.deepcopy(model)
        apply(mine, splits, group)
        return mine(X.double()).detach()

    for found in shards(2).each(run):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_looking_changes_neither_the_model_nor_random_numbers():
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(), nn.Linear(12, 4)).eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert "1.weight" in find(model, X, 2).of
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_jobs_own_data_is_looked_at():
    job = Job(
        model=make.Mlp, loss=F.cross_entropy, optimizer=optim.SGD(lr=0.1), train=data.arrays(X, torch.zeros(2).long()),
        batch_size=2, epochs=1, precision="float64",
    )  # fmt: skip
    assert find_for(job, make.Mlp().double(), 3).of["layers.0.weight"] == Part(0, ((13, 13),))


def test_a_table_that_has_no_values_yet_is_looked_at_nevertheless():
    model = nn.Sequential(nn.Embedding(50, 8).to("meta"), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    job = Job(
        model=lambda: model, loss=F.cross_entropy, optimizer=optim.SGD(lr=0.1), batch_size=2, epochs=1,
        train=data.arrays(torch.zeros(2).long(), torch.zeros(2).long()), tables={"0": Table(std=0.1)},
    )  # fmt: skip
    weight = model[0].weight
    assert dims(find_for(job, model, 2)) == {"1.weight": 0, "1.bias": 0, "3.weight": 1}
    assert model[0].weight is weight


def test_modules_stay_what_they_are(shards):
    torch.manual_seed(0)
    whole = make.Encoder().double()
    tokens = make.tokens(4)
    splits = find(whole, tokens, 2, large=0)
    expected = whole.eval()(tokens)

    def run(group):
        model = copy.deepcopy(whole).train()
        weight = model.tokens.weight
        apply(model, splits, group)
        apply(model, splits, group)  # as after regrouping: nothing is cut twice
        assert model.head._parameters["weight"] is weight is model.tokens._parameters["weight"]
        assert slab_of(weight) == Slab((make.V, make.W), 0, (((0, 12), (12, 23))[group.rank],))
        assert isinstance(model.head, nn.Linear)
        assert type(model.head).__name__ == "Linear"
        assert model.head.weight.shape == (make.V, make.W)
        assert model.head._parameters["weight"].shape == (12 - group.rank, make.W)
        part = model(tokens)
        assert type(part) is not torch.Tensor
        assert part.shape == (4, make.L, make.V)
        found = model.eval()(tokens)
        assert type(found) is torch.Tensor
        return found.detach()

    for found in shards(2).each(run):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


def test_no_graph_is_kept_when_a_step_is_over(shards):
    """What is remembered of a value, so that its gradients are summed once, must not keep it alive."""
    import gc
    import weakref

    splits = find(make.Gated(), X, 2)

    def run(group):
        model = make.Gated()
        apply(model, splits, group)
        seen = []
        model.norm.register_forward_hook(lambda module, given, output: seen.append(weakref.ref(output)))
        F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
        return [ref() is None for ref in seen]

    gc.disable()
    try:
        assert shards(2).each(run) == [[True, True]] * 2
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [2, 3])
def test_frozen_layers_are_split_too(shards, size):
    torch.manual_seed(0)
    whole = make.Mlp().double().requires_grad_(False)
    whole.head.requires_grad_()
    expected = whole(X.double()).detach()
    splits = find(whole, X.double(), size)

    def run(group):
        model = copy.deepcopy(whole)
        apply(model, splits, group)
        made = model(X.double())
        made.sum().backward()
        return made.detach()

    for found in shards(size).each(run):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
