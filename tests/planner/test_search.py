from __future__ import annotations

import pytest

from tricorn.plan import Plan
from tricorn.planner.cluster import Cluster, Host
from tricorn.planner.search import Planning, candidates, exact, search

from .world import GB, apart, can_run, ground, profile, recommender


def planning(job=None, cluster=None, given=None, *, approximate: bool = False, why_not=can_run) -> Planning:
    return search(ground(job, cluster), why_not, given or {}, approximate=approximate)


def test_each_candidate_is_there_once_and_has_no_mistakes() -> None:
    plans = list(candidates(ground(recommender(), apart(4, mbit=100)), {}))
    assert len(set(plans)) == len(plans)
    assert not [plan for plan in plans if plan.mistakes()]
    assert {plan.strategy for plan in plans} == {"ps", "dp", "mp", "ps+dp", "ps+mp"}
    assert {plan.workers for plan in plans} == {1, 2, 3, 4}


def test_what_is_given_stays() -> None:
    for given in ({"workers": 3}, {"zero": 2}, {"strategy": "ps"}, {"consistency": "ssp"}, {"compress": "topk"}):
        found = planning(given=given, approximate=True)
        assert found.ranked, given
        assert all(getattr(p.plan, field) == value for p in found.ranked for field, value in given.items())


def test_they_are_ranked_by_score() -> None:
    found = planning()
    scores = [prediction.score for prediction in found.ranked]
    assert scores == sorted(scores)


def test_only_exact_plans_are_chosen_unless_others_are_allowed() -> None:
    job, slow = profile(batch=20.0), apart(4, mbit=20)
    strict, loose = (planning(job, slow, approximate=approximate) for approximate in (False, True))
    assert strict.chosen is not None
    assert loose.chosen is not None
    assert exact(strict.chosen.plan)
    assert not exact(loose.chosen.plan)
    assert loose.chosen.score < strict.chosen.score


def test_a_job_too_small_to_share_stays_with_one_worker() -> None:
    found = planning(profile(elements=20_000, batch=2.1e-3))
    assert found.chosen is not None
    assert found.chosen.plan == Plan(strategy="dp", workers=1)


def test_a_large_one_takes_all_cores() -> None:
    found = planning(profile(elements=20_000, batch=2.0))
    assert found.chosen is not None
    assert (found.chosen.plan.strategy, found.chosen.plan.workers) == ("dp", 4)


def test_a_job_that_is_mostly_one_table_takes_servers() -> None:
    found = planning(recommender())
    assert found.chosen is not None
    assert found.chosen.plan.served


def test_a_model_that_fits_nowhere_whole_is_spread() -> None:
    job = profile(elements=400_000_000, batch=2.0)  # 1.6 GB, and as much again for gradients and each slot
    found = planning(job, apart(4, memory=5 * GB))
    assert found.chosen is not None
    assert found.chosen.plan.zero >= 1 or found.chosen.plan.strategy == "mp"
    reasons = {r.plan: r.reason for r in found.rejected}
    assert "needs" in reasons[Plan(strategy="dp", workers=4)]
    assert "GB of memory, and a tenth to spare, on h0, which has 5 GB" in reasons[Plan(strategy="dp", workers=4)]


def test_a_bound_on_memory_is_kept() -> None:
    found = planning(profile(elements=100_000_000), given={"memory": 1_500_000_000})
    assert found.ranked
    assert all(prediction.fullest[1] <= 1_500_000_000 for prediction in found.ranked)
    assert any("memory is 1.5 GB" in rejected.reason for rejected in found.rejected)


def test_a_plan_that_cannot_run_is_listed_with_its_reason() -> None:
    def why_not(plans):
        return ["it has BatchNorm" if plan.strategy == "mp" else None for plan in plans]

    found = planning(why_not=why_not)
    assert {r.reason for r in found.rejected if r.plan.strategy == "mp"} == {"it has BatchNorm"}
    assert not [p for p in found.ranked if p.plan.strategy == "mp"]


def test_nothing_measured_leaves_nothing_to_choose() -> None:
    found = planning(profile(compute={}, unmeasured="ValueError: no"))
    assert found.chosen is None
    assert {"ValueError: no"} == {r.reason for r in found.rejected if r.plan.strategy == "dp"}


@pytest.mark.parametrize("cores", [1, 2])
def test_a_small_machine_has_plans_too(cores: int) -> None:
    found = planning(cluster=Cluster(hosts=(Host(name="small", cores=cores, memory=4 * GB),)))
    assert found.chosen is not None
    assert max(p.plan.workers for p in found.ranked) == cores


def test_a_slow_host_is_left_out_wherever_it_stands() -> None:
    fast, slow = apart(3).hosts, apart(1, speed=0.05).hosts
    for job in (profile(elements=20_000, batch=2.0), recommender()):
        last, first = (planning(job, Cluster(hosts=hosts, described=True)) for hosts in (fast + slow, slow + fast))
        assert last.chosen is not None
        assert first.chosen is not None
        assert first.chosen.seconds == pytest.approx(last.chosen.seconds)
        assert last.chosen.plan.hosts is None
        assert 0 not in (first.chosen.plan.hosts or (0,))


def test_workers_of_a_cluster_may_share_a_host_with_cores_for_them() -> None:
    job, slow = profile(elements=2_000_000, batch=2.0), {"cores": 2, "mbit": 10.0}
    found = planning(job, apart(3, **slow), {"strategy": "dp", "workers": 2})
    assert found.chosen is not None
    assert found.chosen.plan.hosts == (0,)


def test_hosts_with_more_cores_are_no_slower() -> None:
    taken = []
    for cores in (1, 2, 4, 8, 64):
        found = planning(profile(batch=2.0), apart(1, cores=float(cores)), {"strategy": "dp", "workers": cores})
        alone = planning(profile(batch=2.0), apart(1, cores=float(cores)), {"strategy": "dp", "workers": 1})
        assert found.chosen is not None
        assert alone.chosen is not None
        taken.append((found.chosen.terms["compute"], alone.chosen.terms["compute"]))
    assert [*zip(*taken, strict=True)] == [tuple(sorted(each, reverse=True)) for each in zip(*taken, strict=True)]
    assert any("hosts of up to 64 cores, of which 4 were measured" in note for note in found.chosen.notes)


def test_hosts_that_are_given_stay() -> None:
    found = planning(profile(batch=2.0), apart(4), {"hosts": (3, 1)})
    assert {prediction.plan.hosts for prediction in found.ranked} == {(3, 1)}
    missing = planning(profile(batch=2.0), apart(2), {"hosts": (3, 1)})
    assert missing.chosen is None
    assert {each.reason for each in missing.rejected} == {"hosts are (3, 1), counted from 0, and there are 2"}


def test_alike_plans_fall_to_the_simplest() -> None:
    found = planning()
    assert found.chosen is not None
    best = next(p for p in found.ranked if exact(p.plan))
    alike = [p for p in found.ranked if exact(p.plan) and p.score <= 1.03 * best.score]
    assert found.chosen.plan.workers == min(
        p.plan.workers for p in alike if p.plan.strategy == found.chosen.plan.strategy
    )
