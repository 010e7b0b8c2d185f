"""Handwritten digits: the 1,797 real images of 8 x 8 pixels that scikit-learn carries, a fifth of them held out."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tricorn

EPOCHS, BATCH_SIZE, HELD_OUT = 20, 100, 360

digits = load_digits()
shuffled = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.images, dtype=torch.float32)[shuffled].unsqueeze(1) / 16
labels = torch.tensor(digits.target)[shuffled]
steps = EPOCHS * -(-(len(images) - HELD_OUT) // BATCH_SIZE)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


job = tricorn.Job(
    model=network,
    loss=nn.functional.cross_entropy,
    optimizer=tricorn.optim.AdamW(lr=5e-3),
    schedule=lambda step: 1 - step / steps,
    train=tricorn.data.arrays(images[HELD_OUT:], labels[HELD_OUT:]),
    evaluate=tricorn.data.arrays(images[:HELD_OUT], labels[:HELD_OUT]),
    metrics={"accuracy": accuracy},
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
)
