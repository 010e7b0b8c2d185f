from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tricorn.plan import Plan
from tricorn.strategy import find

from .cluster import make_job

BSP = Plan(strategy="ps", workers=2, servers=1)
ONE = Plan(strategy="ps", workers=1, servers=1)
ASP = Plan(strategy="ps", workers=1, servers=1, consistency="asp")


def frozen() -> torch.nn.Module:
    return torch.nn.Linear(2, 2).requires_grad_(False)


def normed() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    ("model", "plan", "words"),
    [
        (frozen, BSP, ["no trainable parameter", "requires_grad"]),
        (normed, BSP, ["'1'", "GroupNorm", "one worker"]),
        (normed, ASP, ["'1'", "GroupNorm", "bsp"]),
        (normed, ONE, None),
        (lambda: torch.nn.Linear(6, 3), BSP, None),
    ],
)
def test_a_job_that_cannot_run_is_told_why(model, plan: Plan, words: list[str] | None) -> None:
    why = find(plan).why_not(make_job(model=model), plan)
    assert (why is None) == (words is None)
    assert all(word in why for word in words or [])


def test_importing_the_strategy_costs_nothing() -> None:
    code = "import sys, tricorn.ps; assert not {'torch', 'numpy', 'psutil'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_roles_start_without_dynamo() -> None:
    code = "import sys, tricorn.ps.trainer, tricorn.ps.server; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
