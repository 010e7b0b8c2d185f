"""What predictions and measurements of one job on one cluster come to. Pure: from what the files say."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tricorn.plan import Plan
from tricorn.planner.prediction import Prediction
from tricorn.planner.search import exact, fits

NOISE = 0.05  # plans that differ by less than this, or by less than their runs do, are ties
THREE = 1.69  # times the standard deviation: the range of three
SMALL = 10_000  # bytes of a step that beats and progress may come to
LIMITS = 16  # memory limits that are tried, between the smallest and the largest peak
SPARSE, SLOW = "sparse", "slow links"  # what a rule of thumb looks at
DDP, FSDP, PS, THUMB, ARITHMETIC = "always DDP", "always FSDP", "always PS", "rules of thumb", "arithmetic only"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Of one plan: seconds of a step, the most bytes of a role, bytes over the busiest link in the whole run.

    ``pace``: seconds that cores took meanwhile for the same little work (pace.py). ``closing``: of those at the end
    that decide between the fastest plans. ``error`` says why it failed, if it did.
    """

    plan: str
    steps: int
    seconds: float = float("inf")
    memory: int = 0
    link: int = 0
    pace: float = 0.0
    closing: bool = False
    error: str = ""


@dataclass(frozen=True)
class Measured:
    """All runs of a plan, and what was predicted of it."""

    prediction: Prediction
    runs: Sequence[Run]

    @cached_property
    def closing(self) -> Sequence[Run]:
        """Of its runs those at the end, by turns with the other plans that come close to the fastest."""
        return [run for run in self.runs if run.closing]

    @cached_property
    def seconds(self) -> float:
        """The median; where some runs are closing ones, theirs."""
        return statistics.median(run.seconds for run in self.closing or self.runs)

    @property
    def noise(self) -> float:
        """How far three of its runs are apart, as a share of ``seconds``."""
        taken = [run.seconds for run in self.runs]
        return THREE * statistics.stdev(taken) / self.seconds if len(taken) > 1 and max(taken) < float("inf") else 0.0

    @property
    def time_error(self) -> float:
        """Signed, as a share."""
        return self.prediction.seconds / self.seconds - 1

    @property
    def peak(self) -> int:
        return max(run.memory for run in self.runs)

    @property
    def memory_error(self) -> float:
        return self.prediction.fullest[1] / self.peak - 1

    @property
    def link_error(self) -> float | None:
        """Of the bytes of a step over the busiest link: what a longer run has more of. None if runs are alike."""
        long, short = (pick(run.steps for run in self.runs) for pick in (max, min))
        if long == short:
            return None
        more, fewer = (statistics.mean(run.link for run in self.runs if run.steps == n) for n in (long, short))
        sent = (more - fewer) / (long - short)
        return abs(max(self.prediction.links.values(), default=0.0) - sent) / max(sent, SMALL)


