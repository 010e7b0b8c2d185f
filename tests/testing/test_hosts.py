"""Hosts with real limits and real faults, and nothing left of them."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tricorn.errors import ClusterError, UsageError
from tricorn.testing.cgroup import Cgroup, hierarchies
from tricorn.testing.hosts import Host, RunningHost, hosts, hosts_unavailable
from tricorn.testing.network import NAMESPACES

ECHO = """
import socket
with socket.create_server(("{}", 9000)) as server:
    print("up", flush=True)
    peer, _ = server.accept()
    while data := peer.recv(1 << 16):
        peer.sendall(data)
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[RunningHost, RunningHost]]:
    if reason := hosts_unavailable():
        pytest.skip(reason)
    with hosts(Host(mbit=50), Host(mbit=50, cores=0.25, memory_mb=64)) as made:
        yield made


@pytest.fixture
def called(pair) -> Iterator[socket.socket]:
    """A line from this machine to a program on the second host that answers with what it is sent."""
    host = pair[1]
    program = host.start([sys.executable, "-c", ECHO.format(host.address)], stdout=subprocess.PIPE)
    with program, socket.socket() as sock:
        assert program.stdout.readline() == b"up\n"
        sock.connect((host.address, 9000))
        sock.settimeout(20)
        yield sock
        sock.shutdown(socket.SHUT_WR)


def answers(sock: socket.socket, patience: float) -> bool:
    return bool(select.select([sock], [], [], patience)[0]) and sock.recv(100) == b"hello"


def test_a_link_carries_no_more_than_its_speed_and_counts_what_it_carries(pair, called):
    before, begun = pair[1].traffic(), time.monotonic()
    size, arrived = 1_000_000, 0
    called.setblocking(False)
    unsent = memoryview(bytes(size))
    while arrived < size:
        readable, writable, _ = select.select([called], [called] if unsent else [], [], 20)
        if writable:
            unsent = unsent[called.send(unsent) :]
        if readable:
            arrived += len(called.recv(1 << 16))
    seconds = time.monotonic() - begun
    after = pair[1].traffic()
    called.setblocking(True)
    assert seconds > 8 * size / 50e6 * 0.9  # each way at once
    for crossed in (after.sent - before.sent, after.received - before.received):
        assert size < crossed < 1.2 * size


def test_a_slow_host_computes_at_its_share(pair):
    spin = (
        "import time; end = time.monotonic() + 0.5\nwhile time.monotonic() < end: pass\n"
        "print(time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID))"
    )
    fast, slow = (float(host.run([sys.executable, "-S", "-c", spin], stdout=-1, check=True).stdout) for host in pair)
    assert slow < 0.25 * 0.5 * 1.4
    assert fast > slow


def test_a_small_host_kills_who_takes_too_much_memory(pair):
    assert pair[1].run([sys.executable, "-c", "bytearray(100 << 20)"]).returncode == -signal.SIGKILL


def test_a_frozen_host_answers_when_it_is_thawed(pair, called):
    called.sendall(b"hello")
    assert answers(called, 20)
    pair[1].freeze()
    called.sendall(b"hello")
    assert not answers(called, 0.05)
    pair[1].thaw()
    assert answers(called, 20)


def test_a_cut_link_carries_nothing_until_it_is_joined(pair, called):
    pair[1].cut()
    called.sendall(b"hello")
    assert not answers(called, 0.05)
    pair[1].join()
    assert answers(called, 20)


def test_hosts_reach_each_other_and_not_what_listens_on_this_machine_alone(pair):
    a, b = pair
    with socket.create_server(("127.0.0.1", 0)) as own:
        call = f"import socket; socket.create_connection(('127.0.0.1', {own.getsockname()[1]}), 5)"
        assert a.run([sys.executable, "-c", call], stderr=subprocess.DEVNULL).returncode != 0
    serve = (
        f"import socket; s = socket.create_server(('{b.address}', 9000)); print(flush=True); s.accept()[0].send(b'ok')"
    )
    call = f"import socket; print(socket.create_connection(('{b.address}', 9000), 5).recv(2).decode())"
    with b.start([sys.executable, "-c", serve], stdout=subprocess.PIPE) as server:
        server.stdout.readline()
        assert a.run([sys.executable, "-c", call], stdout=subprocess.PIPE, check=True).stdout == b"ok\n"


def test_nothing_is_left_even_of_frozen_processes_when_the_body_raises(pair):
    before = remains()
    processes: list[subprocess.Popen[bytes]] = []

    def body(a: RunningHost, b: RunningHost) -> None:
        for host in (a, b):
            processes.append(host.start([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1))
            processes[-1].stdout.readline()
            assert host.pids() == [processes[-1].pid]
        b.freeze()
        assert len(remains()) > len(before)
        raise RuntimeError("of the body")

    with pytest.raises(RuntimeError, match="of the body"), hosts(Host(), Host()) as made:
        body(*made)
    for process in processes:
        with process:
            assert process.wait(5) == -signal.SIGKILL
    assert remains() == before


def test_the_remains_of_one_that_was_killed_are_swept_by_the_next(pair):
    own = remains()
    leave = (
        "import os, signal; from tricorn.testing.hosts import *\n"
        "with hosts(Host(mbit=1)) as (host,):\n"
        "    sleeper = host.start(['sh', '-c', 'echo; exec sleep 60 >&-'], stdout=-1)\n"
        "    sleeper.stdout.readline(); print(sleeper.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", leave], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert remains() > own
    left = psutil.Process(int(done.stdout))
    with hosts(Host()):
        pass
    assert remains() == own
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("wrong", [{"mbit": 0}, {"cores": -1.0}, {"memory_mb": 0}, {"mbit": float("nan")}])
def test_a_host_without_anything(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Host(**wrong)


def test_no_hosts():
    with pytest.raises(UsageError, match="0 hosts"), hosts():
        pass


def test_a_machine_without_the_tools_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "there is no 'ip'" in hosts_unavailable.__wrapped__()


def test_a_place_where_no_control_group_can_be_made(tmp_path):
    with pytest.raises(ClusterError, match="no control group can be made"):
        Cgroup("anything", tmp_path).open(cores=1, memory=None)


def test_the_files_of_version_2(tmp_path):
    """That kernel interface is plain files; which are written, and with what, is all that can be wrong."""
    (tmp_path / "cgroup.controllers").touch()
    group = Cgroup("group", tmp_path)
    group.open(cores=0.5, memory=1 << 20)
    (folder,) = group.folders
    (folder / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    group.freeze()
    written = {file.name: file.read_text() for file in folder.iterdir()}
    assert written == {
        "cpu.max": "10000 20000", "memory.max": "1048576", "memory.swap.max": "0", "cgroup.freeze": "1",
        "cgroup.events": "populated 1\nfrozen 1\n",
    }  # fmt: skip
    group.thaw()
    assert (folder / "cgroup.freeze").read_text() == "0"


def remains() -> set[Path]:
    """Every trace of hosts on this machine."""
    places = (NAMESPACES, Path("/sys/class/net"), *hierarchies())
    return {path for place in places for path in place.glob("tricorn*") if re.fullmatch(r"tricorn\d+.*", path.name)}
