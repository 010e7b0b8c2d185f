"""The verbs: a plan is made, written, trained with, and held against what the run was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tricorn
from tricorn import planner
from tricorn.errors import PlanError
from tricorn.planner import auto, options, store
from tricorn.planner.cluster import Cluster
from tricorn.planner.options import refuse_mistakes

from .world import links

TRICORN = Path(sys.executable).with_name("tricorn")
JOB = """
import torch, tricorn
x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
job = tricorn.Job(
    model=lambda: torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)),
    loss=torch.nn.functional.mse_loss, optimizer=tricorn.optim.SGD(lr=0.01),
    train=tricorn.data.arrays(x, x.sum(1, keepdim=True)), batch_size=16, epochs=3)
broken = tricorn.Job(
    model=lambda: torch.nn.Linear(3, 1), loss=torch.nn.functional.mse_loss, optimizer=tricorn.optim.SGD(lr=0.01),
    train=tricorn.data.arrays(x, x.sum(1, keepdim=True)), batch_size=16, epochs=3)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, on a machine that was measured before."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "job.py").write_text(JOB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRICORN_CACHE", str(folder / "cache"))
        store.save_links(links())
    return folder


def leave_alone(cache: Path) -> None:
    """As if nothing else had run on this machine while it was measured."""
    for kept in (path for path in cache.rglob("*") if path.is_file()):
        kept.write_text(re.sub(r'"busy":\s*[0-9.e-]+', '"busy":0.0', kept.read_text()))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRICORN_CACHE": str(folder / "cache")}
    return subprocess.run(
        [TRICORN, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def test_a_plan_is_made_once_and_held_to(place: Path) -> None:
    cold = run(place, "plan", "job.py", "--json", "-o", "plan.json")
    assert cold.returncode == 0, cold.stderr
    found = json.loads(cold.stdout)
    assert "measuring the job" in cold.stderr
    assert json.loads((place / "plan.json").read_text()) == found["chosen"]
    assert {plan["plan"]["strategy"] for plan in found["plans"]} >= {"dp", "ps"}
    assert all(abs(sum(plan["terms"].values()) - plan["seconds"]) < 1e-9 for plan in found["plans"])

    leave_alone(place / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPROFILEIMPORTTIME", "1")
        warm = run(place, "plan", "job.py", "--strategy", "auto")
    imports = [line for line in warm.stderr.splitlines() if line.startswith("import time:")]
    assert imports == warm.stderr.splitlines()  # nothing is measured
    assert not [line for line in imports if line.endswith(" torch")]
    again = json.loads(run(place, "plan", "job.py", "--json").stdout)
    assert again["reasons"][0] in warm.stdout

    done = run(place, "train", "job.py", "--plan", "plan.json", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["plan"] == found["chosen"]
    assert set(summary["measured"]) - {"waiting"} == {"step", "data", "compute", "exchange"}
    (chosen,) = [plan for plan in again["plans"] if plan["plan"] == found["chosen"]]
    assert summary["predicted"]["step"] == pytest.approx(chosen["seconds"])
    assert summary["worst_term"] in ("compute", "data", "exchange", "waiting")
    assert "the largest difference" in done.stderr


def test_what_a_trial_takes_is_what_is_predicted_from_then_on(place: Path) -> None:
    only = ("plan", "job.py", "--strategy", "dp", "--workers", "1", "--json")
    tried = run(place, *only, "--try")
    assert "trying dp, 1 worker" in tried.stderr
    found = json.loads(tried.stdout)
    assert "Tried for some steps where they would run: dp, 1 worker." in found["reasons"]
    (plan,) = found["plans"]
    (again,) = json.loads(run(place, *only).stdout)["plans"]
    assert again["seconds"] == pytest.approx(plan["seconds"])
    refused = run(place, *only, "--try", "--cluster", "nowhere.toml")
    assert refused.returncode == 2
    assert "cannot be tried" in refused.stderr


def test_a_run_is_simulated_on_machines_that_are_not_here(place: Path) -> None:
    (place / "many.toml").write_text(
        '[[host]]\ncount = 300\ncores = 2\nmemory = "4 GB"\nmbit = 1000\nstalls = 0.01\nfailures_per_day = 50\n'
    )
    (place / "asp.json").write_text('{"strategy": "ps", "workers": 299, "servers": 1, "consistency": "asp"}')
    words = ("simulate", "job.py", "--cluster", "many.toml", "--plan", "asp.json", "--steps", "20", "--json")
    assert run(place, *words).returncode == 0
    leave_alone(place / "cache")
    found = json.loads(run(place, *words).stdout)
    assert found == json.loads(run(place, *words).stdout)
    assert (found["plan"]["workers"], found["steps"]) == (299, 20)
    assert sum(found["staleness"].values()) == 299 * 20
    assert set(found["waiting"]) == {"worker", "server"}
    assert all(0 <= share <= 1 for share in found["waiting"].values())
    shown = run(place, *words[:-1], "--seed", "1")
    assert shown.returncode == 0, shown.stderr
    assert "the equation says" in shown.stdout
    assert "updates old" in shown.stdout
    served = run(place, "simulate", "job.py", "--strategy", "ps", "--steps", "5", "--json")
    assert json.loads(served.stdout)["plan"]["strategy"] == "ps"


def test_a_job_whose_code_fails_is_trained_all_the_same_to_show_its_error(place: Path) -> None:
    failed = run(place, "train", "job.py:broken")
    assert failed.returncode == 1, failed.stderr
    assert "nothing can be predicted" in failed.stderr
    said, given = failed.stderr.splitlines()[-3:-1]
    assert "mat1 and mat2 shapes cannot be multiplied" in said
    assert given.startswith("in the job's model, given inputs float")
    assert "Traceback" not in failed.stderr


def test_mistakes_are_told_without_a_traceback(place: Path) -> None:
    (place / "cluster.toml").write_text("[[host]]\ncores = 0")
    (place / "not.json").write_text("{}")
    (place / "dp.json").write_text('{"strategy": "dp"}')
    for arguments, said in (
        (["plan", "job.py", "--cluster", "cluster.toml"], "cores is 0"),
        (["plan", "nowhere.py"], "there is no file nowhere.py"),
        (["train", "job.py", "--plan", "not.json"], "is no plan"),
        (["simulate", "job.py", "--plan", "dp.json", "--strategy", "ps"], "strategy beside it"),
    ):
        failed = run(place, *arguments)
        assert failed.returncode == 2, failed.stderr
        assert said in failed.stderr
        assert "Traceback" not in failed.stderr


def test_options_that_no_strategy_has_together_are_the_runs_to_refuse() -> None:
    plan, prediction = auto.choose(("nowhere.py", "job"), {"zero": 1, "consistency": "asp"}, print)
    assert plan.mistakes()
    assert prediction is None
    with pytest.raises(PlanError, match="workers"):
        options.settled("dp", {"workers": "many"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 0}, "workers is 0; give at least 1"),
        ({"strategy": "auto", "workers": 0}, "workers is 0; give at least 1"),
        ({"strategy": "xyz"}, "xyz"),
        ({"zero": 1, "consistency": "asp"}, "consistency is asp"),
        ({"strategy": "mp", "workers": 3, "tensor": 2}, "does not divide"),
        ({"workers": "many"}, "workers"),
    ],
)
def test_options_that_no_plan_has_are_refused_before_anything_is_measured(given: dict, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        planner.plan(("nowhere.py", "job"), given)


def test_a_mesh_has_as_many_workers_as_its_axes_need() -> None:
    assert options.settled("mp", {"tensor": 4}).workers == 4
    assert options.settled("mp", {"tensor": 2, "workers": 6}).workers == 6
    refuse_mistakes({"tensor": 4})


def test_it_can_be_called_from_python() -> None:
    assert callable(tricorn.plan)
    assert tricorn.Plan(strategy="dp").workers == 2
    assert Cluster.__module__ == "tricorn.planner.cluster"
