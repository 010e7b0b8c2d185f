"""A model whose layers are split follows the trajectory of the whole model."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricorn.mp.tensor import apply, find
from tricorn.state.slabs import slab_of

from . import models as make

STEPS = 20
ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "10"))


def trained(model, loss, inputs, targets):
    """Gradients of the first step and weights after the last; gradient descent with momentum."""
    moments, first = {}, {}
    for step in range(STEPS):
        loss(model(inputs), targets).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if step == 0:
                first[name] = parameter.grad.clone()
            moments[name] = 0.9 * moments.get(name, 0) + parameter.grad
            parameter.data -= 0.05 * moments[name]
            parameter.grad = None
    return first, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assembled(models, parts):
    """The whole tensors of which the shards have parts; what is whole must be the same on all of them."""
    found = {}
    for name, parameter in models[0].named_parameters():
        if name not in parts[0]:
            continue
        slabs = [slab_of(dict(model.named_parameters())[name]) for model in models]
        if slabs[0] is None:
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), name
            found[name] = parts[0][name]
            continue
        whole = torch.full(slabs[0].shape, torch.nan, dtype=parameter.dtype)
        for slab, part in zip(slabs, parts, strict=True):
            whole.index_copy_(slab.dim, torch.cat([torch.arange(*each) for each in slab.ranges]), part[name])
        found[name] = whole
    return found


def distance(found, expected):
    """Relative, in L2, over all tensors together."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (apart / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


def compare(shards, whole, loss, inputs, targets, size, bound, large):
    splits = find(whole, inputs[:2], size, large=large)
    models = [copy.deepcopy(whole) for _ in range(size)]

    def train(group):
        apply(models[group.rank], splits, group)
        return trained(models[group.rank], loss, inputs, targets)

    results = shards(size).each(train)
    expected = trained(whole, loss, inputs, targets)
    for found, wanted in zip(zip(*results, strict=True), expected, strict=True):
        assert distance(assembled(models, found), wanted) <= bound
    buffers = [dict(model.named_buffers()) for model in models]
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(buffers[0][name], buffer, rtol=bound, atol=bound)
        assert all(torch.equal(each[name], buffers[0][name]) for each in buffers)
    return splits


def prepared(name, dtype):
    torch.manual_seed(0)
    whole = make.MODELS[name]().to(dtype)
    inputs, targets = make.sample(whole, 4)
    return whole, make.loss_of(whole), inputs.to(dtype) if inputs.is_floating_point() else inputs, targets


NAMES = (
    "mlp", "gated", "residual", "encoder", "towers", "unflatten", "split", "apart", "merged", "grouped",
    "six heads by hand", "six heads",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_same_numbers(shards, name):
    for size in (2, 3, 4) if name in ("mlp", "residual", "encoder", "unflatten", "towers") else (2,):
        splits = compare(shards, *prepared(name, torch.float64), size, 1e-10, large=0)
        assert len(splits.of) >= 4


@pytest.mark.parametrize("name", ["six heads by hand", "six heads"])
def test_heads_that_do_not_divide(shards, name):
    splits = compare(shards, *prepared(name, torch.float64), 4, 1e-10, large=0)
    fused = [part for key, part in splits.of.items() if "in_proj" in key or "qkv" in key]
    assert {tuple(units for _, units in part.blocks) for part in fused} == {(6, 6, 6)}


@pytest.mark.parametrize("name", ["mlp", "residual", "encoder", "split"])
def test_same_numbers_in_single_precision(shards, name):
    compare(shards, *prepared(name, torch.float32), 2, 1e-5, large=2**18)


@settings(max_examples=ROUNDS, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.sampled_from(make.KINDS), st.integers(0, 5)), min_size=1, max_size=6),
    width=st.integers(5, 9), size=st.integers(2, 4), large=st.sampled_from([0, 40, 2**18]),
)  # fmt: skip
def test_random_models(shards, parts, width, size, large):
    torch.manual_seed(len(parts) + width)
    whole = make.Drawn(width, parts).double()
    inputs, targets = torch.randn(4, width, dtype=torch.float64), torch.randint(0, 3, (4,))
    compare(shards, whole, make.classes_loss, inputs, targets, size, 1e-10, large)
