"""Models of every kind whose layers are split, with inputs and targets for each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, L, W, V = 4, 6, 12, 23  # samples, length, width, vocabulary


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 13), nn.ReLU(inplace=True), nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 11), nn.GELU()
        )
        self.head = nn.Linear(11, 5)

    def forward(self, x):
        return self.head(self.layers(x))


class Gated(nn.Module):
    """SwiGLU, by two layers and by one that is taken apart, with RMS norm and a scale that all features share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.RMSNorm(8), nn.Linear(8, 14, bias=False), nn.Linear(8, 14)
        self.down, self.both, self.out = nn.Linear(14, 8), nn.Linear(8, 22), nn.Linear(11, 5)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y) * self.scale)
        a, b = self.both(self.norm(x)).chunk(2, dim=-1)
        return self.out(a * torch.sigmoid(b))


class Residual(nn.Module):
    """A ResNet: two convolutions in a block, batch norm, a skip, and a strided one with a skip of its own."""

    class Block(nn.Module):
        def __init__(self, given: int, made: int, stride: int = 1) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made)
            self.conv2, self.bn2 = nn.Conv2d(made, made, 3, 1, 1, bias=False), nn.BatchNorm2d(made)
            self.skip = nn.Conv2d(given, made, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + self.skip(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3, padding=1)
        self.blocks = nn.Sequential(self.Block(5, 5), self.Block(5, 7, 2))
        self.wide, self.norm = nn.Conv2d(7, 9, 1), nn.GroupNorm(3, 9)
        self.depthwise, self.hidden = nn.Conv2d(9, 9, 3, groups=9), nn.Linear(9 * 4, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x.view(-1, 1, 8, 8)))
        x = F.pad(F.relu(self.norm(self.wide(x))), (0, 0, 0, 0))
        x = torch.flatten(self.depthwise(x), 1)
        return self.head(F.relu(self.hidden(x)))


