"""A model whose blocks pass several values on is cut anywhere in its graph."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from tricorn.errors import PlanError
from tricorn.mp import wire
from tricorn.mp.partition import Stage, blocks, legal_cuts, tied
from tricorn.state.flat import call_model

from .models import Deciding, Setting

CPU = torch.device("cpu")


class Skips(nn.Module):
    """Skip connections over the whole model, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(c, 2 * c, 3, padding=1) for c in (2, 4, 8))
        self.up = nn.ModuleList(nn.Conv1d(2 * c, c // 2, 3, padding=1) for c in (16, 8))
        self.end = nn.Conv1d(8, 3, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        kept = []
        for layer in self.down:
            x = self.act(layer(x))
            kept.append(x)
        for layer, skip in zip(self.up, (kept[2], kept[1]), strict=True):
            x = self.act(layer(torch.cat([x, skip], 1)))
        return self.end(torch.cat([x, kept[0]], 1))


class Language(nn.Module):
    """A decoder as people write it: positions, a causal mask, sizes used late, and a tied head."""

    class Layer(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x, mask):
            B, L, D = x.shape
            q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
            q, k, v = (part.view(B, L, self.heads, D // self.heads).transpose(1, 2) for part in (q, k, v))
            scores = (q @ k.transpose(-2, -1)) / (D // self.heads) ** 0.5
            y = scores.masked_fill(mask[:L, :L], float("-inf")).softmax(-1) @ v
            x = x + self.out(y.transpose(1, 2).reshape(B, L, D))
            return x + self.mlp(self.norm2(x))

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.layers = nn.ModuleList(self.Layer(8, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens, weight=None, *, scale: float = 1.0):
        B, L = tokens.size()
        x = self.tokens(tokens) + self.places(torch.arange(L, device=tokens.device))
        mask = torch.ones(L, L, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        if weight is not None:
            x = x * weight
        x = self.head(self.norm(x)) * scale
        return x.view(B * L, -1)


class Towers(nn.Module):
    """Two towers whose inputs meet at the end, one of them used late."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(13, 6), nn.EmbeddingBag(17, 6)
        self.user = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        self.item = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, user, items, price):
        a = self.user(self.users(user))
        b = self.item(self.items(items))
        return (a * b).sum(-1) + price


class Recurrent(nn.Module):
    """A layer that returns a tuple, and memory that is looked at twice and changed in place."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        out, (hidden, _) = self.cells(x)
        y = self.head(out)
        first = y[:, 0]
        y.mul_(2.0)
        y += hidden.transpose(0, 1)
        return self.last(y).sum(1) + self.last(first)


class Torchs(nn.Module):
    """PyTorch's own chain of layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


class Partly(nn.Module):
    """One submodule decides by values, and another counts its calls: each is one step."""

    def __init__(self, deciding):
        super().__init__()
        self.first, self.deciding, self.last = nn.Linear(6, 6), deciding(), nn.Linear(6, 6)
        self.counting = Setting()

    def forward(self, x):
        return self.last(self.counting(self.deciding(self.first(x))))


TOKENS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
GRAPHS = {
    "Skips": (Skips, torch.randn(3, 2, 8)),
    "Language": (Language, TOKENS),
    "Towers": (Towers, (torch.arange(3), TOKENS, torch.randn(3))),
    "Recurrent": (Recurrent, torch.randn(3, 4, 6)),
    "Torchs": (Torchs, torch.randn(3, 4, 8)),
    "Partly": (partial(Partly, Deciding), torch.randn(3, 6)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_cut_anywhere_and_its_gradients_are_the_models(name):
    torch.manual_seed(0)
    made, inputs = GRAPHS[name]
    model = made().double()
    inputs = tuple(
        i.double() if i.is_floating_point() else i for i in (inputs if isinstance(inputs, tuple) else [inputs])
    )
    found = blocks(model, 4, inputs)
    assert len(found) >= 4
    call_model(model, inputs).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    tried = 0
    for cut in legal_cuts(found):
        first, last = Stage(model, found, 0, cut, CPU), Stage(model, found, cut, len(found), CPU)
        handed_on = first(inputs)
        if wire.obstacle(handed_on):
            continue
        tried += 1
        received = [part.detach().clone().requires_grad_(part.requires_grad) for part in wire.tensors(handed_on)]
        copies = [part.clone() for part in received]
        output = last(copies[0] if isinstance(handed_on, torch.Tensor) else tuple(copies))
        model.zero_grad()
        output.square().sum().backward()
        wanted = [(part, like.grad) for part, like in zip(wire.tensors(handed_on), received, strict=True)]
        wanted = [(part, grad) for part, grad in wanted if part.requires_grad and grad is not None]
        if wanted:
            torch.autograd.backward([part for part, _ in wanted], [grad for _, grad in wanted])
        for parameter, gradient in expected.items():
            assert torch.allclose(model.get_parameter(parameter).grad, gradient, rtol=1e-10, atol=1e-12), (
                cut,
                parameter,
            )
    assert tried >= 3


def test_tied_parameters_are_reported_with_the_stages_that_hold_them():
    model = Language()
    found = blocks(model, 2, TOKENS)
    cuts = legal_cuts(found)
    assert cuts == list(range(1, len(found)))
    middle = len(found) // 2
    assert tied(model, found, (middle,)) == {"tokens.weight": (0, 1)}
    assert tied(model, found, (middle, middle + 1)) == {"tokens.weight": (0, 2)}
    assert tied(model, found, ()) == {}
    stages = [Stage(model, found, 0, middle, CPU), Stage(model, found, middle, len(found), CPU)]
    assert all("tokens.weight" in dict(stage.named_parameters()) for stage in stages)


def test_a_stage_keeps_nothing_of_the_others_alive():
    model = Language()
    found = blocks(model, 2, TOKENS)
    stage = Stage(model, found, len(found) - 1, len(found), CPU)
    others = weakref.ref(model), weakref.ref(model.layers[0].qkv.weight)
    del model, found
    gc.collect()
    assert [other() for other in others] == [None, None]
    assert stage.last


def test_what_the_first_sample_lacks_keeps_its_default_and_must_not_come():
    model = Language()
    found = blocks(model, 2, {"tokens": TOKENS})
    stage = Stage(model, found, 0, 1, CPU)
    stage({"tokens": TOKENS})
    with pytest.raises(PlanError, match="called with weight, which the first sample has not"):
        stage({"tokens": TOKENS, "weight": torch.ones(8)})


def test_a_submodule_that_cannot_be_followed_is_named_where_it_is_in_the_way():
    with pytest.raises(PlanError, match="forward of Deciding cannot be followed"):
        blocks(Partly(Deciding), 30)
    for fineness in (0, 30):
        assert "deciding" in [block.name for block in blocks(Partly(Deciding), 2, fineness=fineness)]
