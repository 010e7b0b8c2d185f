from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.errors import UsageError
from tricorn.planner.cluster import Cluster, here, read

from .world import GB, apart

GOOD = """
[[host]]
name = "big"
cores = 8
memory = "16 GB"
mbit = 25000

[[host]]
count = 3
cores = 0.5
speed = 0.25
memory = 4000000000
mbit = 100
latency_ms = 2
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_a_file_lists_hosts(tmp_path: Path) -> None:
    cluster = read(written(tmp_path, GOOD))
    assert [host.name for host in cluster.hosts] == ["big", "host2-0", "host2-1", "host2-2"]
    assert cluster.hosts[0].memory == 16 * 10**9
    assert (cluster.hosts[1].cores, cluster.hosts[1].speed, cluster.hosts[1].latency) == (0.5, 0.25, 0.002)
    assert cluster.hosts[1].bytes_per_second == pytest.approx(12.5e6 / 1.068, rel=1e-3)
    assert cluster.described
    assert cluster.place(5, 2) == ([0, 1, 2, 3, 0], [1, 2])


def test_roles_are_placed_on_the_hosts_that_a_plan_names() -> None:
    cluster = apart(4)
    assert cluster.place(3, 2, (2, 0)) == ([2, 0, 2], [0, 2])
    with pytest.raises(ValueError, match="and there are 4"):
        cluster.place(1, 0, (4,))


def test_workers_go_where_computing_is_the_fastest_and_servers_where_links_are() -> None:
    slow, fast, near = (apart(1, **its).hosts[0] for its in ({"speed": 0.25}, {}, {"speed": 0.25, "mbit": 10_000.0}))
    assert Cluster(hosts=(fast,) * 3).orders(2, 1) == [None]
    assert Cluster(hosts=(fast, fast, slow)).orders(2, 0) == [None]
    assert Cluster(hosts=(slow, fast, fast)).orders(2, 0) == [None, (1, 2)]
    assert Cluster(hosts=(slow, fast, fast)).orders(3, 0) == [None, (1, 2, 0)]
    assert Cluster(hosts=(slow, fast, near, fast)).orders(2, 1) == [None, (1, 3, 2), (2, 1, 3)]
    assert Cluster(hosts=(slow, fast, near, fast)).orders(2, 0) == [None, (1, 3), (2, 1)]
    linked = msgspec.structs.replace(fast, mbit=10_000.0)
    assert (1, 2, 0) in Cluster(hosts=(linked, fast, fast)).orders(2, 1)  # the server where the link is
    large = msgspec.structs.replace(slow, memory=64 * GB)
    assert (1,) in Cluster(hosts=(fast, large)).orders(1, 0)
    nearly = msgspec.structs.replace(fast, speed=0.8), fast
    assert Cluster(hosts=nearly).orders(1, 0) == [None, (1,)]
    assert Cluster(hosts=nearly, present=True).orders(1, 0) == [None]  # no faster than from one moment to another
    assert [Cluster(hosts=(slow, *nearly), present=present).fastest for present in (False, True)] == [1, 2]


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(1, 1e5)), min_size=1, max_size=7), st.data())
def test_orders_are_of_hosts_that_there_are(kinds: list[tuple[float, float]], data: st.DataObject) -> None:
    cluster = Cluster(hosts=tuple(apart(1, speed=speed, mbit=mbit).hosts[0] for speed, mbit in kinds))
    workers, servers = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    for order in cluster.orders(workers, servers):
        used = order or range(len(kinds))
        assert len({*used}) == len(used)
        assert {*used} <= {*range(len(kinds))}
        assert len(used) == min(len(kinds), workers + servers) or order is None
    fastest = sorted(range(len(kinds)), key=lambda host: -kinds[host][0])[:workers]
    tried = [cluster.place(workers, servers, order)[0] for order in cluster.orders(workers, servers)]
    assert sorted(kinds[host][0] for host in fastest) in [sorted(kinds[host][0] for host in {*some}) for some in tried]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no [[host]]"),
        ("[host]\ncores = 1", "two brackets"),
        ("[[host]]\ncores = 1", "memory is missing"),
        ("[[host]]\nmemory = 5", "cores is missing"),
        ("[[host]]\ncores = 0\nmemory = 5", "cores is 0.0; give a number above 0"),
        ("[[host]]\ncores = 'two'\nmemory = 5", "cores is 'two'"),
        ("[[host]]\ncores = 1\nmemory = '5 elephants'", "5 elephants"),
        ("[[host]]\ncores = 1\nmemory = -5", "memory is -5"),
        ("[[host]]\ncores = 1\nmemory = 5\ncount = 1.5", "whole number"),
        ("[[host]]\ncores = 1\nmemory = 5\nmbit = inf", "mbit is inf"),
        ("[[host]]\ncores = 1\nmemory = 5\nlatency_ms = -1", "at least 0"),
        ("[[host]]\ncores = 1\nmemory = 5\nname = 7", "give a text"),
        ("[[host]]\ncores = 1\nmemory = 5\ngpus = 2", "GPUs cannot be planned for"),
        ("[[host]]\ncount = 2\ncores = 1\nmemory = 5", "mbit is missing"),
        ("[[host]]\ncores = 1\nmemory = 5\nstalls = 1.5", "a share of the steps"),
        ("[[host]]\ncores = 1\nmemory = 5\nstall_times = 0.5", "at least 1"),
        ("[[host]]\ncores = 1\nmemory = 5\nfailures_per_day = -1", "failures_per_day is -1"),
        ("[[hots]]\ncores = 1", "'hots' is not known"),
        ("cores = = 2", "is not TOML"),
        ("[[host]]\ncores = 1\nmemory = 5\ncount = 20000", "up to 10000"),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(written(tmp_path, text))
    assert said in str(caught.value).replace("cores is 0;", "cores is 0.0;")
    assert caught.value.remedy


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(written(tmp_path, "[[host]]\nspeed = 0\n[[host]]\ncores = 1\nmemory = 'x'"))
    assert str(caught.value).count("\n  - ") == 6


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "nowhere.toml")


def test_this_machine_has_cores_and_memory() -> None:
    (host,) = here().hosts
    assert host.cores >= 1
    assert host.memory > 10**8
    assert not here().described
