"""One rank of ``torch.distributed.pipelining`` on Gloo: a model of jobs/pipeline.py, cut where it is told, fused AdamW.

Prints the milliseconds of a step, of which the first half is left out.
Arguments: model, schedule, microbatches, rank, ranks, port.
"""

import os
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))
import pipeline
import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules
from torch.nn.functional import cross_entropy

warnings.filterwarnings("ignore")
name, schedule = sys.argv[1:3]
microbatches, rank, ranks = map(int, sys.argv[3:6])
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[6]}", rank=rank, world_size=ranks)
chunks = 2 if schedule == "interleaved" else 1
model = getattr(pipeline, name)()
edges = list(pairwise((0, *pipeline.CUTS[name][ranks * chunks], len(model))))
inputs, target = pipeline.data(name)
size = pipeline.BATCH[name]

stages = []
for number in range(rank, ranks * chunks, ranks):
    start, stop = edges[number]
    stages.append(pipelining.PipelineStage(model[start:stop], number, ranks * chunks, torch.device("cpu")))
kind = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero-bubble": schedules.ScheduleInterleavedZeroBubble,  # with one stage a rank it is ZB-H1
}[schedule]
single = schedule in ("gpipe", "1f1b")
runner = kind(stages[0] if single else stages, microbatches, loss_fn=cross_entropy)
optimizer = torch.optim.AdamW([p for stage in stages for p in stage.submod.parameters()], lr=1e-4, fused=True)

has_first, has_last = rank == 0, rank == ranks - 1
for step in range(pipeline.STEPS):
    if step == pipeline.STEPS // 2:
        dist.barrier()
        began = time.perf_counter()
    start = step * size % len(inputs)
    batch = slice(start, start + size)
    losses: list[torch.Tensor] = []
    optimizer.zero_grad()
    runner.step(
        *([inputs[batch]] if has_first else []),
        **({"target": target[batch], "losses": losses} if has_last else {}),
    )
    optimizer.step()
    if has_last:
        torch.stack(losses).mean().item()
dist.barrier()
print(1e3 * (time.perf_counter() - began) / (pipeline.STEPS - pipeline.STEPS // 2))
dist.destroy_process_group()
