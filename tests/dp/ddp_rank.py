"""One rank of PyTorch's own DDP: ``ddp_rank.py RANK RANKS STORE RESULT`` trains once with each hook and once without,
on each backend.

RESULT becomes a safetensors file of losses and final weights by backend and hook.
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tricorn.comm  # noqa: F401  makes the backend known
from tricorn.dp import hooks

BACKENDS = ("gloo", "tricorn")
NAMES = ("bf16", "fp16", "int8", "topk", "powersgd")
STEPS = 40


def trained(name: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 96), nn.Tanh(), nn.Linear(96, 48), nn.Tanh(), nn.Linear(48, 4))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02)
    if name != "plain":
        ddp.register_comm_hook(hooks.State(), getattr(hooks, name))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.randn(60, 24, generator=torch.Generator().manual_seed(1))
    target = (inputs @ torch.randn(24, 4, generator=torch.Generator().manual_seed(2))).argmax(1)
    losses = torch.empty(STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(inputs[rank::ranks]), target[rank::ranks])
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"losses": losses, "weights": weights}


if __name__ == "__main__":
    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    found: dict[str, torch.Tensor] = {}
    for backend in BACKENDS:
        store = dist.FileStore(f"{sys.argv[3]}-{backend}", ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        for name in ("plain", *NAMES):
            found |= {f"{backend}/{name}/{what}": tensor for what, tensor in trained(name, rank, ranks).items()}
        dist.destroy_process_group()
    save_file(found, sys.argv[4])
