"""PyTorch's DDP and FSDP2 on Gloo and on ``tricorn``, interleaved, in one of two processes.

Prints, as JSON, the milliseconds of a step for each of both and each backend, one for each round.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import mlp
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tricorn.comm

STEPS, WARM_UP = 20, 3
WIDTH, BYTES = 128, 256
assert tricorn.comm


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = after // before
        self.way = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.around = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.way(x) + self.around(x))


class Writer(nn.Module):
    """Two blocks of a transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, WIDTH)
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(2)
        ])  # fmt: skip
        self.head = nn.Linear(WIDTH, BYTES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x))).flatten(0, 1)


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, and what one rank is given in each step."""
    if name == "MLP":
        return mlp.network(), torch.randn(64, 256), torch.randint(10, (64,))
    if name == "ResNet":
        widths = [16, 16, 32, 64, 128]
        blocks = [Block(*pair) for pair in pairwise(widths)]
        model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              nn.Linear(128, 10))  # fmt: skip
        return model, torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    return Writer(), torch.randint(BYTES, (4, 32)), torch.randint(BYTES, (4 * 32,))


def ddp(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def fsdp2(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(name: str, rank: int, port: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    groups = {"gloo": dist.group.WORLD, "tricorn": dist.new_group(backend="tricorn")}
    programs = {}
    for wrap in (ddp, fsdp2):
        for backend, group in groups.items():
            torch.manual_seed(0)
            model, inputs, target = case(name)
            model = wrap(model, group)
            programs[wrap.__name__, backend] = model, torch.optim.AdamW(model.parameters(), lr=1e-4), inputs, target
    found: dict[str, list[float]] = {f"{wrap} {backend}": [] for wrap, backend in programs}
    for _ in range(rounds):
        for (wrap, backend), (model, optimizer, inputs, target) in programs.items():
            for step in range(WARM_UP + STEPS):
                if step == WARM_UP:
                    dist.barrier()
                    began = time.perf_counter()
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), target).backward()
                optimizer.step()
            dist.barrier()
            found[f"{wrap} {backend}"].append(1e3 * (time.perf_counter() - began) / STEPS)
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
