"""What asynchrony costs in quality and gains in speed: clicks with a planted signal, four workers, one of them slow."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from common import ROOT, TRICORN, options

from tricorn.state.trained import trained_model

JOB = ROOT / "benchmarks" / "jobs" / "clicks.py"
sys.path.insert(0, str(JOB.parent))

SERVERS = ["--strategy", "ps", "--servers", "1"]
MODES = {
    "asp": ["--consistency", "asp"],
    "ssp(3)": ["--consistency", "ssp", "--staleness", "3"],
    "hybrid (rows asp)": ["--sparse-consistency", "asp"],
}
PERIOD = 0.04  # seconds in which the slow worker runs a quarter of the time


def run(runs: Path, samples: int, workers: int, *mode: str, slow: bool = False) -> tuple[dict, Path]:
    """One `tricorn train`: its summary and folder."""
    command = [TRICORN, "train", JOB, *SERVERS, "--workers", str(workers), *mode]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--runs", runs, "--json", "--heartbeat-timeout", "30"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "CLICKS_SAMPLES": str(samples)},
    )  # fmt: skip
    over = threading.Event()
    brake = threading.Thread(target=hold_back, args=(runs / "latest" / "roles.json", over))
    if slow:
        brake.start()
    out, err = process.communicate()
    over.set()
    if slow:
        brake.join()
    if process.returncode:
        sys.exit(err)
    summary = json.loads(out.splitlines()[-1])
    assert summary["exactly_once"], summary
    return summary, (runs / "latest").resolve()


def hold_back(roles: Path, over: threading.Event) -> None:
    """Let the last worker run a quarter of the time."""
    while not over.wait(PERIOD / 4):
        try:
            pid = json.loads(roles.read_text())["worker-3"]
            os.kill(pid, signal.SIGSTOP)
            over.wait(PERIOD * 3 / 4)
            os.kill(pid, signal.SIGCONT)
        except (OSError, KeyError, json.JSONDecodeError):
            continue  # it is not there yet, or not any more


def auc(folder: Path) -> float:
    """The area under the ROC curve of a trained model: the chance that a click is ranked above another sample."""
    import clicks

    model = trained_model(clicks.job, folder)
    (ids, numbers), clicked = clicks.held_out.fetch(np.arange(clicks.HELD_OUT))
    with torch.no_grad():
        score = model(ids, numbers).numpy()
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(1, len(score) + 1)
    positive = clicked.numpy() > 0.5
    count = positive.sum()
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * (len(score) - count)))


def main() -> None:
    report, chosen = options("asynchronous training of clicks: AUC and throughput against agreed steps")
    samples = 100_000 if chosen.quick else 400_000
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        summary, trained = run(runs, samples, 1)
        single = auc(trained)
        report.row("one worker, bsp", "AUC", [single], "")
        table = 26 * 20_000 * 8 * 4
        report.row("one worker, bsp", "bytes a step", [summary["bytes_sent"] / summary["steps"]], "")
        report.bar("bytes a step / bytes of the table", summary["bytes_sent"] / summary["steps"] / table, at_most=0.1)
        for name, mode in MODES.items():
            found = auc(run(runs, samples, 4, *mode)[1])
            report.row(f"four workers, {name}", "AUC", [found], "")
            report.bar(f"AUC lost by {name}", single - found, at_most=0.003)
        speeds: dict[str, list[float]] = {"bsp": [], "asp": [], "ssp(3)": []}
        for _ in range(1 if chosen.quick else 3):
            for name, figures in speeds.items():
                summary, _ = run(runs, samples // 4, 4, *MODES.get(name, []), slow=True)
                figures.append(summary["samples_per_second"])
        for name, figures in speeds.items():
            report.row(f"four workers, one slow, {name}", "throughput", figures, "samples/s")
        for name in ("asp", "ssp(3)"):
            gain = statistics.median(speeds[name]) / statistics.median(speeds["bsp"])
            report.bar(f"throughput with one slow worker, {name} / bsp", gain, at_least=2.0)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
