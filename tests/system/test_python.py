"""From Python or a notebook: a job made of local functions goes in, a trained model and its history come out."""

import os

import pytest
import torch
from torch import nn

import tricorn


def make_job(**changes) -> tricorn.Job:
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    fields = {
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        "loss": lambda output, target: nn.functional.cross_entropy(output, target),
        "optimizer": tricorn.optim.Adam(lr=0.05), "train": tricorn.data.arrays(x, y), "batch_size": 16, "epochs": 12,
        "evaluate": tricorn.data.arrays(x, y),
        "metrics": {"accuracy": lambda output, target: (output.argmax(1) == target).float().mean()},
    }  # fmt: skip
    return tricorn.Job(**(fields | changes))


def test_train_returns_the_model_and_its_history_and_goes_on(tmp_path):
    job = make_job()
    result = tricorn.train(job, strategy="ps", workers=2, threads=1, runs=tmp_path)
    inputs, target = job.train.inputs, job.train.target
    with torch.no_grad():
        accuracy = (result.model(inputs).argmax(1) == target).float().mean().item()
    assert accuracy == pytest.approx(result.summary["metrics"]["accuracy"])
    assert accuracy > 0.9
    assert [row["step"] for row in result.history if "loss" in row] == list(range(72))
    assert len([row for row in result.history if "evaluation" in row]) == 12
    more = tricorn.train(make_job(epochs=14), strategy="dp", threads=1, runs=tmp_path, resume=result.folder)
    assert more.summary["steps"] == 84
    assert tricorn.train(make_job(epochs=14), runs=tmp_path, resume=result.folder).summary == more.summary
    said = (result.folder / "job.json").read_bytes()
    other = make_job(epochs=15, model=lambda: nn.Linear(4, 2))
    with pytest.raises(tricorn.errors.UsageError):
        tricorn.train(other, threads=1, runs=tmp_path, resume=result.folder)
    assert (result.folder / "job.json").read_bytes() == said


def test_options_of_a_plan_are_checked(tmp_path):
    with pytest.raises(tricorn.errors.PlanError) as caught:
        tricorn.train(make_job(), workres=3, checkpoint_evry=5, epochs=2, strategy="dpp", zero=4, threads="2")
    assert str(caught.value).splitlines()[1:] == [
        "  - no such option: workres; did you mean workers?",
        "  - no such option: checkpoint_evry; did you mean checkpoint_every?",
        "  - no such option: epochs; it belongs to the job: tricorn.Job(epochs=...)",
        "  - strategy: 'dpp' is not one of ps, dp, mp, ps+dp, ps+mp; did you mean dp?",
        "  - zero: 4 is not one of 0, 1, 2, 3",
        "  - threads: '2' is not a whole number or None",
    ]
    with pytest.raises(tricorn.errors.PlanError, match="did you mean workers"):
        tricorn.plan(make_job(), worker=2)
    for verb in (tricorn.plan, tricorn.train):
        with pytest.raises(tricorn.errors.PlanError, match="workers is 0"):
            verb(make_job(), strategy="auto", workers=0)
    with pytest.raises(tricorn.errors.PlanError, match=r"workers: 2\.5 is not a whole number"):
        tricorn.train(make_job(), plan=tricorn.Plan(strategy="dp", workers=2.5))
    for wrong in ({"job": "digits.py"}, {"job": make_job(), "plan": "dp"}):
        with pytest.raises(tricorn.errors.UsageError, match=r"the (job|plan) is '"):
            tricorn.train(**wrong)
    with pytest.raises(tricorn.errors.UsageError, match="workers beside it"):
        tricorn.train(make_job(), plan=tricorn.Plan(strategy="dp"), workers=3, runs=tmp_path)


def test_an_error_of_the_job_is_raised(tmp_path):
    def loss(output, target):
        raise ZeroDivisionError("mine")

    with pytest.raises(tricorn.errors.UserCodeError, match="ZeroDivisionError: mine") as caught:
        tricorn.train(make_job(loss=loss), strategy="dp", threads=1, runs=tmp_path / "my RUN's")
    assert "test_python.py" in caught.value.where
    folder = os.path.relpath((tmp_path / "my RUN's" / "latest").resolve())
    assert f"`tricorn.train(job, resume={folder!r})` goes on" in caught.value.remedy


def test_a_plan_that_cannot_be(tmp_path):
    with pytest.raises(tricorn.errors.PlanError, match="workers is 0"):
        tricorn.train(make_job(), workers=0, runs=tmp_path)
