"""A small transformer that learns to continue text, byte by byte: CPython's own documentation topics, the last tenth of
them held out. Beside it the loss of a bigram model, which a language model has to beat.
"""

import pydoc_data.topics

import torch
from torch import Tensor, nn

import tricorn

CONTEXT, WIDTH, HEADS, BLOCKS, BYTES = 64, 96, 4, 2, 256
EPOCHS, BATCH_SIZE = 6, 32

text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()
tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
held_out = len(tokens) // 10


def windows(part: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and, shifted by one byte, targets: [samples, CONTEXT] each."""
    rows = (len(part) - 1) // CONTEXT
    return part[: rows * CONTEXT].view(rows, CONTEXT), part[1 : rows * CONTEXT + 1].view(rows, CONTEXT)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 10)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places)))


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def bigram_loss() -> float:
    """The held-out loss of a model that knows only which byte follows which, and how often."""
    train, test = tokens[:-held_out], tokens[-held_out:]
    pairs = torch.full((BYTES, BYTES), 0.1).flatten()
    pairs += torch.bincount(train[:-1] * BYTES + train[1:], minlength=BYTES * BYTES)
    chances = pairs.view(BYTES, BYTES) / pairs.view(BYTES, BYTES).sum(1, keepdim=True)
    return -chances[test[:-1], test[1:]].log().mean().item()


job = tricorn.Job(
    model=Writer,
    loss=cross_entropy,
    optimizer=tricorn.optim.AdamW(lr=3e-3),
    clip_norm=1.0,
    train=tricorn.data.arrays(*windows(tokens[:-held_out])),
    evaluate=tricorn.data.arrays(*windows(tokens[-held_out:])),
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
)

if __name__ == "__main__":
    result = tricorn.train(job)
    print(f"held-out loss {result.summary['metrics']['loss']:.3f}, of a bigram model {bigram_loss():.3f}")
