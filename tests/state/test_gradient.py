"""The arithmetic that all strategies share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tricorn import optim
from tricorn.errors import JobFailed, in_words
from tricorn.job import Job
from tricorn.state.flat import build_model
from tricorn.state.gradient import forward, forward_backward, placed, squared_norm
from tricorn.state.inspect import batch_statistics
from tricorn.strategy import Batch

CPU = torch.device("cpu")


def make_job(**changes) -> Job:
    fields = {
        "model": lambda: torch.nn.Linear(3, 2),
        "loss": torch.nn.functional.mse_loss,
        "optimizer": optim.SGD(lr=0.1),
        "train": torch.utils.data.TensorDataset(torch.zeros(1, 3), torch.zeros(1, 2)),
        "batch_size": 1,
        "epochs": 1,
    }
    return Job(**fields | changes)


def test_shares_add_up_to_the_gradient_of_the_whole() -> None:
    job = make_job(precision="float64")
    inputs, target = torch.randn(7, 3), torch.randn(7, 2)
    whole, parts = build_model(job), build_model(job)
    total = forward_backward(job, whole, Batch(inputs, target, 7, 7))
    sums = [forward_backward(job, parts, Batch(inputs[a:b], target[a:b], b - a, b - a)) for a, b in ((0, 3), (3, 7))]
    assert sum(sums) == pytest.approx(total, rel=1e-12)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_a_share_that_counts_for_nothing_adds_nothing() -> None:
    job = make_job(loss=lambda output, target: output.sum() / 0.0)
    model = build_model(job)
    assert forward_backward(job, model, Batch(None, None, 0, 0)) == 0.0
    assert forward_backward(job, model, Batch(torch.zeros(1, 3), torch.zeros(1, 2), 1, 0)) == 0.0
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_a_sum_is_refused() -> None:
    inputs, target = torch.randn(7, 3), torch.randn(7, 2)
    job = make_job(loss=lambda output, target: (output - target).square().sum())
    with pytest.raises(JobFailed, match="is a sum over the samples") as raised:
        forward_backward(job, build_model(job), Batch(inputs, target, 7, 7))
    assert "reduction=" in raised.value.remedy


@pytest.mark.filterwarnings("ignore:Using a target size")  # which workers would say in their logs only
@pytest.mark.parametrize(
    "loss", [lambda o, t: nn.functional.mse_loss(o, t), lambda o, t: (o - t).abs().mean()], ids=["mse", "l1"]
)
def test_a_loss_of_all_pairs_of_outputs_and_targets_is_refused(loss) -> None:
    inputs, target = torch.randn(7, 3), torch.randn(7)
    job = make_job(model=lambda: nn.Linear(3, 1), loss=loss)
    with pytest.raises(JobFailed, match=r"every target, .* \(7, 1\) is broadcast against .* \(7,\)") as raised:
        forward_backward(job, build_model(job), Batch(inputs, target, 7, 7))
    assert "squeeze" in raised.value.remedy


@pytest.mark.parametrize("target", [torch.arange(7.0), torch.ones(7), torch.arange(7) // 4], ids=["all", "one", "two"])
def test_a_loss_that_brings_shapes_together_is_accepted(target) -> None:
    """Outputs that are all the same have the same loss with any order of the targets."""
    job = make_job(model=lambda: nn.Linear(3, 1), loss=lambda o, t: (o.squeeze(1) - t).square().mean())
    assert forward_backward(job, build_model(job), Batch(torch.zeros(7, 3), target, 7, 7)) > 0


def test_what_does_not_match_is_told_with_its_shapes() -> None:
    def told(inputs: torch.Tensor, target: torch.Tensor, **changes) -> str:
        job = make_job(**changes)
        with pytest.raises(RuntimeError) as raised:
            forward_backward(job, build_model(job), Batch(inputs, target, len(inputs), len(inputs)))
        return in_words(raised.value).splitlines()[-1]

    said = "in the job's loss, given output float32 (7, 2), target float32 (7, 3), inputs float32 (7, 3)"
    assert told(torch.zeros(7, 3), torch.zeros(7, 3), loss=lambda output, target: (output - target).mean()) == said
    assert told(torch.zeros(7, 5), torch.zeros(7, 2)) == "in the job's model, given inputs float32 (7, 5)"


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    job = make_job(loss=lambda output, target: (output - target).square())
    with pytest.raises(JobFailed, match=r"gives float32 \(7, 2\), not one number, of output float32 \(7, 2\)"):
        forward_backward(job, build_model(job), Batch(torch.zeros(7, 3), torch.zeros(7, 2), 7, 7))


def test_whether_a_loss_is_a_mean_is_found_out_without_drawing_a_number() -> None:
    def noisy(output, target):
        return (output + torch.rand(()) - target).square().mean()

    job = make_job(loss=noisy)
    batch = Batch(torch.randn(7, 3), torch.randn(7, 2), 7, 7)
    found = []
    for _ in range(2):  # it is judged in the first
        found.append((forward_backward(job, build_model(job), batch), torch.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_values_take_the_precision_of_the_weights_and_keep_their_structure() -> None:
    job = make_job(precision="float64")
    value = {"a": torch.zeros(2), "b": (torch.zeros(2, dtype=torch.int64), torch.ones(1, dtype=torch.bool)), "c": 3}
    got = placed(job, value, CPU)
    assert [got["a"].dtype, got["b"][0].dtype, got["b"][1].dtype] == [torch.float64, torch.int64, torch.bool]
    assert got["c"] == 3


def test_bfloat16_computes_in_it_and_keeps_float32_gradients() -> None:
    job = make_job(precision="bfloat16")
    model = build_model(job)
    batch = Batch(torch.randn(4, 3), torch.randn(4, 2), 4, 4)
    assert forward(job, model, batch).dtype == torch.bfloat16
    forward_backward(job, model, batch)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_exceptions_of_the_users_code_come_out_unwrapped() -> None:
    class Mine(Exception):
        pass

    class Broken(torch.nn.Linear):
        def forward(self, inputs):
            raise Mine

    job = make_job(model=lambda: Broken(3, 2))
    with pytest.raises(Mine):
        forward_backward(job, build_model(job), Batch(torch.zeros(1, 3), torch.zeros(1, 2), 1, 1))


def test_layers_that_keep_statistics_of_the_batch_are_found() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4),
        torch.nn.BatchNorm1d(4),
        torch.nn.GroupNorm(2, 4),
        torch.nn.Sequential(torch.nn.InstanceNorm1d(4), torch.nn.InstanceNorm1d(4, track_running_stats=True)),
        torch.nn.LazyBatchNorm1d(),
    )
    assert batch_statistics(model) == ["1", "3.1", "4"]
    assert batch_statistics(torch.nn.BatchNorm2d(3)) == ["BatchNorm2d"]
    assert batch_statistics(torch.nn.LayerNorm(3)) == []


def test_norms_are_summed_in_float64() -> None:
    flat = torch.randn(200_000) + 1.0
    assert squared_norm(flat) == pytest.approx(flat.double().square().sum().item(), rel=1e-12)
    assert squared_norm(torch.empty(0)) == 0.0
