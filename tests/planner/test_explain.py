"""The reasons: every number in them is of the predictions, and another cluster gives other reasons."""

from __future__ import annotations

import re

import pytest
from msgspec import structs

from tricorn.plan import Plan
from tricorn.planner.cluster import Cluster
from tricorn.planner.explain import explain, named, seconds, size
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction, Rejected
from tricorn.planner.search import Planning, search

from .world import GB, apart, can_run, ground, machine, profile, recommender

NUMBER = re.compile(r"(?<![\w.])(\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)( (?:s|ms|us|TB|GB|MB|kB|B)\b)?")


def reasons(on: Ground, *, approximate: bool = False) -> tuple[Planning, list[str]]:
    found = search(on, can_run, {}, approximate=approximate)
    return found, explain(found, on)


def numbers_of(found: Planning, on: Ground) -> set[str]:
    """Every number that the predictions hold, as a reason would print it."""
    known: set[str] = {f"{on.profile.steps:,}"}
    for p in found.ranked:
        durations = [p.seconds, p.low, p.high, p.seconds * on.profile.steps, *p.terms.values()]
        known |= {seconds(value) for value in durations} | {size(value) for value in p.memory.values()}
        known |= {f"{p.penalty:.2f}"}
        known |= {f"{min(1.0, p.lost):.2%}".rstrip("%")}
    assert found.chosen is not None
    workers, servers = on.places(found.chosen.plan)
    hosts = len(on.cluster.hosts)
    known |= {str(hosts), str(hosts - len({*workers, *servers}))}
    known |= {size(host.memory) for host in on.cluster.hosts}
    texts = [named(p.plan) for p in (*found.ranked, *found.rejected)] + [
        role for p in found.ranked for role in p.memory
    ]
    texts += [note for p in found.ranked for note in p.notes] + [r.reason for r in found.rejected]
    texts += [repr(layer.name) for layer in on.profile.layers]
    reasons = [str(sum(1 for r in found.rejected if r.reason == each.reason)) for each in found.rejected]
    known |= {f"{max(on.profile.busy, on.links.busy):.0%}".rstrip("%")}
    return known | {match[0] for text in texts for match in NUMBER.finditer(text)} | {*reasons}


@pytest.mark.parametrize(
    "on",
    [
        ground(),
        ground(recommender()),
        ground(profile(elements=20_000, batch=0.005)),
        ground(profile(busy=0.43)),
        ground(cluster=apart(4, mbit=100)),
        ground(recommender(), apart(4, mbit=10)),
        ground(cluster=apart(4, failures_per_day=300.0)),
        ground(profile(elements=400_000_000, batch=2.0), apart(4, memory=5 * GB)),
    ],
)
@pytest.mark.parametrize("approximate", [False, True])
def test_every_number_is_of_the_predictions(on: Ground, approximate: bool) -> None:
    found, said = reasons(on, approximate=approximate)
    known = numbers_of(found, on)
    shown = {match[0] for sentence in said for match in NUMBER.finditer(sentence)}
    assert len(shown) > 8
    assert shown <= known


def test_a_slower_link_is_the_reason_to_send_less() -> None:
    fast, _ = reasons(ground(cluster=apart(4, mbit=100_000)))
    slow, said = reasons(ground(cluster=apart(4, mbit=10)))
    assert fast.chosen is not None
    assert slow.chosen is not None
    assert sum(slow.chosen.links.values()) < sum(fast.chosen.links.values())
    assert any("on the links takes" in sentence for sentence in said)


def test_less_memory_is_the_reason_for_no_replica() -> None:
    job = profile(elements=400_000_000, batch=200.0)
    rich, _ = reasons(ground(job, apart(4, memory=64 * GB, mbit=100_000)))
    poor, said = reasons(ground(job, apart(4, memory=5 * GB, mbit=100_000)))
    assert rich.chosen is not None
    assert poor.chosen is not None
    assert rich.chosen.plan.strategy == "dp"
    assert rich.chosen.plan.zero == 0
    assert poor.chosen.plan.zero > 0 or poor.chosen.plan.strategy != "dp"
    assert any("out of the question: needs" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("cluster", "why"),
    [
        (apart(4, mbit=1), "3 of the 4 machines stay unused: .* would take .* takes .* there"),
        (apart(4, failures_per_day=3000.0), "failures would take 100.00% of its time"),
        (machine(), None),
    ],
)
def test_it_is_said_why_machines_stay_unused(cluster: Cluster, why: str | None) -> None:
    _, said = reasons(ground(cluster=cluster))
    if why is None:
        assert not any("unused" in sentence or "failures" in sentence for sentence in said)
    else:
        assert any(re.search(why, sentence) for sentence in said)


def test_a_plan_whose_updates_are_worth_less_is_not_as_good() -> None:
    on = ground(cluster=apart(4))
    terms = {"compute": 0.01, "update": 0.0, "data": 0.0, "exchange": 0.0, "wire": 0.0, "waiting": 0.0}
    two = Plan(strategy="ps", consistency="asp", workers=2, servers=1)
    few = Prediction(plan=two, terms=terms, scatter=0.0, penalty=1.1)
    many = structs.replace(few, plan=structs.replace(two, workers=3), penalty=1.5)
    (said,) = (each for each in explain(Planning(ranked=(few, many), rejected=(), chosen=few), on) if "unused" in each)
    assert said.endswith("would take 10 ms a step, but it would need 1.50 times the steps, and 1.10 here.")
    alike = Planning(ranked=(few, structs.replace(many, penalty=1.1)), rejected=(), chosen=few)
    assert any("unused" in each and "as good" in each for each in explain(alike, on))


def test_a_reason_has_one_period() -> None:
    found, _ = reasons(ground())
    refused = Rejected(plan=Plan(strategy="mp"), reason="it has one layer; give it more.")
    assert explain(structs.replace(found, rejected=(refused,)), ground())[-1].endswith("one layer; give it more.")


def test_a_core_that_stays_unused_is_told() -> None:
    found = search(ground(), can_run, {"workers": 3, "strategy": "dp"}, approximate=False)
    assert any(re.match("1 of the 4 cores stays unused: no other plan", each) for each in explain(found, ground()))


def test_what_was_measured_on_a_busy_machine_is_said_to_be() -> None:
    _, said = reasons(ground(profile(busy=0.43)))
    assert sum("took 43% of this machine" in sentence for sentence in said) == 1
    _, said = reasons(ground(profile(busy=0.05)))
    assert not any("Other programs" in sentence for sentence in said)


def test_without_a_plan_it_says_so() -> None:
    _, said = reasons(ground(profile(compute={}), machine()))
    assert said == ["No plan can run this job here."]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.00352, "3.52 ms"), (12.3, "12.3 s"), (2e-7, "0.2 us"), (0.0, "0 us"), (5000.0, "5,000 s")]
)
def test_seconds_have_a_unit(value: float, shown: str) -> None:
    assert seconds(value) == shown


def test_bytes_have_a_unit() -> None:
    assert [size(value) for value in (0, 512, 2048, 3.5e9)] == ["0 B", "512 B", "2.05 kB", "3.5 GB"]


def test_a_pipeline_is_said_to_be_cut_before_blocks_by_name() -> None:
    found = search(ground(), can_run, {"strategy": "mp", "workers": 2, "microbatches": 2}, approximate=False)
    assert found.chosen is not None
    (cut,) = found.chosen.plan.cuts or ()
    assert f"The model is cut before 'layers.{cut}'." in explain(found, ground())
