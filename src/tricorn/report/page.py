"""A run as one HTML page that needs nothing else: no network, no script. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

import msgspec

from tricorn.data.order import steps_per_epoch
from tricorn.planner.explain import WORDS, named, seconds, size
from tricorn.report.beside import beside
from tricorn.report.charts import Bar, Mark, Point, bars, line, table
from tricorn.report.failure import located
from tricorn.report.progress import duration
from tricorn.report.reading import Event, Run
from tricorn.report.style import STYLE
from tricorn.report.table import shown

RATES, SHORTEST = 60, 0.25  # parts of a run whose pace is drawn, at most; seconds that each lasts, at least
MOST_EVENTS, MOST_WORKERS, MOST_MACHINES = 200, 64, 32
_ENDS = {"done": ("done", "good"), "stopped": ("interrupted, and can be resumed", ""), "failed": ("failed", "wrong")}


def html(run: Run) -> str:
    """The whole page, with everything that came from files escaped."""
    parts = [
        _head(run), _tiles(run), beside(run), _learning(run), _timeline(run), _workers(run), _staleness(run),
        _samples(run), _declared(run),
    ]  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(run.folder.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def _head(run: Run) -> str:
    if run.live:
        ended, kind = "in progress: this is what there is so far", ""
    elif run.summary is None:
        ended, kind = "ended without a word: it was killed, or its machine was lost; it can be resumed", "wrong"
    else:
        ended, kind = _ENDS.get(run.summary.outcome, (run.summary.outcome, ""))
    said = [f"<h1>{escape(run.folder.name)}</h1>", f'<p><b class="{kind}">{escape(ended)}</b></p>']
    said.append(f"<p>{escape(run.job.name)} with {escape(named(run.plan))}</p>")
    if run.summary is not None and run.summary.error is not None:
        error = run.summary.error
        remedy = located(error.remedy, str(run.folder), python=run.job.file is None)
        told = [error.message, error.where and f"where: {error.where}", remedy and f"what to do: {remedy}"]
        said.append(f'<div class="box">{escape(chr(10).join(part for part in told if part))}</div>')
    if run.problems:
        said.append(f'<div class="box">{escape(chr(10).join(run.problems))}</div>')
    return "\n".join(said)


def _tiles(run: Run) -> str:
    total = run.job.epochs * steps_per_epoch(run.job.samples, run.job.batch_size)
    committed = run.samples.committed if run.samples else len(run.losses)
    tiles = [("steps", f"{committed:,} of {total:,}")]
    if run.summary is not None:
        tiles += [
            ("samples", shown(run.summary.samples)),
            ("time of the last launch", duration(run.summary.seconds)),
            ("samples a second", shown(run.summary.samples_per_second)),
            ("sent between roles", size(run.summary.bytes_sent)),
        ]
    if run.evaluations:
        last = run.evaluations[max(run.evaluations)]
        tiles += [(f"held out: {name}", _number(value)) for name, value in last.items()]
    if run.losses:
        tiles.append(("loss of the last step", _number(run.losses[max(run.losses)])))
    if run.samples is not None:
        tiles.append(("samples exactly once", shown(run.samples.exactly_once)))
        tiles.append(("regroupings", shown(run.samples.restarts)))
    drawn = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _learning(run: Run) -> str:
    if not run.losses and not run.evaluations:
        return ""
    losses = [(step + 1.0, value) for step, value in sorted(run.losses.items()) if value is not None]
    said = ["<h2>What it learned</h2>", '<div class="charts">', line(losses, x="step", y="loss in training")]
    names = list(dict.fromkeys(name for values in run.evaluations.values() for name in values))
    for name in names:
        points = _points(run, name)
        said.append(line(points, x="step", y=f"held out: {name}"))
    said.append("</div>")
    if missing := sum(value is None for value in run.losses.values()):
        said.append(f'<p class="wrong">{missing:,} losses are not finite, and are not drawn.</p>')
    if names:
        rows = [
            (step, *("not finite" if values.get(name) is None else values[name] for name in names))
            for step, values in sorted(run.evaluations.items())
        ]
        said.append(f"<details><summary>All evaluations</summary>{table(('step', *names), rows)}</details>")
    return "\n".join(said)


def _points(run: Run, name: str) -> list[Point]:
    found = ((float(step), values.get(name)) for step, values in sorted(run.evaluations.items()))
    return [(step, value) for step, value in found if value is not None]


def _timeline(run: Run) -> str:
    if not run.done:
        return "" if not run.events else "<h2>What happened</h2>" + _happened(run.events, run.events[0].time)
    began = run.events[0].time if run.events else run.done[0][0]
    marks = [Mark(event.time - began, event.text, event.loss) for event in run.events]
    drawn = [
        line([(at - began, float(step)) for at, step in run.done], x="seconds", y="steps done", marks=marks, steps=True)
    ]
    if len(paces := _paces(run.done)) > 1:
        drawn.append(line(paces, x="step", y="steps a second"))
    return f'<h2>What happened</h2>\n<div class="charts">{"".join(drawn)}</div>' + _happened(run.events, began)


def _happened(events: Sequence[Event], began: float) -> str:
    rows = [
        (
            f"{event.time - began:.2f} s", event.step, event.membership, event.text,
            "" if event.stood is None or place == 0 else duration(event.stood),
        )
        for place, event in enumerate(events)
    ][:MOST_EVENTS]  # fmt: skip
    left = len(events) - len(rows)
    more = f"<p>And {left:,} more.</p>" if left else ""
    return table(("after", "steps done", "membership epoch", "what happened", "no step for"), rows) + more


def _paces(done: Sequence[tuple[float, int]]) -> list[Point]:
    """Steps a second, by step, over parts that last long enough to be told."""
    found, least = [], max(1, len(done) // RATES)
    first = 0
    for place in range(1, len(done)):
        took = done[place][0] - done[first][0]
        if place - first >= least and took >= SHORTEST:
            found.append((float(done[place][1]), (place - first) / took))
            first = place
    return found


def _workers(run: Run) -> str:
    if run.summary is None or not (spent := {r: s for r, s in run.summary.spent.items() if s.get("steps", 0) > 0}):
        return ""
    groups, rows = [], []
    for role, told in sorted(spent.items(), key=lambda item: (len(item[0]), item[0]))[:MOST_WORKERS]:
        steps = told["steps"]
        each = {name: told.get(name, 0.0) / steps for name in ("all", "compute", "data")}
        if "compute" in told:
            groups.append((role, [Bar("", each["compute"], f"{seconds(each['compute'])} computing")]))
        share = run.shares.get(role.removeprefix("worker-"))
        rows.append(
            (
                role, int(steps), seconds(each["all"]), seconds(each["compute"]) if "compute" in told else "not told",
                seconds(each["data"]), "" if share is None else f"{share:.1%}",
            )
        )  # fmt: skip
    said = ["<h2>Balance of the workers</h2>"]
    if len(groups) > 1:
        values = [group[0].value for _, group in groups]
        mean = sum(values) / len(values)
        said.append(f"<p>The busiest computes {max(values) / mean if mean else 1.0:.2f} times as long as the mean.</p>")
    heads = ("worker", "steps counted", "a step", "computing", "making batches", "share of a batch")
    return "\n".join([*said, bars(groups) if groups else "", table(heads, rows)])


def _staleness(run: Run) -> str:
    if not run.staleness:
        return ""
    ages: Counter[str] = Counter()
    for counts in run.staleness.values():
        ages.update({age: int(count) for age, count in counts.items()})
    total = ages.total() or 1
    ordered = sorted(ages, key=lambda age: (len(age.split("-")[0]), age))
    groups = [(age, [Bar("", ages[age], f"{ages[age]:,} ({ages[age] / total:.1%})")]) for age in ordered]
    rows = [[server, *(int(counts.get(age, 0)) for age in ordered)] for server, counts in sorted(run.staleness.items())]
    return "\n".join(
        [
            "<h2>Staleness</h2>",
            "<p>How many updates were between the weights a gradient was computed from and its own, as the servers "
            "counted up to the last checkpoint.</p>",
            bars(groups), table(("server", *(f"age {age}" for age in ordered)), rows) if len(rows) > 1 else "",
        ]
    )  # fmt: skip


def _samples(run: Run) -> str:
    if run.samples is None:
        return ""
    samples, verdict = run.samples, "once" if run.summary and run.summary.outcome == "done" else "at most once"
    said = (
        f'<p class="good">Every sample of every epoch is in the model {verdict}.</p>'
        if samples.exactly_once
        else '<p class="wrong">The ledger does not show that every sample is in the model once.</p>'
    )
    steps = "1 step is" if samples.committed == 1 else f"{samples.committed:,} steps are"
    again = f"{samples.undone:,} were taken back after a loss, and are done again." if samples.undone else ""
    return f"<h2>Samples exactly once</h2>{said}<p>{steps} in the model. {again}</p>"


def _declared(run: Run) -> str:
    job = [(key, _plain(value)) for key, value in msgspec.to_builtins(run.job).items() if value is not None]
    plan = [(key, _plain(value)) for key, value in msgspec.to_builtins(run.plan).items() if value is not None]
    said = ["<h2>Job, plan and machines</h2>"]
    if run.foreseen is not None and run.foreseen.machines:
        machines = run.foreseen.machines
        rows = [(host.name, host.cores, size(host.memory), host.speed) for host in machines[:MOST_MACHINES]]
        which = "machine" if len(rows) == len(machines) else f"of {len(machines):,} machines"
        said.append(table((which, "cores", "memory", "speed of a core"), rows))
    if run.summary is not None and run.summary.changes:
        before = [
            (change.steps, named(change.plan), seconds(change.measured.get("step", 0.0)), size(change.bytes_sent))
            for change in run.summary.changes
        ]
        said.append(table(("until step", "the plan was", "a step took", "sent"), before))
    said.append(f"<details><summary>The job</summary>{table(('field', 'value'), job)}</details>")
    said.append(f"<details><summary>The plan</summary>{table(('field', 'value'), plan)}</details>")
    if run.foreseen is not None:
        terms = [(WORDS.get(term, term), seconds(value)) for term, value in run.foreseen.terms.items()]
        said.append(f"<details><summary>The prediction</summary>{table(('term', 'of a step'), terms)}</details>")
    return "\n".join(said)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _number(value: float | None) -> str:
    return "not finite" if value is None else shown(value)
