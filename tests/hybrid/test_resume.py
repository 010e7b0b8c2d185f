"""A run goes on under any other hybrid, with the state it had, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .crew import Crew, distance, plain, read
from .jobs import DECLARED, towers

Build = Callable[..., Crew]
PLANS: dict[str, dict[str, Any]] = {
    "ps": {"strategy": "ps", "workers": 2, "servers": 2},
    "ps+dp": {"strategy": "ps+dp", "workers": 2, "servers": 1},
    "dp": {"strategy": "dp", "workers": 2},
    "rows": {"strategy": "dp", "workers": 3, "embeddings": "rows"},
    "columns": {"strategy": "dp", "workers": 2, "embeddings": "columns"},
    "tables": {"strategy": "dp", "workers": 2, "embeddings": "tables"},
    "ps+mp": {"strategy": "ps+mp", "workers": 2, "servers": 2, "cuts": (1,)},
    "mp rows": {"strategy": "mp", "workers": 2, "replicas": 2, "cuts": (), "embeddings": "rows"},
}
ORDERS = {  # of steps, each under another plan
    "declared": ["ps", "ps+dp", "dp", "rows", "columns", "ps+mp", "tables", "mp rows", "ps+dp"],
    "large": ["rows", "ps", "columns", "ps+mp", "dp"],
}


@pytest.mark.parametrize("tables", ORDERS)
def test_it_goes_on_under_another_plan(crew: Build, tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricorn.table.LARGE", 1)
    job = towers(clip_norm=0.5, tables=DECLARED if tables == "declared" else None)
    team, step, folder = None, 0, None
    for name in ORDERS[tables]:
        before = None if folder is None else read(job, folder, step)
        team = crew(job, **PLANS[name])
        team.join("initial" if folder is None else "checkpoint", step, checkpoint=folder)
        if before is not None:
            assert torch.equal(team.weights(step), before), name
        team.train(step, step + 1)
        step += 1
        folder = team.save(step)
    assert team is not None
    expected = plain(job, step, lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.1)])
    assert distance(team.weights(step), expected) <= 1e-10
