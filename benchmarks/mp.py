"""Model parallel training of an MLP and a transformer: pipelines of two workers, one thread each, on one host.

The step of every schedule is timed beside ``torch.distributed.pipelining``'s on Gloo with the same model, cut,
schedule, microbatches and optimizer (AdamW, fused), in processes of the same kind that do nothing else: the mean over
the second half of the steps, between two barriers. The *ideal* is the simulated step of the same order of work, with
the seconds that forward, backward and update take in processes that compute at the same time but never wait for each
other: work and bubble, and no message. Layers split among the workers are timed by mp_tensor.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import mp_tensor
from common import ROOT, options

from tricorn.mp.schedule import order
from tricorn.mp.simulate import Work, simulate

RANK = ROOT / "benchmarks" / "jobs" / "pipeline_rank.py"
PEER = ROOT / "benchmarks" / "peers" / "pipeline_torch.py"
RANKS = 2
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
MICROBATCHES = {"mlp": 8, "transformer": 8}
STEPS = {"mlp": "60", "transformer": "8"}
CASES = ("mlp", "transformer")


def tricorn(kind: str, model: str, schedule: str) -> list:
    """What each rank prints."""
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, kind, model, schedule, str(MICROBATCHES[model]), str(rank), str(RANKS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PIPELINE_STEPS": STEPS[model]},
        )
        for rank in range(RANKS)
    ]
    addresses = json.dumps([json.loads(rank.stdout.readline()) for rank in ranks]) + "\n"
    for rank in ranks:
        rank.stdin.write(addresses)
        rank.stdin.flush()
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def peer(model: str, schedule: str) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, PEER, model, schedule, str(MICROBATCHES[model]), str(rank), str(RANKS), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PIPELINE_STEPS": STEPS[model]},
        )
        for rank in range(RANKS)
    ]
    return max(float(rank.communicate()[0]) for rank in ranks)


def ideal(model: str, schedule: str) -> float:
    """Milliseconds of a step without messages."""
    measured = tricorn("alone", model, schedule)
    chunks = len(measured[0]) - 1
    works = [Work(*measured[rank][chunk]) for chunk in range(chunks) for rank in range(RANKS)]
    orders = [order(schedule, rank, RANKS, MICROBATCHES[model], chunks) for rank in range(RANKS)]
    return 1e3 * (simulate(orders, works).seconds + max(row[-1][0] for row in measured))


def pipelines(report, model: str, rounds: int) -> None:
    steps: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for schedule in SCHEDULES:
            for system, measure in (
                ("tricorn mp", lambda schedule=schedule: max(tricorn("run", model, schedule))),
                ("torch.distributed.pipelining", lambda schedule=schedule: peer(model, schedule)),
                ("ideal", lambda schedule=schedule: ideal(model, schedule)),
            ):
                steps.setdefault((system, schedule), []).append(measure())
    case = f"{model}, {MICROBATCHES[model]} microbatches"
    median = {key: report.row(key[0], f"{case}, {key[1]}", figures, "ms") for key, figures in steps.items()}
    for schedule in SCHEDULES:
        ours, theirs = median["tricorn mp", schedule], median["torch.distributed.pipelining", schedule]
        report.bar(f"{model}, {schedule}: pipelining / tricorn", theirs / ours, at_least=AT_LEAST[model])
    for schedule in SCHEDULES:
        reached = median["ideal", schedule] / median["tricorn mp", schedule]
        report.bar(f"{model}, {schedule}: ideal / tricorn", reached, at_least=0.85)
    # By round, for both of a round ran on the machine as it was then.
    for system in ("tricorn mp", "ideal"):
        pairs = zip(steps[system, "1f1b"], steps[system, "zero-bubble"], strict=True)
        report.row(system, f"{case}, 1f1b / zero-bubble", [one / other for one, other in pairs], "x")


# The transformer's stages work for a quarter of a second: messages and bookkeeping are a small part of it.
AT_LEAST = {"mlp": 1.3, "transformer": 1.0}


def main() -> None:
    split = {f"tensor {model}": model for model in mp_tensor.CASES}
    report, chosen = options("model parallel training, two workers, one thread each", (*CASES, *split))
    for case in chosen.case or (*CASES, *split):
        rounds = 1 if chosen.quick else 5
        if case in split:
            mp_tensor.tensors(report, split[case], rounds)
        else:
            pipelines(report, case, rounds)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
