"""Jobs with embeddings: their tables are trained by rows, and come to the same as one process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tricorn import Table, optim
from tricorn.cli.train import encodings
from tricorn.engine.roles import _failed
from tricorn.errors import PlanError, UsageError
from tricorn.plan import Plan
from tricorn.ps import caution, strategy
from tricorn.state.flat import FlatState, build_model
from tricorn.state.rows import needs_server, row_tables
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch

from .cluster import Cluster, step_of
from .tables import DECLARED, IDS, STEPS, Scorer, assert_same, batches, make_job, one_process, samples, train, whole

Build = Callable[..., Cluster]
OPTIMIZERS = {"sgd": optim.SGD(lr=0.2), "adagrad": optim.Adagrad(lr=0.1, lr_decay=0.01)}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every embedding is large enough to be a table."""
    monkeypatch.setattr("tricorn.table.LARGE", 1)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("tables", [None, DECLARED], ids=["prefilled", "declared"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bsp_equals_one_process(
    cluster: Build, name: str, tables: dict[str, Table] | None, workers: int, servers: int
) -> None:
    job = make_job(
        optimizer=OPTIMIZERS[name], tables=tables, clip_norm=0.4, schedule=lambda step: 1.0 / (1.0 + 0.1 * step)
    )
    assert len(row_tables(job, Scorer())) == 2
    run = cluster(job, workers=workers, servers=servers)
    run.join("initial")
    train(run, 0, STEPS)
    assert_same(whole(run, STEPS), one_process(job, STEPS).module, 1e-10)


def test_adam_is_lazy_as_torchs_sparse_adam(cluster: Build) -> None:
    job = make_job(
        model=lambda: nn.Sequential(nn.Embedding(IDS, 4), nn.Flatten(), Sum()), tables={"0": Table(std=0.4)},
        optimizer=optim.Adam(lr=0.05),
    )  # fmt: skip
    run = cluster(job, workers=2, servers=2)
    run.join("initial")
    train(run, 0, STEPS)

    model = build_model(job)
    model[0].sparse = True
    stepper = torch.optim.SparseAdam(model.parameters(), lr=0.05)
    for inputs, target in batches(job)[:STEPS]:
        stepper.zero_grad()
        job.loss(model(inputs), target).backward()
        stepper.step()
    assert_same(whole(run, STEPS), model, 1e-10)


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x).sum(1)


MODES: dict[str, dict[str, Any]] = {
    "ssp": {"consistency": "ssp", "staleness": 1},
    "asp": {"consistency": "asp"},
    "hybrid asp": {"sparse_consistency": "asp"},
    "hybrid ssp": {"sparse_consistency": "ssp", "staleness": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_single_worker_is_never_stale_or_hardly(cluster: Build, mode: str) -> None:
    """One worker in SSP and ASP is plain training; in a hybrid its rows are one step old."""
    job = make_job(optimizer=optim.SGD(lr=0.05))
    run = cluster(job, workers=1, servers=2, **MODES[mode])
    run.join("initial")
    train(run, 0, STEPS)
    found, expected = whole(run, STEPS), one_process(job, STEPS).module
    assert_same(found, expected, 1e-10 if "hybrid" not in mode else 0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_mode_learns(cluster: Build, mode: str, clip: float | None) -> None:
    job = make_job(optimizer=optim.Adagrad(lr=0.1), epochs=20, clip_norm=clip)
    run = cluster(job, workers=1 if "hybrid" in mode else 2, servers=2, **MODES[mode])
    run.join("initial")
    model, (inputs, target) = build_model(job), samples()
    before = job.loss(model(inputs), target)
    total = len(batches(job))
    if run.plan.synchronous:
        train(run, 0, total)
    else:
        asynchronously(run, total)
    model.load_state_dict(whole(run, total))
    assert job.loss(model(inputs), target) < 0.6 * before


def asynchronously(run: Cluster, total: int) -> None:
    todo, workers = batches(run.job), len(run.trainers)

    def work(trainer: Any, rank: int) -> None:
        mine = range(rank, total, workers)
        for step in mine:
            if step + workers < total:
                inputs, target = todo[step + workers]
                trainer.foresee(step + workers, Batch(inputs, target, len(target), len(target)))
            step_of(trainer, step, *todo[step])
        trainer.idle()

    run.each(work, range(workers))
    run.regroup()  # says what is not said yet
    for applied in run.applied:
        assert sorted(applied) == list(range(total))


@pytest.mark.parametrize("stale", ["scale", "compensate", "drop"])
def test_stale_gradients_of_rows_are_acted_upon(cluster: Build, stale: str) -> None:
    job = make_job(optimizer=optim.SGD(lr=0.1), epochs=12)
    run = cluster(job, workers=2, consistency="asp", staleness=0, stale=stale)
    run.join("initial")
    total = len(batches(job))
    asynchronously(run, total)
    model, (inputs, target) = build_model(job), samples()
    before = job.loss(model(inputs), target)
    model.load_state_dict(whole(run, total))
    assert job.loss(model(inputs), target) < before


@pytest.mark.parametrize("compress", ["bf16", "int8"])
def test_compressed_gradients_come_close(cluster: Build, compress: str) -> None:
    job = make_job(optimizer=optim.SGD(lr=0.1))
    run = cluster(job, workers=2, servers=2, compress=compress)
    run.join("initial")
    train(run, 0, STEPS)
    assert_same(whole(run, STEPS), one_process(job, STEPS).module, 0.02)


def test_top_k_makes_up_for_what_it_leaves(cluster: Build) -> None:
    job = make_job(optimizer=optim.SGD(lr=0.05), tables={}, epochs=40)
    run = cluster(job, workers=2, compress="topk")
    run.join("initial")
    total = len(batches(job))
    train(run, 0, total)
    model, (inputs, target) = build_model(job), samples()
    before = job.loss(model(inputs), target)
    model.load_state_dict(whole(run, total))
    assert job.loss(model(inputs), target) < 0.9 * before


def test_ids_of_a_wrong_type_end_a_run(cluster: Build) -> None:
    ids, target = samples()
    run = cluster(make_job(train=torch.utils.data.TensorDataset(ids.double(), target)), workers=1)
    run.join("initial")
    with pytest.raises(UsageError, match=r"ids of embedding 'pairs' are torch\.float64") as error:
        train(run, 0, 1)
    assert "int64" in error.value.remedy
    sent: list[Any] = []
    assert _failed(SimpleNamespace(send=sent.append, close=lambda: None), error.value) == UsageError.exit_code
    assert sent[0].where.endswith("in forward: pairs = self.pairs(ids[:, :2])")


def test_evaluation_reads_rows_and_makes_none(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=1)
    run.join("initial")
    seen: list[torch.Tensor] = []
    inputs, target = samples()
    run.trainers[0].evaluate(Batch(inputs, target, 40, 40), 40, lambda output, batch: seen.append(output))
    assert torch.allclose(seen[0], build_model(job)(inputs), rtol=1e-12)
    assert [table.rows for table in run.servers[0]._service._mode.table.sparse] == [0, 0]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("tables", [None, DECLARED], ids=["prefilled", "declared"])
def test_a_checkpoint_goes_on_anywhere(cluster: Build, tables: dict[str, Table] | None) -> None:
    job = make_job(optimizer=optim.Adagrad(lr=0.1), tables=tables)
    first = cluster(job, workers=2, servers=2)
    first.join("initial")
    train(first, 0, 5)
    first.each(lambda trainer: trainer.pieces())
    second = cluster(job, workers=1, servers=3)
    second.join("checkpoint", 5)
    train(second, 5, STEPS)
    expected = one_process(job, STEPS)
    assert_same(whole(second, STEPS), expected.module, 1e-10)
    # Data parallel takes the rows as whole weights and slots.
    state = FlatState(build_model(job), job.optimizer, torch.device("cpu"))
    state.load(open_checkpoint(job, first.folder / "5", 5))
    half = one_process(job, 5)
    for name, flat_N in state.tensors().items():
        assert torch.allclose(flat_N, half.tensors()[name], rtol=1e-9, atol=1e-12), name


def test_a_checkpoint_of_data_parallel_goes_on_by_rows(cluster: Build) -> None:
    from tricorn.state.shards import write_shard

    job = make_job(optimizer=optim.Adagrad(lr=0.1))
    run = cluster(job, workers=2, servers=2)
    write_shard(run.folder / "5", "model.safetensors", one_process(job, 5).pieces())
    run.join("checkpoint", 5)
    train(run, 5, STEPS)
    assert_same(whole(run, STEPS), one_process(job, STEPS).module, 1e-10)


def test_rows_that_no_embedding_has_need_a_server(cluster: Build) -> None:
    ids, target = samples()
    job = make_job(train=torch.utils.data.TensorDataset(ids - 2**40, target))
    run = cluster(job, workers=1)
    run.join("initial")
    train(run, 0, 1)
    with pytest.raises(UsageError, match="and the embedding only 30 rows"):
        whole(run, 1)


def test_meta_tables_take_no_memory_until_they_are_whole() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(1000, 4, device="meta", padding_idx=9), nn.Flatten(), Sum())

    job = make_job(model=model, tables={"0": Table()})
    built = build_model(job)
    assert not built[0].weight.is_meta
    assert built[0].weight[9].tolist() == [0.0] * 4
    assert 0.9 < built[0].weight.std() < 1.1
    assert torch.equal(built[0].weight, build_model(job)[0].weight)
    with pytest.raises(PlanError, match="'0' is on the meta device and has no weights"):
        build_model(make_job(model=model, tables=None))


REFUSED = {
    "max_norm": lambda: nn.Embedding(9, 2, max_norm=1.0),
    "scale_grad_by_freq": lambda: nn.Embedding(9, 2, scale_grad_by_freq=True),
    "frozen": lambda: nn.Embedding.from_pretrained(torch.ones(9, 2)),
    "forward of its own": lambda: type("Mine", (nn.Embedding,), {"forward": lambda self, x: x})(9, 2),
    "computed from others": lambda: nn.utils.parametrizations.weight_norm(nn.Embedding(9, 2)),
}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_a_table_is_refused_by_name_and_else_left_whole(reason: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(REFUSED[reason](), nn.Flatten(), nn.Linear(4, 1))

    assert row_tables(make_job(model=model, tables=None), model()) == ()
    with pytest.raises(PlanError, match=f"embedding '0' cannot be a table: .*{reason}"):
        row_tables(make_job(model=model, tables={"0": Table()}), model())


@pytest.mark.usefixtures("large")
def test_tied_weights_are_no_table() -> None:
    def model() -> nn.Module:
        embedding, head = nn.Embedding(9, 2), nn.Linear(2, 9, bias=False)
        head.weight = embedding.weight
        return nn.Sequential(embedding, head)

    assert row_tables(make_job(model=model, tables=None), model()) == ()
    with pytest.raises(PlanError, match="another part of the model has the same weight"):
        row_tables(make_job(model=model, tables={"0": Table()}), model())


def test_only_large_embeddings_whose_rows_stand_alone_become_tables_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(optimizer: Any, **changes: Any) -> list[str]:
        return [table.name for table in row_tables(make_job(optimizer=optimizer, **changes), Scorer())]

    assert names(optim.SGD(lr=1.0), tables=None) == []
    monkeypatch.setattr("tricorn.table.LARGE", IDS * 3)
    assert names(optim.SGD(lr=1.0), tables=None) == ["pairs", "bags"]
    assert names(optim.SGD(lr=1.0), tables={}) == []
    assert names(optim.Adagrad(lr=1.0), tables=None) == ["pairs", "bags"]
    for other in (optim.SGD(lr=1.0, momentum=0.9), optim.SGD(lr=1.0, weight_decay=0.1), optim.Adam(lr=1.0)):
        assert names(other, tables=None) == []


def test_a_name_that_is_no_embedding() -> None:
    with pytest.raises(UsageError, match=r"job\.tables names 'head', which is no nn\.Embedding") as caught:
        row_tables(make_job(tables={"head": Table()}), Scorer())
    assert caught.value.remedy == "The model's embeddings are: 'pairs', 'bags'."


@pytest.mark.parametrize(
    ("table", "optimizer", "reason"),
    [
        (Table(admit=3), optim.SGD(lr=1.0), "has rows that come and go"),
        (Table(optimizer=optim.Adagrad(lr=1.0)), optim.SGD(lr=1.0), "has an optimizer of its own"),
        (Table(), optim.Adam(lr=1.0), "is updated by Adam in the steps that have a row's id"),
    ],
)
def test_what_only_servers_can_train(table: Table, optimizer: Any, reason: str) -> None:
    found = needs_server(make_job(tables={"pairs": table}, optimizer=optimizer), Scorer())
    assert found is not None
    assert found.startswith(f"table 'pairs' {reason}")
    assert found.count("--strategy ps") == 1
    assert needs_server(make_job(), Scorer()) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"consistency": "asp", "sparse_consistency": "bsp"}, "sparse_consistency bsp needs agreed steps"),
        ({"compress": "powersgd"}, "powersgd needs all workers"),
        ({"compress": "topk"}, "topk leaves most of a row's gradient behind"),
        ({"compress_tables": {"nobody": "bf16"}}, "the table 'nobody', which there is not; the tables are: 'pairs', "),
        ({"consistency": "asp", "compress": "int8", "stale": "drop"}, "stale drop throws gradients away"),
    ],
)
def test_plans_that_contradict_themselves(options: dict[str, Any], reason: str) -> None:
    plan = Plan(strategy="ps", servers=1, **options)
    assert reason in (strategy.why_not(make_job(), plan) or "")


def test_rows_need_not_travel_as_the_dense_part_does() -> None:
    options = encodings(["topk", "pairs=bf16", "bags=none"])
    assert strategy.why_not(make_job(), Plan(strategy="ps", servers=1, **options)) is None
    for wrong in ("zip", "pairs=topk"):
        with pytest.raises(UsageError, match="there is no encoding"):
            encodings([wrong])


def test_a_person_is_warned_of_momentum_in_asynchronous_runs() -> None:
    asynchronous = Plan(strategy="ps", servers=1, consistency="asp")
    assert "Adam suffers more" in (caution({"kind": "adam", "lr": 1.0}, asynchronous) or "")
    assert "momentum suffers more" in (caution({"kind": "sgd", "momentum": 0.9}, asynchronous) or "")
    assert caution({"kind": "sgd", "momentum": 0.0}, asynchronous) is None
    assert caution({"kind": "adam"}, Plan(strategy="ps", servers=1)) is None
