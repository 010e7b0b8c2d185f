"""Embeddings by rows give torch's own outputs and gradients, and know most of their rows in advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tricorn
from tricorn.errors import PlanError, UsageError
from tricorn.ps.lookup import Lookups
from tricorn.ps.lookup_sources import trace, whole_numbers
from tricorn.state.flat import call_model
from tricorn.state.rows import row_tables

ROWS, DIM = 50, 4
torch.set_num_threads(1)


def job_of(model: Callable[[], nn.Module], tables: dict[str, tricorn.Table] | None) -> tricorn.Job:
    return tricorn.Job(
        model=model, loss=nn.functional.mse_loss, optimizer=tricorn.optim.SGD(lr=0.1),
        train=tricorn.data.arrays(np.zeros((4, 1)), np.zeros(4)), batch_size=2, epochs=1, tables=tables,
    )  # fmt: skip


class Rig:
    """A model beside its twin by rows, whose servers are the whole weights; ``asked`` counts reads within forward."""

    def __init__(self, model: nn.Module, *, declared: bool = False) -> None:
        import tricorn.table

        self.whole = model.double()
        self.weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "num_embeddings")}
        tables = dict.fromkeys(self.weights, tricorn.Table()) if declared else None
        large, tricorn.table.LARGE = tricorn.table.LARGE, 1
        try:
            self.tables = row_tables(job_of(lambda: model, tables), model)
        finally:
            tricorn.table.LARGE = large
        import copy

        self.by_rows = copy.deepcopy(model)
        self.asked = 0
        self.lookups = Lookups(self.by_rows, self.tables, self._ask)

    def _ask(self, wanted: list[Any]) -> None:
        self.asked += 1
        self.read(wanted)

    def read(self, wanted: list[Any]) -> None:
        for table, ids_U, out_UD in wanted:
            out_UD.copy_(self.weights[self.tables[table].name][ids_U])

    def step(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Both outputs, after a comparison of all gradients."""
        self.whole.zero_grad()
        self.by_rows.zero_grad()
        expected = call_model(self.whole, inputs)
        ahead = self.lookups.ahead(inputs)
        self.read(ahead.wanted)
        self.lookups.begin(ahead)
        output = call_model(self.by_rows, inputs)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        for out in (expected, output):
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found = {self.tables[g.table].name: g for g in self.lookups.end()}
        for name, module in self.whole.named_modules():
            if hasattr(module, "num_embeddings"):
                grad = torch.zeros_like(module.weight)
                if name in found:
                    assert len(set(found[name].ids_U.tolist())) == len(found[name].ids_U)
                    grad[found[name].ids_U] = found[name].grads_UD
                due = module.weight.grad if module.weight.grad is not None else torch.zeros_like(grad)
                torch.testing.assert_close(grad, due.to_dense(), rtol=1e-12, atol=1e-12)
        return output, expected


