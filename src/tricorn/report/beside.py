"""The part of a report that holds the prediction against what was measured: time by terms, memory, bytes. Pure."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tricorn.mp.mesh import Mesh
from tricorn.planner.explain import WORDS, seconds, size
from tricorn.report.charts import Bar, bars, table

if TYPE_CHECKING:
    from tricorn.report.reading import Run, Summary

TERMS = {**{term: WORDS[term] for term in ("compute", "data", "waiting")}, "exchange": "updating, exchanging, links"}


def beside(run: Run) -> str:
    """Empty for a run that has not ended: measured figures come with its summary."""
    summary = run.summary
    if summary is None or not (summary.measured or summary.peak_bytes):
        return ""
    parts = [f"<h2>{'Predicted and measured' if run.foreseen else 'Measured'}</h2>"]
    if summary.measured.get("step"):
        parts.append(_time(summary))
    parts.append(_bytes(run, summary))
    parts.append(_memory(run, summary))
    return "\n".join(parts)


def _time(summary: Summary) -> str:
    found, foreseen = summary.measured, summary.predicted
    of = f"the mean of at least {int(summary.measured_steps):,} steps of each worker"
    said = f"A step took {seconds(found['step'])}, {of}"
    if {"step", "low", "high"} <= foreseen.keys():
        said += (
            f"; predicted were {seconds(foreseen['step'])}, {seconds(foreseen['low'])} to {seconds(foreseen['high'])}."
        )
    else:
        said += ". It was not predicted."
    if summary.worst_term and foreseen:
        term = summary.worst_term
        said += (
            f" Furthest off is {TERMS.get(term, term)}: {seconds(found.get(term, 0.0))}, predicted "
            f"{seconds(foreseen.get(term, 0.0))}."
        )
    groups, rows = [], []
    for term, words in {"step": "the whole step", **TERMS}.items():
        if term not in found:
            continue
        share = f"{found[term] / found['step']:.0%}"
        group = [Bar("measured", found[term], f"{seconds(found[term])} measured")]
        row: list[object] = [words, seconds(found[term]), share]
        if foreseen:
            value = foreseen.get(term, 0.0)
            group.append(Bar("predicted", value, f"{seconds(value)} predicted"))
            row += [seconds(value), f"{1e3 * (found[term] - value):+.3g} ms"]
        groups.append((words, group))
        rows.append(row)
    heads = ("of a step", "measured", "share", *(("predicted", "difference") if foreseen else ()))
    return f"<p>{escape(said)}</p>{bars(groups)}{table(heads, rows)}"


def _bytes(run: Run, summary: Summary) -> str:
    """A step's mean of the newest launch, which knows what its own roles sent; under one plan only."""
    if summary.launch_steps < 1 or summary.changes:
        return ""
    said = f"Roles sent each other {size(summary.bytes_sent / summary.launch_steps)} a step"
    said += f", predicted {size(run.foreseen.sent)}." if run.foreseen is not None else "."
    lost = " What a lost role sent is not counted." if run.events and run.events[-1].loss else ""
    return f"<p>{escape(said)}{lost}</p>"


def _memory(run: Run, summary: Summary) -> str:
    rows = []
    for role, peak in sorted(summary.peak_bytes.items(), key=lambda item: (item[0].split("-")[0], len(item[0]), item)):
        value = _foreseen_bytes(run, role)
        rows.append(
            (role, size(peak), "" if value is None else size(value), "" if not value else f"{peak / value:.2f}")
        )
    return table(("role", "most memory", "predicted", "measured / predicted"), rows) if rows else ""


def _foreseen_bytes(run: Run, role: str) -> int | None:
    if run.foreseen is None:
        return None
    kind, _, number = role.partition("-")
    memory = run.foreseen.memory
    if kind == "worker" and kind not in memory and number.isdigit() and run.plan.dense == "mp":
        return memory.get(f"stage {Mesh.of(run.plan).place(int(number)).stage}")
    return memory.get(kind)
