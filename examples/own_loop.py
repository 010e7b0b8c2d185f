"""The parameter server in a training loop of one's own: two workers, one model, updates whenever they are ready.

Here servers and workers are threads of one program. Elsewhere `tricorn server --workers 2` starts servers as processes,
and each worker calls `tricorn.ps.connect("servers.json", ...)`.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from tricorn import optim
from tricorn.ps import connect, serving

x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
y = x @ torch.arange(8.0) + 3.0


def train(servers, rank: int, steps: int) -> float:
    model = torch.nn.Linear(8, 1)
    with connect(servers, rank=rank, dense=dict(model.named_parameters()), optimizer=optim.SGD(lr=0.05)) as client:
        client.pull().wait()
        for step in range(steps):
            start = (2 * step + rank) * 32 % 4096
            model.load_state_dict(client.weights)
            loss = torch.nn.functional.mse_loss(model(x[start : start + 32])[:, 0], y[start : start + 32])
            for name, gradient in zip(client.gradients, torch.autograd.grad(loss, model.parameters()), strict=True):
                client.gradients[name].copy_(gradient)
            client.push_pull().wait()
        client.barrier()
        return loss.item()


def main(steps: int = 200) -> list[float]:
    with serving(workers=2) as servers, ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: train(servers, rank, steps), range(2)))


if __name__ == "__main__":
    print("last losses:", main())
