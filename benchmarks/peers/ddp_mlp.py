"""One rank of DistributedDataParallel on Gloo, or of none: the MLP of jobs/mlp.py, 64 samples a rank, fused AdamW.

The kinds: "ddp", "ddp-view" (gradients are views of the buckets), "alone", and "meet": alone, but each step waits for
the slower of the two in shared memory, as whatever is synchronous has to. malloc keeps what is freed, as in Tricorn's
workers. Prints the milliseconds of a step, of which the first fifth is left out.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import mlp
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tricorn.comm
from tricorn.state import memory

assert tricorn.comm  # imported for the backend

kind, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
model = mlp.network()
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
memory.keep_freed()
if kind.startswith("ddp"):
    model = DistributedDataParallel(model, gradient_as_bucket_view=kind == "ddp-view")
meeting = dist.new_group(backend="tricorn") if kind == "meet" else None
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
dist.barrier()
half = mlp.BATCH_SIZE // 2
for step in range(mlp.STEPS):
    if step == mlp.STEPS // 5:
        began = time.perf_counter()
    start = step * mlp.BATCH_SIZE % len(mlp.inputs) + rank * half
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(mlp.inputs[start : start + half]), mlp.target[start : start + half])
    loss.backward()
    optimizer.step()
    loss.item()
    if meeting is not None:
        dist.barrier(meeting)
print(1e3 * (time.perf_counter() - began) / (mlp.STEPS - mlp.STEPS // 5))
dist.destroy_process_group()
