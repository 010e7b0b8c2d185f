"""Each strategy's equations on a machine of round figures."""

from __future__ import annotations

import time
from typing import Any

import pytest
from msgspec.structs import replace

from tricorn.plan import Plan, StrategyName
from tricorn.planner.cluster import FRAMED, Cluster
from tricorn.planner.figures import Curve, Point
from tricorn.planner.prediction import Prediction
from tricorn.planner.profile import Profile, Splitting
from tricorn.planner.search import candidates, predicted, search

from .world import GB, apart, can_run, ground, line, profile, recommender

LINK = 12.5e6 / FRAMED  # bytes a second of 100 Mbit/s


def cost(plan: Plan, **changes: Any) -> Prediction:
    found = predicted(plan, ground(**changes))
    assert isinstance(found, Prediction), found
    return found


@pytest.mark.parametrize("cluster", [None, apart(1), apart(4), apart(4, mbit=10.0, speed=0.25)])
@pytest.mark.parametrize("job", [profile(), recommender()])
def test_every_prediction_is_whole(cluster: Cluster | None, job: Profile) -> None:
    on = ground(job, cluster)
    plans = list(candidates(on, {}))
    assert len(plans) >= 2
    for plan in plans:
        found = predicted(plan, on)
        if isinstance(found, str):
            continue
        assert all(seconds >= 0 for seconds in found.terms.values()), (plan, found.terms)
        assert 0 < found.low < found.seconds < found.high < float("inf")
        assert found.score >= found.seconds
        assert all(size > 10**8 for size in found.memory.values())
        assert found.sent >= 0


def test_more_workers_compute_sooner_and_exchange_more() -> None:
    alone, four = cost(Plan(strategy="dp", workers=1)), cost(Plan(strategy="dp", workers=4))
    assert four.terms["compute"] < alone.terms["compute"]
    assert four.terms["exchange"] > alone.terms["exchange"]
    assert (alone.sent, four.sent) == (0, 2 * 3 * 8e6)


