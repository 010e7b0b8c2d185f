"""Four kinds of models under every plan, with the workers and servers as threads: how far from one plain loop they end.

The models are a perceptron, a residual network of convolutions, a transformer whose last layer has the weights of its
embedding, and a recommender of two towers. Every batch is shared unevenly, and the last one of an epoch is ragged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from hybrid.crew import Crew, distance, plain
from torch import Tensor, nn
from torch.nn import functional as F

import tricorn
from tricorn import Table, optim, strategy
from tricorn.job import Job
from tricorn.mp.cut import NUMBERED
from tricorn.mp.mesh import chunks_of
from tricorn.mp.partition import blocks_of, legal_cuts
from tricorn.plan import Plan
from tricorn.state.flat import build_model

SAMPLES, BATCH_SIZE, EPOCHS = 31, 9, 5
STEPS = 20  # 4 steps an epoch, the last of 4 samples
LENGTH, VOCABULARY, WIDTH = 6, 23, 12

OPTIMIZERS: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "SGD": (optim.SGD(lr=0.05, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "Adam": (optim.Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01, fused=True)),
}
BOUNDS = {("SGD", "float32"): 1e-5, ("Adam", "float32"): 1e-4, ("SGD", "float64"): 1e-10, ("Adam", "float64"): 1e-10}

SERVED = ("ps+dp", "ps+mp")
PLANS: dict[str, dict[str, Any]] = {
    "dp2": {"strategy": "dp"}, "dp3": {"strategy": "dp", "workers": 3},
    "zero3 x 2": {"strategy": "dp", "zero": 3}, "ps": {"strategy": "ps", "servers": 2},
    **{f"pp{n}": {"strategy": "mp", "workers": n} for n in (2, 3, 4)},
    **{f"tp{n}": {"strategy": "mp", "workers": n, "tensor": n} for n in (2, 3, 4)},
    "dp2 x pp2": {"strategy": "mp", "workers": 4, "replicas": 2},
    "dp2 x tp2": {"strategy": "mp", "workers": 4, "replicas": 2, "tensor": 2},
    "pp2 x tp2": {"strategy": "mp", "workers": 4, "tensor": 2},
    "dp2 x pp2 x tp2": {"strategy": "mp", "workers": 8, "replicas": 2, "tensor": 2},
    "dp2 x pp2 zero1": {"strategy": "mp", "workers": 4, "replicas": 2, "zero": 1},
    "pp3 recompute": {"strategy": "mp", "workers": 3, "recompute": True},
    **{
        f"pp3 {schedule}": {"strategy": "mp", "workers": 3, "schedule": schedule}
        for schedule in ("gpipe", "1f1b", "interleaved", "zero-bubble")
    },
    "ps+dp": {"strategy": "ps+dp", "servers": 2}, "ps+pp": {"strategy": "ps+mp", "servers": 2},
    **{f"dp2 {how}": {"strategy": "dp", "embeddings": how} for how in ("rows", "columns", "tables")},
    "dp2 x pp2 rows": {"strategy": "mp", "workers": 4, "replicas": 2, "embeddings": "rows"},
}  # fmt: skip


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(8, 14), nn.ReLU(), nn.Linear(14, 12), nn.Tanh(), nn.Linear(12, 12), nn.GELU(),
            nn.Linear(12, 10), nn.ReLU(inplace=True), nn.Linear(10, 4),
        )  # fmt: skip


class Residual(nn.Module):
    """Convolutions with a skip around every two, one of which is a convolution itself."""

    class Block(nn.Module):
        def __init__(self, given: int, made: int, stride: int = 1) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.GroupNorm(4, made)
            self.conv2, self.norm2 = nn.Conv2d(made, made, 3, 1, 1, bias=False), nn.GroupNorm(4, made)
            self.skip = nn.Conv2d(given, made, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
            return F.relu(y + self.skip(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(self.Block(8, 8), self.Block(8, 8, 2), self.Block(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x.view(-1, 1, 6, 6))).mean((2, 3)))


class Transformer(nn.Module):
    """Predicts the next token; its last layer has the weights of its embedding if ``tied``."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 17, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3)
        )
        for layer in self.layers:
            # Without a bias of keys: its true gradient is zero, and Adam makes whole steps of what rounding leaves.
            layer.self_attn = nn.MultiheadAttention(WIDTH, 4, bias=False, batch_first=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).transpose(1, 2)


