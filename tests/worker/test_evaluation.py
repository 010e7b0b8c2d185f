"""Evaluation: shares of any cut add up to what one worker finds alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tricorn
from tricorn.errors import JobFailed, in_words
from tricorn.worker.batches import Batches
from tricorn.worker.evaluation import Judge, evaluate
from tricorn.worker.loop import Regrouping

X = torch.randn(23, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
WEIGHT = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PADDING = 0  # a target that does not count


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).double().mean()


def make_job(**changes: Any) -> tricorn.Job:
    data = tricorn.data.arrays(X, Y)
    given: dict[str, Any] = {
        "model": lambda: torch.nn.Linear(4, 2), "loss": torch.nn.functional.cross_entropy,
        "optimizer": tricorn.optim.SGD(lr=0.1), "train": data, "evaluate": data, "batch_size": 5, "epochs": 1,
        "metrics": {"accuracy": accuracy}, "precision": "float64", "device": "cpu",
    }  # fmt: skip
    return tricorn.Job(**(given | changes))


class Share:
    """A worker's half of evaluating: its share of each batch, in the manner of a strategy."""

    def __init__(self, job: tricorn.Job, rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        self.seen: list[tuple[int, int]] = []

    def share(self, samples: int) -> tuple[int, int]:
        return samples * self.rank // self.workers, samples * (self.rank + 1) // self.workers

    def evaluate(self, batch: tricorn.strategy.Batch, samples: int, judge: Any) -> None:
        self.seen.append((batch.samples, samples))
        if batch.samples:
            judge(batch.inputs @ WEIGHT, batch)


def judged(job: tricorn.Job, workers: int = 1, start: int = 0, stop: int = 23) -> list[Judge]:
    shares = [Share(job, rank, workers) for rank in range(workers)]
    return [evaluate(job, share, Batches(job), start, stop, lambda: None) for share in shares]


def means(judges: list[Judge]) -> dict[str, float]:
    names = set().union(*(judge.sums for judge in judges))
    sums = {name: [judge.sums[name] for judge in judges if name in judge.sums] for name in names}
    return {name: sum(s for s, _ in pairs) / sum(w for _, w in pairs) for name, pairs in sums.items()}


def test_alone():
    (judge,) = judged(make_job())
    assert judge.samples == 23
    assert means([judge]) == {
        "loss": pytest.approx(torch.nn.functional.cross_entropy(X @ WEIGHT, Y).item(), abs=1e-12),
        "accuracy": pytest.approx(accuracy(X @ WEIGHT, Y).item(), abs=1e-12),
    }


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 30), st.data())
def test_any_cut_adds_up_to_the_same(workers, batch_size, data):
    job = make_job(batch_size=batch_size)
    cut = data.draw(st.integers(0, 23))
    judges = judged(job, workers, 0, cut) + judged(job, workers, cut, 23)
    assert sum(judge.samples for judge in judges) == 23
    assert means(judges) == pytest.approx(means(judged(job)), abs=1e-12)


def counted(inputs: torch.Tensor, target: torch.Tensor) -> int:
    return int((target != PADDING).sum())


def masked(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output, target, ignore_index=PADDING)


def test_the_loss_is_a_mean_over_what_counts_and_metrics_over_samples():
    judges = judged(make_job(loss=masked, count=counted, batch_size=2), workers=2)
    assert sum(judge.sums["loss"][1] for judge in judges if "loss" in judge.sums) == counted(X, Y)
    assert sum(judge.sums["accuracy"][1] for judge in judges) == 23
    assert means(judges)["loss"] == pytest.approx(masked(X @ WEIGHT, Y).item(), abs=1e-12)


def test_a_share_where_nothing_counts_adds_no_loss():
    nothing = tricorn.data.arrays(X, torch.full((23,), PADDING))
    (judge,) = judged(make_job(loss=masked, count=counted, evaluate=nothing))
    assert judge.sums.keys() == {"accuracy"}  # and not a loss that is nan
    assert judge.samples == 23


def test_every_worker_takes_part_in_every_batch():
    """Even with an empty share: others may wait for it."""
    job = make_job(batch_size=5)
    last = Share(job, 0, 6)
    judge = evaluate(job, last, Batches(job), 0, 23, lambda: None)
    assert last.seen == [(0, 5)] * 4 + [(0, 3)]
    assert (judge.samples, judge.sums) == (0, {})


def test_it_stops_when_the_membership_epoch_is_over():
    job = make_job()
    share = Share(job, 0, 1)

    def go_on() -> None:
        if len(share.seen) == 2:
            raise Regrouping

    with pytest.raises(Regrouping):
        evaluate(job, share, Batches(job), 0, 23, go_on)
    assert len(share.seen) == 2


def test_evaluation_takes_the_data_in_its_own_order():
    job = make_job()
    assert torch.equal(Batches(job).evaluation(3, 9).inputs, X[3:9])
    assert Batches(job).evaluation_samples == 23
    assert Batches(make_job(evaluate=None, metrics={})).evaluation_samples == 0


def test_a_metric_that_fails_is_told_with_its_shapes():
    job = make_job(metrics={"error": lambda output, target: output - target})
    with pytest.raises(RuntimeError) as raised:
        judged(job)
    assert in_words(raised.value).endswith(
        "in the job's metrics['error'], given output float64 (5, 2), target int64 (5,), inputs float64 (5, 4)"
    )


def test_a_metric_that_is_no_number_is_named():
    job = make_job(metrics={"hits": lambda output, target: output.argmax(1) == target})
    with pytest.raises(JobFailed, match=r"metrics\['hits'\] gives a Tensor of shape \(5,\) instead of one number"):
        judged(job)
