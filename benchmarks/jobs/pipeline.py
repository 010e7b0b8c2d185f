"""What pipelines are timed on: an uneven MLP, and a small transformer by tokens. All stages end between blocks."""

import os
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import tricorn

STEPS = int(os.environ.get("PIPELINE_STEPS", "60"))
CUTS = {"mlp": {2: (6,), 4: (2, 6, 8)}, "transformer": {2: (4,), 4: (2, 4, 6)}}
BATCH = {"mlp": 128, "transformer": 32}
VOCABULARY, LENGTH, WIDTH, LAYERS = 512, 64, 256, 6


class Attention(nn.Module):
    """Multi-head attention over what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BLD.shape
        split = self.into(x_BLD).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Attention, then two linear layers, each added to what it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Tokens(nn.Module):
    """Embeds tokens and their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.place


class Head(nn.Module):
    """Scores of the next token, [batch, vocabulary, length]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.norm(x)).transpose(1, 2)


def mlp() -> nn.Sequential:
    widths = (256, 1024, 512, 2048, 512, 1024, 10)
    layers = [each for a, b in pairwise(widths) for each in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def transformer() -> nn.Sequential:
    return nn.Sequential(Tokens(WIDTH), *(Layer(WIDTH) for _ in range(LAYERS)), Head(WIDTH))


def data(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of 8 batches, made up."""
    generator, samples = torch.Generator().manual_seed(0), 8 * BATCH[name]
    if name == "mlp":
        return torch.randn(samples, 256, generator=generator), torch.randint(0, 10, (samples,), generator=generator)
    tokens = torch.randint(0, VOCABULARY, (samples, LENGTH + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make(name: str) -> tricorn.Job:
    return tricorn.Job(
        model={"mlp": mlp, "transformer": transformer}[name], loss=F.cross_entropy, batch_size=BATCH[name],
        optimizer=tricorn.optim.AdamW(lr=1e-4), train=tricorn.data.arrays(*data(name)), epochs=max(1, STEPS // 8),
    )  # fmt: skip


job_mlp = make("mlp")
job_transformer = make("transformer")