class Towers(nn.Module):
    """A user and an item, each by a table and a few layers, scored by the product of what these make."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(VOCABULARY, 8), nn.EmbeddingBag(VOCABULARY, 8, mode="mean")
        self.user = nn.Sequential(nn.Linear(8, 14), nn.ReLU(), nn.Linear(14, 9), nn.Tanh(), nn.Linear(9, 7))
        self.item = nn.Sequential(nn.Linear(8, 14), nn.ReLU(), nn.Linear(14, 9), nn.Tanh(), nn.Linear(9, 7))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.user(self.users(ids[:, 0])) * self.item(self.items(ids[:, 1:]))).sum(-1)


class Untied(Transformer):
    """Whose embedding can be a table."""

    def __init__(self) -> None:
        super().__init__(tied=False)


MODELS: dict[str, type[nn.Module]] = {
    "MLP": Perceptron, "ResNet": Residual, "tied transformer": Transformer, "transformer": Untied,
    "two towers": Towers,
}  # fmt: skip


TABLES = {"transformer": ("tokens",), "two towers": ("users", "items")}


def job_of(model: str, optimizer: str = "Adam", precision: str = "float64", *, tables: bool = False) -> Job:
    """A job that trains the model on random samples, clipped, with a schedule.

    With ``tables`` its embeddings are declared, and have Adagrad, which in one process too moves only rows that are
    read.
    """
    generator = torch.Generator().manual_seed(len(model))
    real = {"generator": generator, "dtype": getattr(torch, precision)}
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    classes = torch.randint(0, 4, (SAMPLES,), generator=generator)
    inputs, target = {
        "MLP": (torch.randn(SAMPLES, 8, **real), classes),
        "ResNet": (torch.randn(SAMPLES, 36, **real), classes),
        "two towers": (ids, torch.randn(SAMPLES, **real)),
    }.get(model, (ids, ids.roll(-1, 1)))
    fields: dict[str, Any] = {"precision": precision, "device": "cpu", "batch_size": BATCH_SIZE, "epochs": EPOCHS}
    table = Table(std=0.3, optimizer=optim.Adagrad(lr=0.1))
    return Job(
        model=MODELS[model], loss=F.mse_loss if model == "two towers" else F.cross_entropy,
        optimizer=OPTIMIZERS[optimizer][0], train=tricorn.data.arrays(inputs, target),
        tables=dict.fromkeys(TABLES.get(model, ()), table) if tables else {},
        clip_norm=0.5, schedule=lambda step: 1 / (1 + step / 10), **fields,
    )  # fmt: skip


def has_tables(options: dict[str, Any]) -> bool:
    """Whether the plan has tables elsewhere, and so wants a model that has some."""
    return options["strategy"] in SERVED or "embeddings" in options


def even_cuts(job: Job, plan: Plan) -> Plan:
    """The plan with cuts of as many blocks each, which need not be measured."""
    stages = plan.stages * chunks_of(plan) if plan.dense == "mp" else 1
    if plan.dense != "mp" or plan.cuts is not None:
        return plan
    legal = legal_cuts(blocks_of(job, build_model(job), stages, NUMBERED))
    return msgspec.structs.replace(plan, cuts=tuple(legal[len(legal) * s // stages] for s in range(1, stages)))


@cache
def _expected(model: str, optimizer: str, precision: str, tables: bool) -> Tensor:
    job = job_of(model, optimizer, precision, tables=tables)
    made = OPTIMIZERS[optimizer][1]

    def optimizers(whole: nn.Module) -> list[torch.optim.Optimizer]:
        dense = [p for name, p in whole.named_parameters() if name.removesuffix(".weight") not in job.tables]
        rows = [whole.get_submodule(name).weight for name in job.tables]
        return [made(dense), *([torch.optim.Adagrad(rows, lr=0.1)] if rows else [])]

    return plain(job, STEPS, optimizers)


def refusal(model: str, plan: str) -> str | None:
    """Why the model cannot be trained under the plan."""
    wanted = Plan(**PLANS[plan])
    return strategy.find(wanted).why_not(job_of(model, tables=wanted.strategy in SERVED), wanted)


def apart(model: str, plan: str, optimizer: str, precision: str, folder: Path) -> float:
    """The distance of the weights after 20 steps from those of one plain loop, relative in L2."""
    wanted = Plan(**PLANS[plan])
    tables = wanted.strategy in SERVED
    job = job_of(model, optimizer, precision, tables=tables)
    team = Crew(job, even_cuts(job, wanted), folder)
    try:
        team.join("initial")
        team.train(0, STEPS)
        expected = _expected(model, optimizer, precision, tables)
        return distance(team.weights(STEPS).double(), expected.double())
    finally:
        team.close()