def test_zero_saves_memory() -> None:
    sizes = [cost(Plan(strategy="dp", workers=4, zero=zero)).fullest[1] for zero in (0, 1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_slow_link_takes_the_time_that_its_bytes_need() -> None:
    fast = cost(Plan(strategy="dp", workers=2), cluster=apart(2, mbit=10_000))
    slow = cost(Plan(strategy="dp", workers=2), cluster=apart(2, mbit=100))
    (sent,) = slow.links.values()
    assert sent == 8e6  # half of it in each of two rounds
    assert slow.terms["wire"] == pytest.approx(0.64, rel=0.1)
    assert slow.limit == "wire"
    assert fast.terms["wire"] < slow.terms["wire"] / 50


@pytest.mark.parametrize(
    "plan",
    [
        Plan(strategy="dp", workers=2), Plan(strategy="dp", workers=2, zero=3),
        Plan(strategy="dp", workers=2, embeddings="rows"), Plan(strategy="ps", workers=2, servers=1),
        Plan(strategy="ps", workers=2, servers=1, consistency="asp"), Plan(strategy="mp", workers=2, microbatches=2),
        Plan(strategy="ps+dp", workers=2, servers=1), Plan(strategy="ps+mp", workers=2, servers=1, microbatches=2),
    ],
    ids=str,
)  # fmt: skip
def test_roles_that_share_one_of_several_hosts_cost_what_they_do_where_there_is_no_other(plan: Plan) -> None:
    one, three = (cost(each, job=recommender(), cluster=apart(count, cores=4.0, mbit=10.0))
                  for each, count in ((plan, 1), (replace(plan, hosts=(2,)), 3)))  # fmt: skip
    assert three.terms == one.terms
    assert not any(three.links.values())
    assert three.memory == one.memory


def test_hosts_that_stand_still_by_turns_hide_less_of_what_travels() -> None:
    plan = Plan(strategy="dp", workers=3)
    whole, parts = (cost(plan, cluster=apart(3, cores=cores)).terms for cores in (1.0, 0.5))
    assert parts["compute"] > whole["compute"]
    assert parts["wire"] > whole["wire"]


def test_zero_between_hosts_takes_what_its_hooks_take_on_one() -> None:
    plans = [Plan(strategy="dp", workers=2, zero=zero) for zero in (0, 1, 2)]
    none, one, two = (cost(plan, job=profile(elements=20_000), cluster=apart(2)).terms["exchange"] for plan in plans)
    assert two - one == pytest.approx(4e-4 + 3e-10 * 8e4)  # as the curves of two workers
    assert none < one < two


def test_what_is_sent_encoded_crosses_the_link_sooner() -> None:
    plain, coded = (
        cost(Plan(strategy="dp", workers=2, compress=how), cluster=apart(2, mbit=100)) for how in ("none", "int8")
    )
    assert coded.seconds < plain.seconds / 2


@pytest.mark.parametrize(
    "plan",
    [
        Plan(strategy="dp", workers=4, compress="int8"),
        Plan(strategy="ps", workers=4, servers=1),
        Plan(strategy="mp", workers=4, replicas=2, microbatches=4),
        Plan(strategy="ps+dp", workers=4, servers=1),
        Plan(strategy="dp", workers=4, embeddings="rows"),
    ],
)
def test_processors_exchange_as_slowly_as_they_compute(plan: Plan) -> None:
    whole, half, slow = (
        cost(plan, job=recommender(), cluster=apart(4, mbit=1e6, **host)).terms["exchange"]
        for host in ({}, {"cores": 0.5}, {"speed": 0.25})
    )
    assert half == pytest.approx(whole if plan.strategy == "mp" else 2 * whole)
    assert slow == pytest.approx(4 * whole)


@pytest.mark.parametrize("strategy", ["ps", "ps+dp"])
def test_a_server_on_a_host_of_its_own_saves_up_what_it_is_granted(strategy: StrategyName) -> None:
    plan = Plan(strategy=strategy, workers=3, servers=1)
    hosts = apart(4, mbit=1e6).hosts

    def step(cores: float) -> float:
        its = replace(hosts[3], cores=cores)
        return cost(plan, job=recommender(), cluster=Cluster(hosts=(*hosts[:3], its), described=True)).seconds

    assert step(0.5) == pytest.approx(step(1.0))
    assert step(0.01) > 2 * step(1.0)


UPDATES = {key: line(1e-5, 5e-8) for key in profile().compute}  # a hundred times as slow as computing


def test_a_stage_updates_its_own_part_only() -> None:
    layers = [replace(layer, elements=0) for layer in profile().layers]
    layers[0] = replace(layers[0], elements=2_000_000)
    hosts = apart(2, mbit=1e6).hosts
    slow = Cluster(hosts=(hosts[0], replace(hosts[1], cores=0.1)), described=True)
    plan, job = Plan(strategy="mp", workers=2, microbatches=1, cuts=(7,)), profile(layers=tuple(layers), update=UPDATES)
    assert cost(plan, job=job, cluster=slow).seconds < 1.5 * cost(plan, job=job, cluster=apart(2, mbit=1e6)).seconds


@pytest.mark.parametrize(("consistency", "least", "most"), [("asp", 1.0, 4 / 3), ("ssp", 5.0, 10.0)])
def test_asynchronous_updates_come_at_the_pace_of_those_who_make_them(
    consistency: Any, least: float, most: float
) -> None:
    plan = Plan(strategy="ps", workers=4, servers=1, consistency=consistency)
    alike, hosts = apart(4, mbit=1e6), apart(4, mbit=1e6).hosts
    unlike = Cluster(hosts=(*hosts[:3], replace(hosts[3], speed=0.1)), described=True)
    assert least < cost(plan, cluster=unlike).seconds / cost(plan, cluster=alike).seconds <= most


def test_a_stage_that_waits_for_others_does_not_need_all_of_its_core() -> None:
    pipeline, busy, alike = (
        Plan(strategy="mp", workers=2, microbatches=1),
        Plan(strategy="mp", workers=2, microbatches=8),
        Plan(strategy="dp", workers=2),
    )
    whole, part = apart(2, mbit=1e6), apart(2, mbit=1e6, cores=0.7)
    slower = [cost(plan, cluster=part).seconds / cost(plan, cluster=whole).seconds for plan in (pipeline, busy, alike)]
    assert slower[0] == pytest.approx(1)
    assert 1 < slower[1] < slower[2]
    assert slower[2] == pytest.approx(1 / 0.7, rel=0.05)


def test_one_slow_worker_exchanges_for_itself_and_one_slow_server_for_all() -> None:
    plan = Plan(strategy="ps", workers=3, servers=1)
    fast, worker, server = (
        cost(plan, cluster=Cluster(hosts=tuple(
            host for number in range(4) for host in apart(1, mbit=1e6, speed=0.25 if number == slow else 1.0).hosts
        ), described=True)).terms["exchange"]
        for slow in (None, 2, 3)
    )  # fmt: skip
    assert fast < worker < 4 * fast
    assert fast < server < 4 * fast


def test_local_steps_share_one_exchange() -> None:
    each, rarely = (
        cost(Plan(strategy="dp", workers=2, local_steps=steps), cluster=apart(2, mbit=100)) for steps in (1, 16)
    )
    assert rarely.terms["wire"] < each.terms["wire"] / 10
    assert rarely.penalty > 1


def test_equal_shares_wait_for_a_slow_host_and_balanced_ones_do_not() -> None:
    unlike = Cluster(hosts=(*apart(1).hosts, *apart(1, speed=0.25).hosts), described=True)
    equal, balanced = (cost(Plan(strategy="dp", workers=2, balance=on), cluster=unlike) for on in (False, True))
    assert equal.terms["waiting"] > balanced.terms["waiting"] + 0.01
    assert balanced.seconds < equal.seconds


def test_servers_share_what_their_links_carry() -> None:
    one, two = (cost(Plan(strategy="ps", workers=4, servers=servers), cluster=apart(6, mbit=100)) for servers in (1, 2))
    assert one.terms["wire"] == pytest.approx(2 * 4 * 8e6 / LINK, rel=0.01)
    assert two.terms["wire"] == pytest.approx(one.terms["wire"] / 2, rel=0.01)


def test_asynchronous_workers_are_limited_by_the_servers_link() -> None:
    found = [
        cost(Plan(strategy="ps", workers=workers, servers=1, consistency="asp"), cluster=apart(9, mbit=100))
        for workers in (1, 2, 4, 8)
    ]
    assert all(each.seconds >= 8e6 / LINK * 0.99 for each in found)
    assert found[-1].seconds == pytest.approx(8e6 / LINK)  # all else happens meanwhile
    assert found[-1].limit == "wire"
    assert [each.penalty for each in found] == sorted(each.penalty for each in found)


def test_only_rows_that_are_needed_travel() -> None:
    found = cost(Plan(strategy="ps", workers=2, servers=1), job=recommender())
    whole = cost(Plan(strategy="dp", workers=2), job=recommender())
    assert found.sent < whole.sent / 50
    assert found.seconds < whole.seconds / 5


@pytest.mark.parametrize("strategy", ["ps", "ps+dp"])
def test_gradients_of_rows_travel_as_their_table_has_it(strategy: StrategyName) -> None:
    plain, coded, spared, halved = (
        cost(Plan(strategy=strategy, workers=2, servers=1, **how), job=recommender(), cluster=apart(3, mbit=100))
        for how in (
            {}, {"compress": "int8"}, {"compress": "int8", "compress_tables": {"rows": "none"}},
            {"compress_tables": {"rows": "bf16"}},
        )
    )  # fmt: skip
    rows = 2 * 190 * 16 * 4  # of both workers, for half a batch each
    saved = 1 - (1 + 4 / 256) / 4  # a scale for each 256 elements
    assert spared.sent - coded.sent == pytest.approx(
        saved * rows
    )  # of their gradients alone: what is read is as it was
    assert plain.sent - halved.sent == pytest.approx(0.5 * rows)
    assert spared.terms["wire"] - coded.terms["wire"] == pytest.approx(saved * rows / LINK)
    assert coded.terms["exchange"] > spared.terms["exchange"]  # which encoding takes
    assert halved.terms["exchange"] > plain.terms["exchange"]


def test_tables_beside_a_dense_part_cost_its_exchange_and_their_rows() -> None:
    job = recommender()
    for plan in (Plan(strategy="ps+dp", workers=2, servers=1), Plan(strategy="dp", workers=2, embeddings="rows")):
        found = cost(plan, job=job)
        assert found.seconds < cost(Plan(strategy="dp", workers=2), job=job).seconds
    assert isinstance(predicted(Plan(strategy="ps+dp", workers=2, servers=1), ground()), str)  # has no tables


def test_one_table_is_whole_in_one_worker() -> None:
    job, size = recommender(), 1_000_000 * 16 * 4 * 2  # with Adagrad's slot
    rows, tables = (
        cost(Plan(strategy="dp", workers=4, embeddings=how), job=job, cluster=apart(4, mbit=100))
        for how in ("rows", "tables")
    )
    assert tables.memory["worker"] - rows.memory["worker"] == pytest.approx(2 * size * 3 / 4)  # and its copy to save
    read = (
        4 * 100 * 16 * 4
    )  # bytes of rows; of them three quarters leave the worker that has all, and not a quarter of it
    assert tables.terms["wire"] - rows.terms["wire"] == pytest.approx(2 * read * (3 / 4 - 3 / 16) / LINK)
    assert tables.terms["exchange"] > rows.terms["exchange"]


def test_rows_that_are_new_to_a_run_cost_more() -> None:
    long, short = (
        cost(Plan(strategy="ps", workers=2, servers=1), job=replace(recommender(), epochs=epochs)) for epochs in (50, 1)
    )
    assert recommender().new_rows == pytest.approx(32_100 / 350 / 300, rel=0.1)
    assert short.terms["exchange"] > long.terms["exchange"]


def test_a_pipeline_idles_less_with_more_microbatches_until_they_cost_more_than_they_save() -> None:
    found = {
        count: cost(Plan(strategy="mp", workers=4, microbatches=count), job=profile(batch=1.0))
        for count in (1, 4, 16, 64)
    }
    idle = {count: each.terms["waiting"] / each.seconds for count, each in found.items()}
    assert idle[1] > idle[4] > idle[16]
    assert found[64].terms["exchange"] > found[16].terms["exchange"]
    assert set(found[4].memory) == {f"stage {rank}" for rank in range(4)}
    assert found[4].fullest[1] < cost(Plan(strategy="dp", workers=4), job=profile(batch=1.0)).fullest[1] + GB


def test_replicas_of_a_pipeline_share_the_batch() -> None:
    one, two = (
        cost(Plan(strategy="mp", workers=4, microbatches=4, replicas=replicas), job=profile(batch=1.0))
        for replicas in (1, 2)
    )
    assert set(two.memory) == {"stage 0", "stage 1"}
    assert two.terms["waiting"] < one.terms["waiting"]
    assert two.terms["exchange"] > one.terms["exchange"]


def test_a_model_that_was_not_followed_cannot_be_a_pipeline() -> None:
    found = predicted(Plan(strategy="mp", workers=2), ground(profile(layers=(), no_layers="it branches on its data")))
    assert found == "it branches on its data"


def test_shards_of_layers_share_what_is_split_and_exchange_for_it() -> None:
    """Half of each layer is split: two workers save a quarter of the time, and sum eight values of a sample."""
    job = profile(batch=1.0, splitting=Splitting(shares=(0.5,) * 8, sums=(4096.0,) * 8, gathers=()))
    plan = Plan(strategy="mp", workers=2, tensor=2)
    found, alone = cost(plan, job=job), cost(Plan(strategy="dp", workers=1, threads=2), job=job)
    assert found.terms["compute"] == pytest.approx(0.75 * alone.terms["compute"], rel=0.05)
    assert found.terms["exchange"] > 8 * 1e-4
    apart_ = cost(plan, job=job, cluster=apart(2, mbit=100))
    assert apart_.terms["exchange"] > found.terms["exchange"] + 8 * 64 * 4096 / 2 / LINK  # half of each, twice
    assert predicted(plan, ground()) == "no layer of the model can be split among workers"


@pytest.mark.parametrize("measured", [0.5, 0.9])
def test_shards_take_what_steps_of_two_were_measured_to_take(measured: float) -> None:
    """Whole batches and quarters of them; of more shards less where it is arithmetic, and no less of what it is not."""
    steps = Curve((Point(16, measured / 2, 0.0), Point(64, measured, 0.0)))
    job = profile(batch=1.0, splitting=Splitting(shares=(0.5,) * 8, sums=(4096.0,) * 8, gathers=(), steps=steps))
    two, quarters, four = (
        cost(Plan(strategy="mp", workers=tensor, tensor=tensor, microbatches=count, threads=1), job=job)
        for tensor, count in ((2, 1), (2, 4), (4, 1))
    )
    assert two.seconds - two.terms["data"] == pytest.approx(measured)
    assert quarters.seconds - quarters.terms["data"] == pytest.approx(2 * measured, rel=0.05)
    saved = two.terms["compute"] - four.terms["compute"]
    assert saved == pytest.approx(0.5 / 4, rel=0.3)  # of four, which hinder each other a little more
    slow = cost(two.plan, job=job, cluster=apart(2, mbit=1e6, speed=0.5))
    assert slow.terms["compute"] == pytest.approx(2 * two.terms["compute"], rel=0.03)  # of workers that are alone


def test_interleaved_stages_idle_less_and_exchange_more() -> None:
    job = profile(batch=1.0)
    plain, inter = (
        cost(Plan(strategy="mp", workers=4, microbatches=4, **more), job=job)
        for more in ({}, {"schedule": "interleaved", "chunks": 2})
    )
    assert inter.terms["waiting"] < plain.terms["waiting"]
    assert inter.terms["exchange"] > plain.terms["exchange"]
    assert "16 stages at most" not in str(predicted(Plan(strategy="mp", workers=4, schedule="interleaved"), ground()))
    assert "cut into 8 stages at most" in str(
        predicted(Plan(strategy="mp", workers=8, schedule="interleaved"), ground(cluster=apart(8)))
    )


def test_replicas_on_other_hosts_send_their_gradients_over_the_links() -> None:
    one, four = (
        cost(Plan(strategy="mp", workers=4, replicas=replicas, microbatches=4), cluster=apart(4, mbit=100))
        for replicas in (1, 2)
    )
    assert four.terms["wire"] > 4e6 / LINK > one.terms["wire"]  # half of the model, of which half leaves twice
    assert sum(four.links.values()) > 4e6


def test_asynchronous_workers_overlap_with_the_server_and_never_beat_it() -> None:
    job = profile(elements=20_000, batch=1.0)
    few, many = (
        cost(Plan(strategy="ps", workers=m, servers=1, consistency="asp"), job=job, cluster=apart(m + 1, mbit=1e5))
        for m in (2, 8)
    )
    assert few.seconds == pytest.approx(1.0 / 2, rel=0.02)
    assert many.seconds == pytest.approx(1.0 / 8, rel=0.05)


def test_a_bound_on_staleness_costs_where_hosts_are_unlike() -> None:
    unlike = Cluster(hosts=(*apart(3).hosts, *apart(1, speed=0.25).hosts), described=True)
    ssp, asp = (
        cost(Plan(strategy="ps", workers=4, servers=1, consistency=how), job=profile(batch=1.0), cluster=unlike)
        for how in ("ssp", "asp")
    )
    assert ssp.seconds > 2 * asp.seconds


def test_stalls_and_failures_that_the_file_states_count() -> None:
    plan = Plan(strategy="dp", workers=4)
    calm, stalling, failing = (
        cost(plan, cluster=apart(4, **host)) for host in ({}, {"stalls": 0.1}, {"failures_per_day": 100.0})
    )
    assert stalling.terms["waiting"] > calm.terms["waiting"] + 0.3 * 4 * 0.02 * 0.9
    assert failing.seconds == calm.seconds
    assert failing.lost == pytest.approx(4 * 100 * 13 / 86400)
    assert failing.score == pytest.approx(calm.score / (1 - failing.lost))
    rolled = cost(Plan(strategy="dp", workers=4, zero=1), cluster=apart(4, failures_per_day=100.0))
    assert rolled.lost == pytest.approx(4 * 100 * 28 / 86400)


def test_planning_for_many_hosts_takes_no_longer_than_one_waits() -> None:
    began = time.process_time()
    found = search(ground(recommender(), apart(64, mbit=10_000)), can_run, {}, approximate=False)
    assert time.process_time() - began < 5
    assert max(prediction.plan.workers for prediction in found.ranked) == 64


@pytest.mark.parametrize("plan", [
    Plan(strategy="mp", workers=2, microbatches=4),
    Plan(strategy="mp", workers=4, replicas=2, microbatches=2),
    Plan(strategy="mp", workers=2, schedule="interleaved", chunks=2, microbatches=4),
    Plan(strategy="ps+mp", workers=2, servers=1, microbatches=2),
])  # fmt: skip
def test_what_is_predicted_of_a_pipeline_is_of_the_cuts_that_it_says(plan: Plan) -> None:
    found = cost(plan, job=recommender(), cluster=apart(4))
    assert len(found.plan.cuts or ()) == plan.stages * (plan.chunks or 1) - 1
    assert cost(found.plan, job=recommender(), cluster=apart(4)) == found


@pytest.mark.parametrize("cuts", [(1, 2), (99,)])
def test_cuts_that_are_none_of_the_models_are_refused(cuts: tuple[int, ...]) -> None:
    plan = Plan(strategy="mp", workers=2, cuts=cuts)
    assert "cannot be cut into 2 stages before" in str(predicted(plan, ground()))
