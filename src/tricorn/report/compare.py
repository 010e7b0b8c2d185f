"""A run's steps as they were predicted, beside what was measured of them. Pure.

Terms are those that both sides know: ``compute``, ``data`` (making batches), ``waiting`` for who computes the slowest,
and ``exchange``, which is all the rest of a step: updating, exchanging, links, and other waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tricorn.plan import Plan

SINGLE = ("compute", "data", "waiting")


def measured(spent: Sequence[Mapping[str, float]], plan: Plan) -> dict[str, float]:
    """Seconds of one update by term, from what workers say (worker/spent.py); empty if none has said enough.

    Workers of an asynchronous run make updates side by side; those of a pipeline wait for each other within a step,
    which is as long as its busiest stage computes, and more.
    """
    told = _told(spent)
    if not told:
        return {}
    seconds = {key: sum(each[key] / each["steps"] for each in told) / len(told) for key in ("all", "data")}
    found = {"data": seconds["data"]}
    if all("compute" in each for each in told):
        computing = [each["compute"] / each["steps"] for each in told]
        found["compute"] = max(computing) if plan.dense == "mp" else sum(computing) / len(told)
        if plan.synchronous and plan.dense != "mp":
            found["waiting"] = max(computing) - found["compute"]
    found["exchange"] = max(0.0, seconds["all"] - sum(found.values()))
    share = 1 if plan.synchronous else len(told)
    return {"step": seconds["all"] / share, **{term: value / share for term, value in found.items()}}


def counted(spent: Sequence[Mapping[str, float]]) -> float:
    """How many steps of each worker that is of."""
    return min((each["steps"] for each in _told(spent)), default=0.0)


def _told(spent: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    return [each for each in spent if each.get("steps", 0) > 0]


def grouped(terms: Mapping[str, float], step: float, known: Mapping[str, float]) -> dict[str, float]:
    """Predicted terms put together as far as measured ones, ``known``, tell them apart."""
    found = {term: terms.get(term, 0.0) for term in SINGLE if term in known}
    return {"step": step, **found, "exchange": step - sum(found.values())}


def worst(predicted: Mapping[str, float], found: Mapping[str, float]) -> str:
    """The term that was most wrong, in seconds; empty if nothing was measured."""
    terms = [term for term in found if term != "step"]
    return max(terms, key=lambda term: abs(found[term] - predicted.get(term, 0.0)), default="")


def sentence(summary: Mapping[str, Any]) -> str:
    """Predicted against measured in one line; empty if the run has not both."""
    predicted, found = summary.get("predicted"), summary.get("measured")
    if not predicted or not found:
        return ""
    term = summary["worst_term"]
    words = {
        "compute": "computing", "data": "making batches", "waiting": "waiting for others",
        "exchange": "updates and communication",
    }  # fmt: skip
    return (
        f"a step took {1e3 * found['step']:.3g} ms, predicted {1e3 * predicted['step']:.3g} "
        f"({1e3 * predicted['low']:.3g} to {1e3 * predicted['high']:.3g}); the largest difference is in {words[term]}: "
        f"{1e3 * found[term]:.3g} ms, predicted {1e3 * predicted[term]:.3g}"
    )
