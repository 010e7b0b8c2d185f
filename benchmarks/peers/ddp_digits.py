"""A plain DistributedDataParallel program for the digits, as its user would write it; run by torchrun.

Prints ``first ATTEMPT TIME`` when the first step after a (re)start is done.
"""

import os
import runpy
import sys
import time

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
declared = runpy.run_path(sys.argv[1])
steps = int(sys.argv[2])
job = declared["job"]
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(job.seed)
model = DistributedDataParallel(job.model())
optimizer = torch.optim.AdamW(model.parameters(), lr=job.optimizer.lr, fused=True)
images, labels = job.train.inputs[rank::size], job.train.target[rank::size]
for step in range(steps):
    index = torch.arange(step * 50, step * 50 + 50) % len(images)
    optimizer.zero_grad()
    job.loss(model(images[index]), labels[index]).backward()
    optimizer.step()
    if step == 0 and rank == 0:
        print("first", os.environ["TORCHELASTIC_RESTART_COUNT"], time.time(), flush=True)
dist.destroy_process_group()
