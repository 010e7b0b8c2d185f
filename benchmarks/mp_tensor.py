"""Tensor parallel by two workers beside DTensor, for an MLP and a block of a transformer.

DTensor is told which layers to split (``parallelize_module``, ColwiseParallel and RowwiseParallel), Tricorn finds out.
Both run the same model, data and fused AdamW in processes of one thread on one host; a step is the mean over the second
half of the steps, between two barriers. DTensor runs over Gloo and, for comparison, over Tricorn's own collectives.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from common import ROOT, options

RANK = ROOT / "benchmarks" / "jobs" / "tensor_rank.py"
PEER = ROOT / "benchmarks" / "peers" / "tensor_torch.py"
CASES = ("mlp", "transformer")


def tricorn(model: str, ranks: int = 2) -> float:
    """Milliseconds of a step."""
    processes = [
        subprocess.Popen(
            [sys.executable, RANK, model, str(rank), str(ranks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    addresses = json.dumps([json.loads(process.stdout.readline()) for process in processes]) + "\n"
    for process in processes:
        process.stdin.write(addresses)
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in processes)


def dtensor(model: str, backend: str) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", PEER, model, backend, str(rank), "2", port],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return max(float(process.communicate()[0]) for process in processes)


def tensors(report, model: str, rounds: int) -> None:
    """Rows and the bar of one model."""
    systems = {
        "tricorn mp, tensor 2": lambda: tricorn(model),
        "DTensor on Gloo": lambda: dtensor(model, "gloo"),
        "DTensor on tricorn": lambda: dtensor(model, "tricorn"),
        "one process": lambda: tricorn(model, 1),
    }
    found: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds):
        for name, measure in systems.items():
            found[name].append(measure())
        print(f"tensor {model}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    for name, figures in found.items():
        report.row(name, f"{model}, layers split", figures, "ms")
    # By round, for both of a round ran on the machine as it was then.
    pairs = zip(found["DTensor on Gloo"], found["tricorn mp, tensor 2"], strict=True)
    faster = report.row("DTensor on Gloo / tricorn", f"{model}, layers split", [t / o for t, o in pairs], "x")
    report.bar(f"{model}: DTensor on Gloo / tricorn tensor 2", faster, at_least=1.5)


def main() -> None:
    report, chosen = options("tensor parallel, two workers, one thread each", CASES)
    for model in chosen.case or CASES:
        tensors(report, model, 1 if chosen.quick else 5)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