class Case:
    """One job on one cluster. ``chosen`` is the planner's own choice, by its key; runs are under theirs.

    ``tried``: plans that the planner ran for some steps. ``stated``: seconds of a step that it predicts where the
    hosts are only described to it. ``pace``: as of runs, while it planned.
    """

    def __init__(
        self, predictions: Mapping[str, Prediction], chosen: str, traits: Sequence[str], runs: Iterable[Run], *,
        tried: Sequence[str] = (), stated: Mapping[str, float] | None = None, pace: float = 0.0,
    ) -> None:  # fmt: skip
        self.predictions = predictions
        self.tried = tried
        self.stated = stated or {}
        self.pace = pace
        self.runs = tuple(runs)
        by_plan: dict[str, list[Run]] = {}
        for run in self.runs:
            by_plan.setdefault(run.plan, []).append(run)
        tried = {key: Measured(predictions[key], found) for key, found in by_plan.items()}
        self.measured = {key: each for key, each in tried.items() if each.seconds < float("inf")}
        self.failed = {key: each for key, each in tried.items() if key not in self.measured}
        self.choices = {"planner": chosen, **baselines(predictions, traits)}

    @property
    def exact(self) -> dict[str, Measured]:
        """Of plans whose updates are those of one process: only these are compared by seconds."""
        return {key: each for key, each in self.measured.items() if exact(each.prediction.plan)}

    @property
    def noise(self) -> float:
        return statistics.median(each.noise for each in self.measured.values())

    def stated_errors(self) -> list[float]:
        """Signed errors, as shares, of what is predicted for described hosts."""
        return [self.stated[key] / each.seconds - 1 for key, each in self.measured.items() if key in self.stated]

    def paced_errors(self) -> list[float]:
        """Signed errors, as shares, had cores been as fast in all runs as they were while plans were predicted.

        All that a step takes is taken to follow them, as Python and small reads do; products of large matrices do less.
        """
        found = []
        for each in self.measured.values():
            if taken := [run.seconds * self.pace / run.pace for run in each.closing or each.runs if run.pace]:
                found.append(each.prediction.seconds / statistics.median(taken) - 1)
        return found

    def regrets(self) -> dict[str, float]:
        """Of each way to choose: how much slower than the best its plan was, as a share; infinite if that failed.

        A way that has nothing to choose is infinitely bad, too; a choice that was not measured is left out.
        """
        able = self.exact.values()
        best = min(each.seconds for each in [each for each in able if each.closing] or able)
        found = {}
        for way, key in self.choices.items():
            if key in self.measured:
                found[way] = self.measured[key].seconds / best - 1
            elif key is None or key in self.failed:
                found[way] = float("inf")
        return found

    def tau(self) -> float:
        """Kendall's rank correlation of predicted and measured, less the ties of what was measured."""
        signs = []
        for a, b in itertools.combinations(self.exact.values(), 2):
            if abs(a.seconds - b.seconds) > max(NOISE, a.noise, b.noise) * min(a.seconds, b.seconds):
                agree = (a.prediction.score - b.prediction.score) * (a.seconds - b.seconds)
                signs.append((agree > 0) - (agree < 0))
        return sum(signs) / len(signs) if signs else 1.0

    def false_fits(self) -> tuple[int, int]:
        """How often a plan was said to fit a memory limit that it then exceeded; and of how many such words."""
        peaks = [each.peak for each in self.measured.values()]
        low, high = min(peaks), max(peaks)
        limits = [low + (high - low) * index / LIMITS for index in range(LIMITS + 1)]
        plans = self.measured.values()
        said = [(each, limit) for each in plans for limit in limits if fits(each.prediction.fullest[1], limit)]
        return sum(each.peak > limit for each, limit in said), len(said)


def baselines(predictions: Mapping[str, Prediction], traits: Sequence[str]) -> dict[str, str | None]:
    """What others would choose: always one strategy, rules of thumb, arithmetic without exchange. None: nothing."""
    able = {key: each for key, each in predictions.items() if exact(each.plan)}
    most = max(each.plan.workers for each in able.values())

    def first(suits: Callable[[Plan], bool]) -> str | None:
        return next((key for key, each in able.items() if each.plan.workers == most and suits(each.plan)), None)

    found = {
        DDP: first(lambda p: p.strategy == "dp" and not (p.zero or p.balance) and p.embeddings == "whole"),
        FSDP: first(lambda p: p.strategy == "dp" and p.zero == 3),
        PS: first(lambda p: p.strategy == "ps"),
    }
    if SPARSE in traits:  # rows on servers, the rest by all-reduce: Parallax
        thumb = first(lambda p: p.strategy == "ps+dp") or found[PS]
    elif SLOW in traits:  # a pipeline with many microbatches
        pipelines = [key for key, each in able.items() if each.plan.strategy == "mp" and each.plan.workers == most]
        thumb = max(pipelines, key=lambda key: able[key].plan.microbatches or 1, default=found[DDP])
    else:
        thumb = found[DDP]
    arithmetic = min(able, key=lambda key: (able[key].terms["compute"], key))
    return {**found, THUMB: thumb, ARITHMETIC: arithmetic}
