"""Limits on memory as the system tells them, and models made in files."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from tricorn.errors import StorageError
from tricorn.state import build, memory


@pytest.fixture(autouse=True)
def _allowed():
    yield
    memory.allow(None, 1)


def files(root, tree):
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = {
    "proc/self/cgroup": "5:devices:/\n4:memory:/a/b\n0::/\n",
    "proc/meminfo": "MemTotal:     1000 kB\nMemFree: 10 kB\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "600000",
    "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "800000",
    "sys/fs/cgroup/memory/a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
}
V2 = {
    "proc/self/cgroup": "0::/a\n",
    "sys/fs/cgroup/cgroup.controllers": "memory",
    "sys/fs/cgroup/a/memory.max": "700000",
    "sys/fs/cgroup/memory.max": "max",
    "sys/fs/cgroup/a/memory.events": "low 0\noom 2\noom_kill 1\n",
}


def test_the_tightest_limit_around_counts(tmp_path):
    assert memory.limit_bytes(files(tmp_path / "1", V1)) == 600_000
    assert memory.limit_bytes(files(tmp_path / "2", V2)) == 700_000
    assert memory.limit_bytes(files(tmp_path / "3", {"proc/meminfo": "MemTotal: 1000 kB\n"})) == 1_024_000
    assert memory.limit_bytes(tmp_path / "4") is None


def test_a_limit_of_all_is_shared_and_one_of_each_is_not(tmp_path):
    root = files(tmp_path, V1)
    memory.allow(None, 3)
    assert memory.limit_bytes(root) == 200_000
    memory.allow(150_000, 3)
    assert memory.limit_bytes(root) == 150_000


def test_the_limit_of_the_process_counts(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, hard))
    try:
        assert memory.limit_bytes(tmp_path) == 1 << 40
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_deaths_for_want_of_memory_are_counted(tmp_path):
    assert memory.killed_for_memory(files(tmp_path / "1", V1)) == 3
    assert memory.killed_for_memory(files(tmp_path / "2", V2)) == 1
    assert memory.killed_for_memory(tmp_path / "3") is None


def test_what_a_process_has():
    assert 0 < memory.resident_bytes() <= memory.peak_bytes()
    whole = memory.own_bytes()
    memory.allow(None, 2)
    assert abs(memory.own_bytes() - whole // 2) < 50e6


def model():
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600), nn.Embedding(5000, 64))
    with torch.no_grad():
        layers[0].weight.mul_(2.0)
        layers[3].weight[7] = 0.0
    layers[2].weight = nn.Parameter(torch.randn(600, 600) * 0.1)
    return layers.double()


def test_a_model_made_in_files_is_the_same_bit_for_bit():
    plain = model()
    with build.sparing(0):
        spared = model()
    assert len(build._files) >= 3
    build.release()
    for ours, theirs in zip(spared.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    del spared, ours
    assert len(build._files) == 0


def test_small_models_are_made_in_memory():
    with build.sparing(1 << 40):
        model()
    assert len(build._files) == 0


def test_no_room_for_the_files_is_said(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.os, "posix_fallocate", full)
    with (
        pytest.raises(StorageError, match="does not fit the memory, and its 1 MB of weights not the disk"),
        build.sparing(0),
    ):
        nn.Linear(600, 600)


def test_nothing_is_filled_on_the_meta_device():
    with build.sparing(0):
        layer = nn.Embedding(10, 4, device="meta")
    assert layer.weight.is_meta


def test_malloc_is_told_to_take_places_again_and_the_users_own_word_counts_more() -> None:
    found = memory.reusing({"PATH": "/bin", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"})
    assert found["PATH"] == "/bin"
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0:glibc.malloc.tcache_count=3"
    assert memory.reusing({})["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0"
