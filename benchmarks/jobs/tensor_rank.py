"""One rank of Tricorn's tensor parallel on a model of tensor.py; prints its address, then the milliseconds of a step.

Reads the addresses of all ranks, as JSON, from its input. Arguments: model, rank, ranks.
"""

import json
import sys

import tensor
import torch

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.mp.tensor import apply, find

name, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = tensor.MODELS[name]()
listener = PeerListener(b"s" * 32)
print(json.dumps(listener.address), flush=True)
addresses = [tuple(address) for address in json.loads(sys.stdin.readline())]
group = Group(rank=rank, addresses=addresses, listener=listener, secret=b"s" * 32, epoch=1, channel="bench")
if ranks > 1:
    apply(model, find(model, torch.randn(2, *model.SHAPE[1:]), ranks), group)
print(tensor.timed(model, lambda part: part, group.barrier))
group.close()
listener.close()
