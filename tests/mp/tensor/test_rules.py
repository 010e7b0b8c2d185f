"""Every operation on a split tensor gives what it gives on the whole one, and so do its gradients."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional as F

from tricorn.errors import PlanError
from tricorn.mp.tensor.cut import Block, Blocks, ranges_of, settled
from tricorn.mp.tensor.rules.elementwise import dropout
from tricorn.mp.tensor.split import Spread, whole, wrap
from tricorn.mp.tensor.team import Team

B, C, D = 3, 6, 4

# Of [B, C, D] tensors x, split along the second or the last dimension, and y, whole.
OPERATIONS = {
    "sum of both": lambda x, y: x + y,
    "reversed": lambda x, y: 2 - 3 / (2 + x * x) + y,
    "broadcast": lambda x, y: x * y[:, :1] + y[0] - y[..., :1] + 2 ** (x - 1),
    "in place": lambda x, y: (x * 1).add_(y).relu_(),
    "in place on a whole one": lambda x, y: (y * 1).add_(x),
    "where": lambda x, y: torch.where(y > 0, x, y).masked_fill(y[0] > 1, 0.5),
    "out of rules": lambda x, y: torch.cumsum(x.flip(-1), -1).roll(1, 1),
    "reshape": lambda x, y: x.reshape(B, -1, 2, D // 2).transpose(1, 2).contiguous().view(B, -1),
    "flatten": lambda x, y: x.flatten(1).unflatten(1, (C, -1)),
    "views": lambda x, y: x.view_as(y).permute(2, 0, 1).movedim(0, -1).unsqueeze(0).expand(2, -1, -1, -1),
    "transposed": lambda x, y: x.mT.swapaxes(0, 1),
    "unsqueeze": lambda x, y: x.unsqueeze(-1).squeeze(-1).unsqueeze(1).squeeze(),
    "unbind": lambda x, y: torch.stack(x.unbind(0), 1) + torch.cat(tuple(x), 0).view(B, C, D).transpose(0, 1),
    "items": lambda x, y: x[0] + x[1:, None, ..., :].sum((0, 1)) + x[-1, :, :],
    "items of the last": lambda x, y: x[..., 1] * x[:, 2:4, 0].sum(1, keepdim=True),
    "chunks": lambda x, y: x.chunk(2, 1)[0] * x.split([3, 3], dim=1)[1] + x.tensor_split(2, 2)[0].sum(),
    "joined": lambda x, y: torch.cat([x, x * 2], 1) + torch.cat([x, y], -2),
    "joined features": lambda x, y: torch.cat([x, -x], dim=-1),
    "narrow": lambda x, y: x.narrow(0, 1, 2).select(0, 1),
    "repeat": lambda x, y: x.repeat_interleave(2, dim=1).repeat_interleave(2, 2),
    "softmax": lambda x, y: x.softmax(-1) * F.softmax(x, 1) + F.log_softmax(x, dim=-1),
    "sums": lambda x, y: x.sum() + x.mean(1).sum(-1) + x.sum((1, 2)) + x.mean(-1, keepdim=True).sum(),
    "norms": lambda x, y: F.layer_norm(x, (D,), y[0, 0], y[1, 1]) + F.normalize(x, dim=1) + x.var(dim=0),
    "group norm": lambda x, y: F.group_norm(x, 3, y[0, :, 0], y[0, :, 1]),
    "batch norm": lambda x, y: F.batch_norm(x, None, None, y[0, :, 0], None, training=True),
    "pool": lambda x, y: F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 2) + F.pad(x, (1, 1))[..., 1:3],
    "matmul": lambda x, y: x @ y.mT + y.mT.transpose(0, 1).reshape(B, C, D) @ x.mT,
    "contracted": lambda x, y: (x.mT @ y) + y.mT @ x,
    "both split": lambda x, y: (x @ x.mT) + (x.mT @ x).sum((1, 2), keepdim=True),
    "einsum": lambda x, y: torch.einsum("bcd,bed->bce", x, y)
    + torch.einsum("bcd,bcd,d->b", x, y, y[0, 0])[:, None, None],
    "linear": lambda x, y: F.linear(x, y[0], y[0, :, 0])
    + F.conv1d(x, y[:1, :, :1].expand(C, C, 1)).sum(-1, keepdim=True),
    "bmm": lambda x, y: torch.baddbmm(y[..., :1], x, y[:, :D, :]),
    "attention": lambda x, y: F.scaled_dot_product_attention(
        x.unsqueeze(-2), (2 * x).unsqueeze(-2), x.unsqueeze(-2), y.unsqueeze(-2)[..., :1]
    ),
    "cross-entropy": lambda x, y: F.cross_entropy(x, CLASSES, ignore_index=1, label_smoothing=0.2)
    + F.cross_entropy(x.transpose(1, 2), CLASSES_C, reduction="none").sum(),
    "cross-entropy with weights": lambda x, y: F.cross_entropy(x, CLASSES, weight=y[0, :, 0].detach().abs())
    + F.cross_entropy(x[:, :, 0], y[:, :, 0].softmax(-1).detach(), reduction="sum"),
    "tanh gelu": lambda x, y: F.gelu(x, approximate="tanh") + F.leaky_relu(x, 0.2) + F.softplus(x),
    "prelu": lambda x, y: F.prelu(x, y[0, :, 0]) + F.glu(torch.cat([x, x], -1), -1),
    "types": lambda x, y: x.to(torch.float32).double() + x.to(y) + x.detach() + (x > y) + torch.ones_like(x),
    "shapes": lambda x, y: x * x.size(1) + x.shape[-1] * x.numel() + len(x) + x.dim(),
    "sorted": lambda x, y: x.sort(-1).values + x.max(dim=0).values + x.amax(dim=-1, keepdim=True),
}  # fmt: skip
CLASSES, CLASSES_C = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 1], [1, 1, 5, 2]]), torch.tensor([[0, 1, 2, 3, 3, 2]] * B)
LAYOUTS = {
    "channels": (1, ((6, 6),)), "channels in blocks": (1, ((3, 3), (3, 3))), "pairs": (1, ((6, 3),)),
    "features": (2, ((4, 4),)), "feature blocks": (2, ((2, 2), (2, 2))),
}  # fmt: skip


def blocks_of(layout, size) -> Blocks:
    return tuple(Block(length, settled(units, size)) for length, units in layout)


@pytest.mark.parametrize("name", LAYOUTS)
def test_as_whole(shards, name):
    dim, layout = LAYOUTS[name]
    torch.manual_seed(0)
    given = torch.randn(2, B, C, D, dtype=torch.float64)
    blocks = blocks_of(layout, 2)

    def run(group):
        team, found = Team(group), {}
        for operation, function in OPERATIONS.items():
            part = team.narrow(given[0], dim, blocks).clone().requires_grad_()
            y = given[1].clone().requires_grad_()
            result = function(wrap(part.view_as(part), Spread(dim, blocks, team)), y)
            made = whole(result)
            assert tuple(result.shape) == tuple(made.shape), operation
            (made * weights(made)).sum().backward()
            found[operation] = made.detach(), part.grad, y.grad
        return found

    results = shards(2).each(run)
    for operation, function in OPERATIONS.items():
        x, y = given.clone().unbind(0)
        x.requires_grad_()
        y.requires_grad_()
        made = function(x, y)
        (made * weights(made)).sum().backward()
        for rank, (found, x_grad, y_grad) in enumerate(each[operation] for each in results):
            torch.testing.assert_close(found, made.detach(), rtol=1e-12, atol=1e-12, msg=operation)
            indices = torch.cat([torch.arange(*pair) for pair in ranges_of(blocks, rank)])
            torch.testing.assert_close(x_grad, x.grad.index_select(dim, indices), rtol=1e-10, atol=1e-12, msg=operation)
            if y.grad is None:
                assert y_grad is None, operation
            else:
                torch.testing.assert_close(y_grad, y.grad, rtol=1e-10, atol=1e-12, msg=operation)


def weights(made):
    return torch.arange(1.0, made.numel() + 1, dtype=torch.float64).view(made.shape).sin()


def test_errors_are_those_of_torch_or_say_what_to_do(shards):
    table = torch.randn(7, 2)
    blocks = blocks_of(((7, 7),), 2)

    def run(group):
        team = Team(group)
        split = wrap(team.narrow(table, 0, blocks).clone(), Spread(0, blocks, team))
        with pytest.raises(PlanError, match="changes a tensor in place"):
            split[0] = 1.0
        with pytest.raises(PlanError, match="cumsum_ changes a tensor in place"):
            split.cumsum_(0)
        with pytest.raises(RuntimeError, match="shape"):
            split.view(3, 5)
        with pytest.raises(IndexError, match="Target 7 is out of bounds"):
            F.cross_entropy(split.mT, torch.tensor([7, 0]))
        return True

    assert all(shards(2).each(run))


@pytest.mark.parametrize("padding", [3, -4])
def test_an_embedding_finds_rows_wherever_they_are_and_refuses_others(shards, padding):
    table, rows = torch.randn(7, 2, dtype=torch.float64), torch.tensor([[0, 6, 3], [4, 3, 0]])
    blocks = blocks_of(((7, 7),), 3)
    wrong = {0: -1, 2: 7}

    def run(group):
        team = Team(group)
        part = team.narrow(table, 0, blocks).clone().requires_grad_()
        split = wrap(part.view_as(part), Spread(0, blocks, team))
        found = F.embedding(rows, split, padding_idx=padding)
        (found * weights(found)).sum().backward()
        if group.rank in wrong:  # the shard at that end of the table is the one that can tell
            with pytest.raises(IndexError):
                F.embedding(torch.tensor([wrong[group.rank]]), split)
        return found.detach(), part.grad

    expected = table.clone().requires_grad_()
    made = F.embedding(rows, expected, padding_idx=padding)
    (made * weights(made)).sum().backward()
    results = shards(3).each(run)
    assert all(torch.equal(found, made) for found, _ in results)
    assert torch.equal(torch.cat([grad for _, grad in results]), expected.grad)


def test_dropout_differs_from_shard_to_shard_and_leaves_random_numbers_alike(shards):
    blocks = blocks_of(((1000, 1000),), 2)
    turn = threading.Lock()

    def run(group):
        split = wrap(torch.ones(500), Spread(0, blocks, Team(group)))
        with turn, torch._C.DisableTorchFunctionSubclass():  # threads share a generator, which processes do not
            torch.manual_seed(5)
            dropped, after = dropout(F.dropout, (split, 0.5), {}), torch.rand(3)
            torch.manual_seed(5)
            return dropped + 0, dropout(F.dropout, (split, 0.5), {}) + 0, after

    (left, again, after), (right, _, also_after) = shards(2).each(run)
    assert torch.equal(left, again)
    assert torch.equal(after, also_after)
    assert 200 < (left > 0).sum() < 300
    assert not torch.equal(left, right)
