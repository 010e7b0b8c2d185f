"""Jobs with something wrong in each."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import tricorn

generator = torch.Generator().manual_seed(0)
x = torch.randn(60, 12, generator=generator)
y = torch.randint(0, 3, (60,), generator=generator)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def make(**changes):
    fields = {
        "model": network, "loss": nn.functional.cross_entropy, "optimizer": tricorn.optim.SGD(lr=0.1),
        "train": tricorn.data.arrays(x, y), "batch_size": 10, "epochs": 20,
    }  # fmt: skip
    return tricorn.Job(**(fields | changes))


class Raising(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x):
        Raising.calls += 1
        if Raising.calls == 5:
            raise ValueError("my own mistake")
        return self.linear(x)


class Whole(nn.Module):
    """Refuses parts of a batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x):
        if len(x) < 10:
            raise ValueError("part of a batch")
        return self.linear(x)


class RaisingBlock(nn.Module):
    calls = 0

    def forward(self, x):
        if x.grad_fn is not None or x.requires_grad:
            raise ValueError("my own mistake")
        return x


def fussy_blocks() -> nn.Module:
    class Model(nn.Sequential):
        def pipeline_blocks(self):
            return list(self)

    return Model(nn.Linear(12, 16), nn.Tanh(), RaisingBlock(), nn.Linear(16, 3))


class Items:
    def __len__(self):
        return 60

    def __getitem__(self, index):
        return x[index], y[index]


class Misshapen(Items):
    def __getitem__(self, index):
        return (x[index][:5] if index == 33 else x[index]), y[index]


class Unreadable(Items):
    def __getitem__(self, index):
        if index == 33:
            Path("/nowhere/33.png").read_bytes()
        return x[index], y[index]


raising = make(model=Raising)
whole_batches = make(model=Whole, epochs=20_000)  # longer than a trial
raising_block = make(model=fussy_blocks)
diverging = make(model=lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)), optimizer=tricorn.optim.SGD(lr=1e30))
misshapen = make(train=Misshapen())
unreadable = make(train=Unreadable())
single = make(model=lambda: nn.Linear(12, 3))
large = make(model=lambda: nn.Sequential(nn.Linear(12, 10_000), nn.Tanh(), nn.Linear(10_000, 3)))


unmeasurable = make(
    evaluate=tricorn.data.arrays(x, y), metrics={"score": lambda output, target: torch.tensor(float("nan"))}
)


class Exiting(Raising):
    def forward(self, x):
        sys.exit("enough")


exiting = make(model=Exiting)


def with_a_child():
    subprocess.Popen(["true"])
    return unmeasurable


def leaving():
    sys.exit("no job today")


def wrong():
    return make(batch_size=0, optimizer=tricorn.optim.SGD(lr=-1.0))
