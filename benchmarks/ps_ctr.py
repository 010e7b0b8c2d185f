"""The click-through model on one asynchronous parameter server and two workers: Tricorn, its peers and the bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import ROOT, TRICORN, options

PEERS, JOB = ROOT / "benchmarks" / "peers", ROOT / "benchmarks" / "jobs" / "ctr.py"
THEIRS = ROOT / ".venv-bench" / "bin" / "python"  # made by `make bench-setup`
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def peer(python: Path, name: str, batches: int) -> float:
    command = [python, PEERS / f"{name}.py", str(batches)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | ONE_THREAD
    ).stdout
    return float(json.loads(output.splitlines()[-1])["samples_per_second"])


def tricorn(batches: int) -> tuple[float, float]:
    """Samples a second once it runs, from the times of its steps, and over the whole run with its beginning and end."""
    with tempfile.TemporaryDirectory() as runs:
        command = [
            TRICORN, "train", JOB, "--strategy", "ps", "--consistency", "asp", "--workers", "2", "--servers", "1",
            "--threads", "1", "--runs", runs, "--json",
        ]  # fmt: skip
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | ONE_THREAD | {"CTR_BATCHES": str(2 * batches)},
        ).stdout  # fmt: skip
        summary = json.loads(output.splitlines()[-1])
        lines = map(json.loads, (Path(runs) / "latest" / "metrics.jsonl").read_text().splitlines())
        times = sorted(line["time"] for line in lines if "loss" in line)
    warm, steps = len(times) // 10, len(times)
    steady = (steps - warm - 1) / (times[-1] - times[warm]) * summary["samples"] / steps
    return steady, summary["samples_per_second"]


def main() -> None:
    report, chosen = options("click-through model, one asynchronous server and two workers")
    if not THEIRS.exists():
        sys.exit("the peers are not installed; run `make bench-setup`")
    batches, own = 300 if chosen.quick else 1000, Path(sys.executable)
    systems: dict[str, Callable[[], float]] = {
        "TensorFlow ParameterServerStrategy": lambda: peer(THEIRS, "ctr_tensorflow", batches // 2),
        "torch.distributed.rpc": lambda: peer(own, "ctr_rpc", batches),
        "Ray actor": lambda: peer(THEIRS, "ctr_ray", batches // 2),
        "Hogwild, no server (the bound)": lambda: peer(own, "ctr_hogwild", batches),
    }
    figures: dict[str, list[float]] = {name: [] for name in (*systems, "tricorn train", "tricorn train, whole run")}
    for _ in range(2 if chosen.quick else 5):
        for name, measure in systems.items():
            figures[name].append(measure())
        steady, whole = tricorn(2 * batches)
        figures["tricorn train"].append(steady)
        figures["tricorn train, whole run"].append(whole)
    medians = {name: report.row(name, "throughput", found, "samples/s") for name, found in figures.items()}
    ours, bound = medians["tricorn train"], medians["Hogwild, no server (the bound)"]
    best = max(medians[name] for name in systems if name != "Hogwild, no server (the bound)")
    report.bar("tricorn / best peer", ours / best, at_least=2.0)
    report.bar("tricorn / bound", ours / bound, at_least=0.75)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
