"""The hooks under PyTorch's own DDP, on Gloo and on Tricorn's backend, with two ranks that run once for all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("ddp_rank.py")
RANKS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ddp")
    files = [folder / f"{rank}.safetensors" for rank in range(RANKS)]
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(RANKS), folder / "store", files[rank]],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(RANKS)
    ]
    assert [process.wait(100) for process in processes] == [0] * RANKS
    return [load_file(file) for file in files]


@pytest.mark.parametrize("backend", ["gloo", "tricorn"])
@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "topk", "powersgd"])
def test_ddp_learns_as_well_and_its_replicas_stay_equal(results, name, backend):
    first, *others = results
    hooked, plain = f"{backend}/{name}", f"{backend}/plain"
    assert all(torch.equal(first[f"{hooked}/weights"], other[f"{hooked}/weights"]) for other in others)
    assert not torch.equal(first[f"{hooked}/weights"], first[f"{plain}/weights"])  # it was compressed indeed
    assert first[f"{hooked}/losses"][-5:].mean() < first[f"{plain}/losses"][-5:].mean() + 0.02
