"""How many cores a process may use: of those that it may run on, as many as its control groups' quotas come to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tricorn.state import cores

ALL = len(os.sched_getaffinity(0))


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "usable"), [("max 100000", ALL), ("100000 100000", 1), ("20000 100000", 1), ("9900000 100000", ALL)]
)
def test_a_quota_of_version_2(tmp_path: Path, quota: str, usable: int) -> None:
    files = {"sys/fs/cgroup/cgroup.controllers": "cpu memory", "sys/fs/cgroup/box/cpu.max": quota}
    assert cores.usable(machine(tmp_path, "0::/box/job\n", files)) == usable


@pytest.mark.parametrize(("quota", "usable"), [("-1", ALL), ("100000", 1)])
def test_a_quota_of_version_1(tmp_path: Path, quota: str, usable: int) -> None:
    folder = "sys/fs/cgroup/cpu/box"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    assert cores.usable(machine(tmp_path, "3:cpu,cpuacct:/box\n", files)) == usable


def test_without_control_groups(tmp_path: Path) -> None:
    assert cores.usable(tmp_path) == ALL
