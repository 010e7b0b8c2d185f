"""Data parallel training by two workers: an MLP's step, PyTorch's own programs, memory, and a slow worker."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from common import ROOT, TRICORN, options

from tricorn.errors import ClusterError
from tricorn.testing.cgroup import Cgroup

JOBS = ROOT / "benchmarks" / "jobs" / "mlp.py"
PEERS = ROOT / "benchmarks" / "peers"
sys.path.insert(0, str(JOBS.parent))


def tricorn(job: str, *arguments: str, slow: Cgroup | None = None, watch: bool = False, **environment: str):
    """One run: its milliseconds a step over the last half, the peak memory of its workers in MB, its weights.

    The peak is there if ``watch`` asks for it: to look at a process's memory holds that process up.
    """
    with tempfile.TemporaryDirectory() as runs, tempfile.TemporaryFile("w+") as said:
        command = [TRICORN, "train", f"{JOBS}:{job}", "--strategy", "dp", "--workers", "2", "--threads", "1",
                   "--runs", runs, "--json", *arguments]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=os.environ | environment)
        folder, peak = Path(runs) / "latest", {}
        moved = slow is None
        while process.poll() is None:
            for role, pid in _roles(folder).items() if watch else ():
                if role.startswith("worker-"):
                    peak[role] = max(peak.get(role, 0), _peak(pid))
            if not moved and (pid := _roles(folder).get("worker-1")):
                for hierarchy in slow.folders:
                    (hierarchy / "cgroup.procs").write_text(str(pid))
                moved = True
            time.sleep(0.05)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        times = [row["time"] for row in rows if "loss" in row]
        half = len(times) // 2
        milliseconds = 1e3 * (times[-1] - times[half]) / (len(times) - 1 - half)
        from safetensors.torch import load_file

        last = max((folder / "checkpoints").glob("*/manifest.json")).parent
        weights = {}
        for shard in last.glob("*.safetensors"):
            weights |= {key: flat for key, flat in load_file(shard).items() if key.startswith("param/")}
        largest = max(peak.values(), default=0) / 2**20
        return milliseconds, largest, torch.cat([weights[key] for key in sorted(weights)])


def _roles(folder: Path) -> dict[str, int]:
    try:
        return json.loads((folder / "roles.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _peak(pid: int) -> int:
    """Bytes of its own that a process holds; what it shares with the one that it was forked from is not counted."""
    try:
        return psutil.Process(pid).memory_full_info().uss
    except psutil.Error:
        return 0


def pair(program: str, *before_rank: str, after: tuple[str, ...] = ()) -> list[str]:
    """What each of two ranks of a peer prints. Raises RuntimeError when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, str(PEERS / program), *before_rank, str(rank), port, *after] for rank in range(2)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{program} has failed; what it said is above")
    return printed


def peer(kind: str) -> float:
    return max(float(printed) for printed in pair("ddp_mlp.py", kind))


def steps(report, rounds: int) -> None:
    systems = {
        "tricorn dp": lambda: tricorn("job")[0],
        "tricorn dp, zero=1": lambda: tricorn("job", "--zero", "1")[0],
        "DDP on Gloo": lambda: peer("ddp"),
        "DDP on Gloo, buckets as gradients": lambda: peer("ddp-view"),
        "two that meet once a step": lambda: peer("meet"),
        "two that never talk": lambda: peer("alone"),
    }
    found: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds):
        for name, measure in list(systems.items())[:: 1 if turn % 2 else -1]:
            found[name].append(measure())
    median = {name: report.row(name, "step of the MLP, AdamW", figures, "ms") for name, figures in found.items()}
    for name in ("DDP on Gloo", "DDP on Gloo, buckets as gradients"):
        report.bar(f"{name} / tricorn dp", median[name] / median["tricorn dp"], at_least=1.8)
    report.bar("tricorn dp / two that never talk", median["tricorn dp"] / median["two that never talk"], at_most=1.2)


def programs(report, rounds: int) -> None:
    """DDP and FSDP2 as they are, but for the name of the backend."""
    for case in ("MLP", "ResNet", "transformer"):
        found = json.loads(pair("torch_dp.py", case, after=(str(rounds),))[0])
        median = {name: report.row(name, f"step of the {case}", figures, "ms") for name, figures in found.items()}
        for program in ("ddp", "fsdp2"):
            ratio = median[f"{program} gloo"] / median[f"{program} tricorn"]
            report.bar(f"{case}, {program}: Gloo / tricorn", ratio, at_least=1.0)


def memory(report) -> None:
    """In two microbatches, between which zero=1 keeps its gradients whole, and zero=2 does not."""
    held = {}
    for zero in range(4):
        held[zero] = tricorn("large", "--zero", str(zero), "--microbatches", "2", watch=True)[1]
        report.row(f"tricorn dp, zero={zero}", "peak of a worker, 33.9 M weights", [held[zero]], "MB")
    for zero in range(1, 4):
        report.bar(f"peak, zero={zero} / zero={zero - 1}", held[zero] / held[zero - 1], at_most=1.0)


def balance(report) -> None:
    """Batches of 1024, so that samples and not the update take the time; the quota is handed out every 20 ms."""
    group = Cgroup(f"tricorn-bench-{os.getpid()}")
    larger = {"MLP_BATCH_SIZE": "1024", "MLP_STEPS": "96"}
    _, _, expected = tricorn("double", **larger)
    found = {}
    for name, arguments in (("equal shares", ()), ("balanced", ("--balance",))):
        try:
            group.open(cores=0.25, memory=None)
        except ClusterError as error:
            print(f"no slow worker here: {error}", file=sys.stderr)
            return
        try:
            milliseconds, _, weights = tricorn("double", *arguments, slow=group, **larger)
        finally:
            group.close()
        found[name] = report.row(name, "step, one worker at a quarter speed", [milliseconds], "ms")
        distance = float((weights - expected).norm() / expected.norm())
        report.bar(f"{name}: weights from the undisturbed run's, in float64", distance, at_most=1e-5)
    report.bar("equal shares / balanced", found["equal shares"] / found["balanced"], at_least=1.8)


def main() -> None:
    question = "data parallel training, two workers, one thread each"
    report, chosen = options(question, cases=("steps", "programs", "memory", "balance"))
    rounds = 1 if chosen.quick else 5
    cases = {
        "steps": lambda: steps(report, rounds),
        "programs": lambda: programs(report, 2 * rounds),
        "memory": lambda: memory(report),
        "balance": lambda: balance(report),
    }
    for case in chosen.case or cases:
        cases[case]()
    report.print(chosen.json)


if __name__ == "__main__":
    main()