class Apply(nn.Module):
    """A model of embeddings and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def ids(*shape: int, low: int = 0, seed: int = 0) -> Tensor:
    return torch.randint(low, ROWS, shape, generator=torch.Generator().manual_seed(seed))


def table(**options: Any) -> nn.Embedding:
    return nn.Embedding(ROWS, DIM, **options)


def bag(**options: Any) -> nn.EmbeddingBag:
    return nn.EmbeddingBag(ROWS, DIM, **options)


OFFSETS = torch.tensor([0, 0, 3, 7])  # the first bag is empty
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "one dimension": (lambda: Apply(lambda m, x: m.e(x), e=table()), lambda s: (ids(7, seed=s),)),
    "two dimensions": (lambda: Apply(lambda m, x: m.e(x), e=table()), lambda s: (ids(5, 3, seed=s),)),
    "int32": (lambda: Apply(lambda m, x: m.e(x), e=table()), lambda s: (ids(5, 3, seed=s).int(),)),
    "columns": (lambda: Apply(lambda m, x: m.e(x[:, 1:3]).sum(1) + m.f(x[:, 0]), e=table(), f=table()),
                lambda s: (ids(6, 4, seed=s),)),
    "joined with numbers": (lambda: Apply(lambda m, x, w: torch.cat([w, m.e(x).flatten(1)], 1), e=table()),
                            lambda s: (ids(5, 3, seed=s), torch.rand(5, 2, dtype=torch.float64))),
    "padding": (lambda: Apply(lambda m, x: m.e(x), e=table(padding_idx=3)), lambda s: (ids(20, 3, seed=s),)),
    "padding counted from the end": (lambda: Apply(lambda m, x: m.e(x), e=table(padding_idx=-1)),
                                     lambda s: (ids(40, 3, seed=s),)),
    "used twice": (lambda: Apply(lambda m, x, y: m.e(x) * m.e(y), e=table()),
                   lambda s: (ids(9, seed=s), ids(9, seed=s + 1))),
    "the same ids twice": (lambda: Apply(lambda m, x: m.e(x) * m.e(x), e=table()), lambda s: (ids(9, seed=s),)),
    "one module in two places": (lambda: Apply(lambda m, x: m.e(x) + 2 * m.f(x), **dict.fromkeys("ef", table())),
                                 lambda s: (ids(9, seed=s),)),
    "not used": (lambda: Apply(lambda m, x: m.e(x), e=table(), f=table()), lambda s: (ids(9, seed=s),)),
    "sparse": (lambda: Apply(lambda m, x: m.e(x), e=table(sparse=True)), lambda s: (ids(9, seed=s),)),
    "sum bag": (lambda: Apply(lambda m, x: m.e(x), e=bag(mode="sum")), lambda s: (ids(5, 3, seed=s),)),
    "mean bag": (lambda: Apply(lambda m, x: m.e(x), e=bag()), lambda s: (ids(5, 3, seed=s),)),
    "max bag": (lambda: Apply(lambda m, x: m.e(x), e=bag(mode="max")), lambda s: (ids(5, 3, seed=s),)),
    "padded bag": (lambda: Apply(lambda m, x: m.e(x), e=bag(padding_idx=2)), lambda s: (ids(30, 3, seed=s),)),
    "weighted bag": (lambda: Apply(lambda m, x, w: m.e(x, per_sample_weights=w), e=bag(mode="sum")),
                     lambda s: (ids(5, 3, seed=s), torch.rand(5, 3, dtype=torch.float64))),
    "offsets": (lambda: Apply(lambda m, x: m.e(x, OFFSETS), e=bag()), lambda s: (ids(11, seed=s),)),
    "last offset": (lambda: Apply(lambda m, x: m.e(x, OFFSETS), e=bag(include_last_offset=True)),
                    lambda s: (ids(7, seed=s),)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_torch_does(case: str) -> None:
    build, inputs = CASES[case]
    torch.manual_seed(0)
    rig = Rig(build())
    for seed in range(3):
        asked = rig.asked
        rig.step(inputs(seed))
    assert rig.asked == asked, "all rows are known in advance by now"


COMPUTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "hashed": lambda m, x: m.e((x * 7 + 3) % ROWS),
    "transposed": lambda m, x: m.e(x.t().contiguous()),
    "sorted": lambda m, x: m.e(x.sort().values),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_ids_that_are_computed_are_read_when_they_are_asked_for(case: str) -> None:
    rig = Rig(Apply(COMPUTED[case], e=table()))
    for seed in range(8):
        rig.step((ids(6, 4, seed=seed),))
    assert rig.asked >= 6


def test_fields_that_share_a_table_are_foreseen_with_what_is_added_to_them() -> None:
    shift = torch.tensor([0, 10, 20])
    rig = Rig(Apply(lambda m, x: m.e(x % 10 + shift), e=table()))
    for seed in range(4):
        rig.step((ids(6, 3, seed=seed) % 10,))
    assert rig.asked == 1


def test_a_model_that_changes_its_mind_stays_right() -> None:
    calls = iter(range(100))

    def by_turns(model: Any, x: Tensor, y: Tensor) -> Tensor:
        turn = next(calls) // 2  # two models take each turn
        return model.e(x if turn % 3 else y) + (model.e(y) if turn % 2 else 0)

    rig = Rig(Apply(by_turns, e=table()))
    for seed in range(20):
        rig.step((ids(9, seed=seed), ids(9, seed=seed + 100)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_same_rows(reentrant: bool) -> None:
    anchor = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def again(model: Any, x: Tensor) -> Tensor:
        def part(one: Tensor) -> Tensor:
            return torch.tanh(model.e(x[:, 0]) * model.e(x[:, 1:]).sum(1) * one)

        return checkpoint(part, anchor, use_reentrant=reentrant)

    rig = Rig(Apply(again, e=table()))
    for seed in range(3):
        rig.step((ids(6, 3, seed=seed),))
    assert rig.asked == 2


def test_gradients_of_gradients() -> None:
    def penalty(model: Any, x: Tensor) -> Tensor:
        rows = model.e(x)
        (slope,) = torch.autograd.grad((rows**3).sum(), rows, create_graph=True)
        return slope**2 + rows

    Rig(Apply(penalty, e=table())).step((ids(6, 3),))


@pytest.mark.parametrize("build", [table, bag])
def test_no_ids_at_all(build: Callable[[], nn.Module]) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.e(x, torch.zeros(2, dtype=torch.long)) if isinstance(model.e, nn.EmbeddingBag) else model.e(x)

    rig = Rig(Apply(forward, e=build()))
    for _ in range(2):
        rig.step((ids(0),))
    assert rig.asked == 0


def test_an_id_beyond_a_prefilled_table() -> None:
    rig = Rig(Apply(lambda m, x: m.e(x), e=table()))
    rig.step((ids(5),))
    for beyond in (ROWS, -1):
        inputs = torch.tensor([1, beyond])
        rig.lookups.begin(rig.lookups.ahead(inputs))
        with pytest.raises(IndexError, match=f"id {beyond} is outside embedding 'e', which has {ROWS} rows"):
            rig.by_rows(inputs)


def test_a_declared_table_takes_any_id() -> None:
    torch.manual_seed(0)
    rig = Rig(Apply(lambda m, x: m.e(x), e=table(padding_idx=7)), declared=True)
    asked: list[list[int]] = []

    def read(wanted: list[Any]) -> None:
        asked.extend(ids_U.tolist() for _, ids_U, _ in wanted)
        for _, _, out_UD in wanted:
            out_UD.fill_(1.0)

    lookups = Lookups(rig.whole, rig.tables, read)
    inputs = torch.tensor([-5, 2**62, 7, -5])
    lookups.begin(lookups.ahead(inputs))
    output = rig.whole(inputs)
    assert output[:, 0].tolist() == [1.0, 1.0, 0.0, 1.0]
    output.sum().backward()
    (found,) = lookups.end()
    assert asked == [[-5, 2**62]]
    assert found.ids_U.tolist() == [-5, 2**62]
    assert found.grads_UD[:, 0].tolist() == [2.0, 1.0]


def test_ids_of_a_wrong_type() -> None:
    rig = Rig(Apply(lambda m, x: m.e(x), e=table()))
    rig.lookups.begin(rig.lookups.ahead(torch.rand(3)))
    with pytest.raises(UsageError, match=r"ids of embedding 'e' are torch\.float32"):
        rig.by_rows(torch.rand(3))


def test_the_modules_stay_what_they_are_but_for_the_weight() -> None:
    class Mine(nn.Embedding):
        """A subclass that adds nothing to forward."""

    rig = Rig(Apply(lambda m, x: m.e(x), e=Mine(ROWS, DIM)))
    embedding = rig.by_rows.e
    assert isinstance(embedding, Mine)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (ROWS, DIM)
    assert not list(rig.by_rows.parameters())
    with pytest.raises(PlanError, match="the weight of embedding 'e' is a table on the parameter servers"):
        _ = embedding.weight


def test_evaluation_leaves_no_gradients() -> None:
    rig = Rig(Apply(lambda m, x: m.e(x), e=table()))
    inputs = ids(5)
    rig.lookups.begin(rig.lookups.ahead(inputs), learning=False)
    with torch.no_grad():
        assert torch.equal(rig.by_rows(inputs), rig.whole(inputs))
    assert rig.lookups.end() == []


def test_ids_are_traced_to_columns() -> None:
    tensors = whole_numbers({"b": torch.rand(5, 2), "a": torch.arange(15).view(5, 3), "c": torch.arange(5).int()})
    assert [tensor.shape for tensor in tensors] == [(5, 3), (5, 1)]
    assert trace(np.arange(5), tensors)[:3] == (1, 0, 1)
    assert trace(np.array([1, 2, 4, 5, 7, 8, 10, 11, 13, 14]), tensors)[:3] == (0, 1, 3)
    shifted = trace(np.arange(5) + 100, tensors)
    assert shifted is not None
    assert shifted.ids(tensors).tolist() == [100, 101, 102, 103, 104]
    assert trace(np.array([3, 1, 4, 1, 5]), tensors) is None
