from __future__ import annotations

import os
import signal

import msgspec
import numpy as np
import pytest

from tricorn.comm.segment import MAX_SIZE, Segment, here
from tricorn.errors import ClusterError, PeerLost


def test_two_processes_see_the_same_memory() -> None:
    segment = Segment.create(1 << 16, "test")
    child = os.fork()
    if child == 0:
        Segment.attach(segment.ticket).array(np.int64, 64, 3)[:] = [1, 2, 3]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert segment.array(np.int64, 64, 3).tolist() == [1, 2, 3]
    segment.close()
    segment.close()


def test_a_huge_one_costs_nothing_until_it_is_touched() -> None:
    segment = Segment.create(1 << 42, "huge")
    segment.memory[1 << 41] = 7
    assert os.fstat(segment.ticket.fd).st_blocks * 512 <= 1 << 22
    segment.close()


def test_it_cannot_be_shrunk_under_its_readers() -> None:
    segment = Segment.create(4096, "sealed")
    with pytest.raises(PermissionError):
        os.ftruncate(segment.ticket.fd, 100)
    segment.close()


def test_a_ticket_is_small() -> None:
    segment = Segment.create(4096, "ticket")
    assert len(msgspec.json.encode(segment.ticket)) < 200
    segment.close()


def test_nothing_is_left_of_a_killed_creator() -> None:
    before = set(os.listdir("/dev/shm"))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, msgspec.json.encode(Segment.create(4096, "doomed").ticket))
        signal.pause()
    from tricorn.comm.segment import Ticket

    ticket = msgspec.json.decode(os.read(read, 4096), type=Ticket)
    mine = Segment.attach(ticket)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    mine.memory[0] = 1  # still there for who has it
    mine.close()
    assert set(os.listdir("/dev/shm")) == before
    with pytest.raises(PeerLost, match="is gone"):
        Segment.attach(ticket)


def test_another_host_and_another_file_are_refused() -> None:
    segment = Segment.create(4096, "mine")
    with pytest.raises(ClusterError, match="another host"):
        Segment.attach(msgspec.structs.replace(segment.ticket, host="elsewhere"))
    with pytest.raises(PeerLost, match="no longer holds"):
        Segment.attach(msgspec.structs.replace(segment.ticket, inode=segment.ticket.inode + 1))
    with pytest.raises(PeerLost, match="no longer holds"):
        Segment.attach(msgspec.structs.replace(segment.ticket, size=1 << 20))
    segment.close()


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1])
def test_sizes_are_bounded(size: int) -> None:
    with pytest.raises(ValueError, match="1 to"):
        Segment.create(size, "size")


def test_a_host_has_one_name() -> None:
    assert here() == here()
    assert len(here().split(":")) == 3