class Attention(nn.Module):
    """Heads by hand: fused or apart, by the fused kernel or by matrix products or einsum, with fewer heads of keys."""

    def __init__(self, kind: str, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        if kind == "grouped":
            self.q, self.kv = nn.Linear(W, W), nn.Linear(W, W)
        if kind == "apart":
            self.q, self.k, self.v = nn.Linear(W, W), nn.Linear(W, W, bias=False), nn.Linear(W, W)
        self.bias = nn.Parameter(torch.zeros(heads, L, L))
        self.norm = nn.LayerNorm(W // heads)

    def forward(self, x):
        batch, length, width = x.shape
        if self.kind == "unflatten":
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))
        if self.kind == "split":  # as nanoGPT
            q, k, v = self.qkv(x).split(width, dim=2)
            q, k, v = (t.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1))) + self.bias
            mask = torch.ones(length, length).tril().view(1, 1, length, length)
            weights = F.softmax(scores.masked_fill(mask[:, :, :length, :length] == 0, float("-inf")), dim=-1)
            return self.out((weights @ v).transpose(1, 2).contiguous().view(batch, length, width))
        if self.kind == "apart":
            q, k, v = (f(x).reshape(batch, length, self.heads, -1) for f in (self.q, self.k, self.v))
            weights = torch.einsum("blhd,bmhd->bhlm", self.norm(q), k).softmax(-1)
            return self.out(torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(-2))
        if self.kind == "merged":  # batch and heads as one dimension
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (
                t.view(batch, length, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, length, -1)
                for t in (q, k, v)
            )
            y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
            return self.out(y.view(batch, self.heads, length, -1).transpose(1, 2).reshape(batch, length, width))
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        kv = self.kv(x).view(batch, length, 2, self.heads // 2, -1)
        k, v = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Writer(nn.Module):
    """A transformer by hand, whose last layer has the weights of its embedding."""

    def __init__(self, kind: str = "unflatten", heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, W), nn.Parameter(torch.randn(L, W))
        self.attention, self.norm1, self.norm2 = Attention(kind, heads), nn.LayerNorm(W), nn.LayerNorm(W)
        self.mlp = nn.Sequential(nn.Linear(W, 17), nn.GELU(), nn.Dropout(0.0), nn.Linear(17, W))
        self.last = nn.LayerNorm(W)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.last(x) @ self.tokens.weight.t()


class Encoder(nn.Module):
    """torch's own transformer, with causal and padding masks, and a tied last layer."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, W, padding_idx=0)
        layer = nn.TransformerEncoderLayer(W, heads, 17, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(W, heads, kdim=W, vdim=W)
        self.head = nn.Linear(W, V)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens)
        causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=x.dtype)
        padding = torch.zeros_like(tokens, dtype=x.dtype).masked_fill(tokens == 0, -math.inf)
        x = self.encoder(x, mask=causal, src_key_padding_mask=padding)
        y, weights = self.cross(x.transpose(0, 1), x.flip(1).transpose(0, 1), x.transpose(0, 1))
        return self.head(x + y.transpose(0, 1) + weights.sum(-1, keepdim=True))


class Towers(nn.Module):
    """A recommender of two towers: the last layers are split, and the product of their outputs is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(V, W), nn.EmbeddingBag(V, W)
        self.user = nn.Sequential(nn.Linear(W, 14), nn.ReLU(), nn.Linear(14, 9), nn.ReLU(), nn.Linear(9, 7))
        self.item = nn.Sequential(nn.Linear(W, 14), nn.ReLU(), nn.Linear(14, 9), nn.ReLU(), nn.Linear(9, 7))

    def forward(self, tokens):
        user, item = self.user(self.users(tokens[:, 0])), self.item(self.items(tokens))
        return (user * item).sum(-1)


class Drawn(nn.Module):
    """Layers and what is between them as drawn; ``width`` features go in and out of each."""

    def __init__(self, width: int, parts: list[tuple[str, int]]) -> None:
        super().__init__()
        self.width, self.parts = width, parts
        self.layers = nn.ModuleList(self._layer(kind, number) for kind, number in parts)
        self.head = nn.Linear(width, 3)

    def _layer(self, kind: str, number: int) -> nn.Module:
        width = self.width
        if kind in ("linear", "skip", "twice"):
            return nn.Linear(width, width, bias=number % 2 == 0)
        if kind == "pair":
            return nn.Sequential(nn.Linear(width, number + 4), nn.SiLU(), nn.Linear(number + 4, width))
        if kind == "gate":
            return nn.ModuleList([nn.Linear(width, 2 * (number + 4)), nn.Linear(number + 4, width)])
        if kind == "join":
            return nn.ModuleList([nn.Linear(width, number + 4), nn.Linear(width, 5), nn.Linear(number + 9, width)])
        return nn.LayerNorm(width) if kind == "norm" else nn.Identity()

    def forward(self, x):
        for layer, (kind, number) in zip(self.layers, self.parts, strict=True):
            if kind == "skip":
                x = x + torch.tanh(layer(x)) * 0.5
            elif kind == "twice":
                x = torch.tanh(layer(torch.tanh(layer(x))))
            elif kind == "gate":
                a, b = layer[0](x).chunk(2, -1) if number % 2 else layer[0](x).unflatten(-1, (2, -1)).unbind(-2)
                x = layer[1](a * b.sigmoid())
            elif kind == "join":
                x = layer[2](torch.cat([layer[0](x), layer[1](x).relu()], dim=1))
            elif kind == "reverse":
                x = x.flip(-1) * x.softmax(-1) if number % 2 else x - x.mean(-1, keepdim=True)
            else:
                x = layer(x)
        return self.head(x)


KINDS = ("linear", "skip", "twice", "pair", "gate", "join", "norm", "reverse", "nothing")


def tokens(samples: int) -> Tensor:
    found = torch.randint(1, V, (samples, L))
    found[: samples // 2, -2:] = 0
    return found


def classes_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=0, label_smoothing=0.1)


def click_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))


MODELS = {
    "mlp": Mlp, "gated": Gated, "residual": Residual, "encoder": Encoder, "towers": Towers,
    **{kind: (lambda kind=kind: Writer(kind)) for kind in ("unflatten", "split", "apart", "merged", "grouped")},
    "six heads by hand": lambda: Writer("split", 6), "six heads": lambda: Encoder(6),
}  # fmt: skip


def sample(model: nn.Module, samples: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    if isinstance(model, Mlp | Gated):
        return torch.randn(samples, 8), torch.randint(0, 5, (samples,))
    if isinstance(model, Residual):
        return torch.randn(samples, 64), torch.randint(0, 5, (samples,))
    given = tokens(samples)
    return given, torch.randint(0, 2, (samples,)) if isinstance(model, Towers) else given.roll(-1, 1)


def loss_of(model: nn.Module):
    if isinstance(model, Mlp | Gated | Residual):
        return classes_loss
    return click_loss if isinstance(model, Towers) else token_loss
