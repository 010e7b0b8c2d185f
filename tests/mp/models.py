"""Small models of every kind that a pipeline meets."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 12),
        nn.ReLU(inplace=True),
        nn.Linear(12, 4),
    )


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Tanh(), nn.Linear(16, 16))), nn.ReLU(), nn.Linear(16, 4)
    )


class Chain(nn.Module):
    """A plain functional chain over images of 1 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(6 * 4 * 4, 10)

    def forward(self, images):
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(x, 0.0, training=self.training)
        return self.head(self.dropout(x))


class Residual(nn.Module):
    """Each block adds to what it was given: a cut can lie between blocks, not within one."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.tanh(self.inner(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Add() for _ in range(4))
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.register_buffer("shift", torch.arange(4.0))
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale + self.shift


class Listed(nn.Module):
    """Hands a pair from block to block, and lists its blocks, for its forward could not be followed."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, pair):
            x, y = pair
            return torch.relu(self.left(x)) + y, self.right(y)

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Pair() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def pipeline_blocks(self):
        return [_twice, *self.parts, _joined, self.head]

    def forward(self, x):
        for block in self.pipeline_blocks():
            x = block(x)
        return x


def _twice(x):
    return x, x * 2


def _joined(pair):
    return pair[0] * pair[1]


class Language(nn.Module):
    """Predicts the next token from a mean over those so far; takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 11)

    def forward(self, tokens, offset):
        x = self.embedding(tokens) + offset.unsqueeze(-1)
        for layer in self.layers:
            x = torch.tanh(layer(x)).cumsum(1)
        return self.head(x).transpose(1, 2)


class Tied(nn.Module):
    """The first and last layer share their weight, so nothing between can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(F.relu(self.middle(F.relu(self.first(x)))))


class Branching(nn.Module):
    """Two ways from the input to the output: no place where one value is all."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.left(x) * F.relu(self.right(x))


class Deciding(nn.Module):
    """What it does depends on the values it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


class Wide(nn.Module):
    """One submodule of the user's own, which has to be looked into to find enough blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()

    def forward(self, x):
        return self.body(x)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class Named(nn.Module):
    """Passes a dict on after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def pipeline_blocks(self):
        return [self.first, _named, _unnamed, self.last]


def _named(x):
    return {"x": x}


def _unnamed(value):
    return value["x"]


class Setting(nn.Module):
    """Counts its calls, which is more than to compute."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), 0

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x))
