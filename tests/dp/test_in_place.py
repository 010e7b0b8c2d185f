"""Linear layers that write their gradients themselves: whatever a model does with them, they are the usual ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tricorn import optim
from tricorn.dp import in_place
from tricorn.job import Job


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x))


class Repeated(Plain):
    """A layer used three times, and inputs of three dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.second(self.second(self.hidden(x))))
        return self.last(h.view(-1, 1, 8).expand(-1, 3, 8)).mean(1)


class Hooked(Plain):
    """Somebody wants to see, and change, the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight.register_hook(lambda grad: grad / 2)


class Penalised(Plain):
    """The gradient for the input is differentiated itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            y = super().forward(x)
            (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return y + grad.square().sum(1, keepdim=True)


class Looking(Plain):
    """The forward asks for gradients of weights, for its own use, and of a copy of itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = copy.deepcopy(self.first)
        assert torch.equal(twin(x), self.first(x))
        y = super().forward(x)
        (grad,) = torch.autograd.grad(y.square().sum(), self.first.weight, retain_graph=True)
        return y + grad.sum()


class Checkpointed(Plain):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.hidden, x.requires_grad_(), use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


class Embedded(Plain):
    """Sparse gradients, and a weight that two kinds of layers use."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, 6, sparse=True)
        self.shared = nn.Embedding(4, 8)
        self.last.weight = self.shared.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kinds = (x[:, 0] > 0).long()
        return self.last(self.hidden(x + self.rows(kinds)) + self.shared(kinds))


def job(model: type[nn.Module], **fields: object) -> Job:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(24, 6, generator=generator, dtype=torch.float64), torch.randint(0, 4, (24,), generator=generator)
    return Job(
        model=model, loss=F.cross_entropy, optimizer=optim.SGD(lr=0.05), train=torch.utils.data.TensorDataset(*data),
        batch_size=8, epochs=2, precision="float64", device="cpu", **fields,
    )  # fmt: skip


@pytest.mark.parametrize("microbatches", [None, 2])
@pytest.mark.parametrize(
    "model", [Plain, Repeated, Hooked, Penalised, Looking, Checkpointed, Reentrant, Embedded], ids=lambda m: m.__name__
)
def test_the_usual_gradients(crew, plain_loop, model, microbatches):
    this = job(model)
    expected, losses = plain_loop(this, lambda p: torch.optim.SGD(p, lr=0.05))
    team = crew(this, 2, microbatches=microbatches)
    team.join("initial")
    assert team.train() == pytest.approx(losses, rel=1e-10)
    assert max(team.distances(expected)) <= 1e-10


def test_nothing_is_made_elsewhere_and_no_layer_stays_changed(crew, monkeypatch):
    put, left = in_place._put, []
    monkeypatch.setattr(in_place, "_put", lambda *given: left.append(put(*given)))
    team = crew(job(Plain), 2)
    team.join("initial")
    team.train(0, 2)
    assert left == [None] * (2 * 2 * 5)
    module = team.trainers[0]._module
    for trainer in team.trainers:
        trainer.close()
    assert not any("forward" in vars(layer) for layer in module.modules())
