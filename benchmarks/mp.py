"""Model parallel training: pipelines of two workers, one thread each, on one host, beside the peer and beside an ideal.

The step of every schedule is timed beside ``torch.distributed.pipelining``'s on Gloo with the same model, cut,
schedule, microbatches and optimizer (AdamW, fused). Both run in the same two processes, in turn, and malloc keeps what
is freed for both: a ratio is of two neighbouring moments of one machine. The *ideal* is the step of the same order of
work, with the seconds that each action took when both workers compute at the same time but never wait for each other:
work and bubble, and no message.

The stages of ``small`` work for 0.3 ms a microbatch and direction, those of ``mlp`` for 2, those of ``transformer`` for
25 and more: there both systems spend nearly all of a step in the same products of matrices.

Layers split among the workers are timed by mp_tensor.py.

Each case runs alone with ``--case``. With ``--json`` the object is printed after each case, with all that were run so
far, so that the last line is whole whenever it ends.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import mp_tensor
from common import ROOT, options

from tricorn.mp.schedule import Action, needed, order, target

RANK = ROOT / "benchmarks" / "jobs" / "pipeline_rank.py"
RANKS = 2
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
MICROBATCHES = 8
MODELS = {"small": (9, 20), "mlp": (9, 6), "transformer": (5, 1)}  # rounds, and steps in each


def measured(model: str, rounds: int) -> list[list]:
    """Of each rank, each round and each schedule: milliseconds of a step of Tricorn's and of the peer's, and the
    seconds of each action.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    what, steps = ",".join((model, *SCHEDULES)), MODELS[model][1]
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, what, *map(str, (MICROBATCHES, rank, rounds, steps)), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    addresses = json.dumps([json.loads(rank.stdout.readline()) for rank in ranks]) + "\n"
    for rank in ranks:
        rank.stdin.write(addresses)
        rank.stdin.flush()
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def replayed(orders: list[list[Action]], seconds: list[list[float]], chunks: int) -> float:
    """Milliseconds of a step in which each action takes what it took, and messages nothing."""
    ends: dict = {}
    clocks, at = [0.0] * RANKS, [0] * RANKS
    while any(done < len(actions) for done, actions in zip(at, orders, strict=True)):
        for rank, actions in enumerate(orders):
            for action, took in zip(actions[at[rank] :], seconds[rank][at[rank] :], strict=False):
                parcel = needed(action, rank, RANKS, chunks)
                if parcel is not None and parcel not in ends:
                    break
                clocks[rank] = max(clocks[rank], ends.get(parcel, 0.0)) + took
                ends[target(action, rank, RANKS, chunks)] = clocks[rank]
                at[rank] += 1
    return 1e3 * (max(clocks) + max(each[-1] for each in seconds))


def pipelines(report, model: str) -> None:
    rounds, _ = MODELS[model]
    found = list(zip(*measured(model, max(3, rounds // 3) if report.quick else rounds), strict=True))
    steps: dict[tuple[str, str], list[float]] = {}
    for number, schedule in enumerate(SCHEDULES):
        chunks = 2 if schedule == "interleaved" else 1
        orders = [order(schedule, rank, RANKS, MICROBATCHES, chunks) for rank in range(RANKS)]
        for each in found:
            ours, theirs, seconds = zip(*(rank[number] for rank in each), strict=True)
            row = {
                "tricorn mp": max(ours),
                "torch.distributed.pipelining": max(theirs),
                "ideal": replayed(orders, seconds, chunks),
            }
            for system, figure in row.items():
                steps.setdefault((system, schedule), []).append(figure)
    for (system, schedule), figures in steps.items():
        report.row(system, f"{model}, {schedule}", figures, "ms")
    for schedule in SCHEDULES:
        ours = steps["tricorn mp", schedule]
        faster = ratios(steps["torch.distributed.pipelining", schedule], ours)
        times = report.row("pipelining / tricorn", f"{model}, {schedule}", faster, "x")
        report.bar(f"{model}, {schedule}: pipelining / tricorn", times, at_least=1.3)
        reached = report.row("ideal / tricorn", f"{model}, {schedule}", ratios(steps["ideal", schedule], ours), "x")
        if model == "transformer":
            report.bar(f"{model}, {schedule}: ideal / tricorn", reached, at_least=0.85)
    for system in ("tricorn mp", "torch.distributed.pipelining", "ideal"):
        gained = ratios(steps[system, "1f1b"], steps[system, "zero-bubble"])
        report.row(system, f"{model}, 1f1b / zero-bubble", gained, "x")


def ratios(ones: list[float], others: list[float]) -> list[float]:
    """By round, for both of a round ran on the machine as it was then."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def main() -> None:
    split = {f"tensor {model}": model for model in mp_tensor.CASES}
    report, chosen = options("model parallel training, two workers, one thread each", (*MODELS, *split))
    for case in chosen.case or (*MODELS, *split):
        began = time.perf_counter()
        if case in split:
            mp_tensor.tensors(report, split[case], 1 if chosen.quick else 5)
        else:
            pipelines(report, case)
        print(f"{case}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if chosen.json:
            report.print(True)
            sys.stdout.flush()
    if not chosen.json:
        report.print(False)


if __name__ == "__main__":
    main()
