import pytest

from tricorn.planner.profile import TableUse

from .world import links, profile, recommender


def test_the_ids_of_a_batch_grow_as_sampled_and_never_beyond_the_table() -> None:
    table = TableUse(name="t", rows=400, dim=8, unique=((16, 100.0), (64, 340.0)))
    assert [table.ids(samples) for samples in (0, 8, 16, 40, 64)] == [0, 50, 100, 220, 340]
    assert table.ids(1000) == 400


def test_a_crowd_that_was_measured_is_taken_as_it_was() -> None:
    job = profile()
    alone, _ = job.computing(1, 1, 64)
    crowded, _ = job.computing(4, 1, 64)
    assert alone == pytest.approx(0.08)
    assert crowded > alone


def test_more_workers_than_cores_share_their_time() -> None:
    job = profile()
    assert job.computing(8, 1, 16)[0] == pytest.approx(2 * job.computing(4, 1, 16)[0])


def test_fewer_samples_than_measured_take_no_less_than_their_share() -> None:
    job = profile()
    least, one = job.computing(4, 1, 4)[0], job.computing(4, 1, 1)[0]
    assert least / 4 <= one < least


def test_rows_from_servers_have_curves_of_their_own() -> None:
    job = recommender()
    assert job.computing(2, 2, 32, served=True)[0] < job.computing(2, 2, 32)[0]
    assert profile().computing(2, 2, 32, served=True) == profile().computing(2, 2, 32)


def test_what_was_not_measured_is_not_known() -> None:
    with pytest.raises(KeyError, match="computing"):
        profile(compute={}).computing(1, 1, 64)


def test_links_of_more_ranks_than_measured_go_on_growing() -> None:
    known = links()
    two, four, eight = (known.seconds("exchange/dp", count, 1e6) for count in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two))
    with pytest.raises(KeyError):
        known.seconds("exchange/nothing", 2, 1e6)
