"""Saving beside the training: durable before it is told, and a disk that will not take it is told of."""

from __future__ import annotations

import hashlib
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tricorn.control import messages as m
from tricorn.control.checkpoints import folder_of
from tricorn.errors import StorageError
from tricorn.state import shards
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.worker.saver import Saver

WEIGHTS = torch.arange(5000, dtype=torch.float32)
PIECES = [Piece("param/w", (50, 100), 0, 5000, WEIGHTS)]


class Saving:
    """A saver, with what it told and what it failed with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.told: list[m.Report] = []
        self.failures: list[Exception] = []
        self.saver = Saver("worker-1", root, self.told.append, self.failures.append)

    def save(self, step: int, pieces: list[Piece]) -> None:
        self.saver.save(2, step, pieces)
        self.saver.wait()


@pytest.fixture
def saving(tmp_path: Path) -> Saving:
    return Saving(tmp_path / "checkpoints")


def test_what_it_tells_is_what_is_there(saving):
    saving.save(7, PIECES)
    ((told,), failures) = saving.told, saving.failures
    assert failures == []
    assert (told.epoch, told.step) == (2, 7)
    (file,) = told.files
    folder = folder_of(saving.root, 7)
    content = (folder / file.name).read_bytes()
    assert (file.name, file.bytes) == ("worker-1.safetensors", len(content))
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert torch.equal(CheckpointReader(folder, 7).read("param/w", 0, 5000), WEIGHTS)
    assert m.Decoder(m.Report)(m.encode(told)[m.HEADER.size :]) == told


def test_a_role_without_a_part_says_so(saving):
    saving.save(7, [])
    assert saving.told == [m.Saved(epoch=2, step=7, files=[])]
    assert not saving.root.exists()


def savers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "saver"]


def test_later_ones_queue_behind_the_first_and_nobody_waits(saving, monkeypatch):
    go_on, begun = threading.Event(), threading.Event()

    def slowly(*args):
        begun.set()
        assert go_on.wait(10)
        return shards.write_shard(*args)

    monkeypatch.setattr("tricorn.worker.saver.write_shard", slowly)
    saving.saver.save(2, 1, PIECES)
    assert begun.wait(10)  # while the caller is already here
    folder_of(saving.root, 3).parent.mkdir(parents=True)
    folder_of(saving.root, 3).write_text("a file is in its place")
    for step in (2, 3, 4):
        saving.saver.save(2, step, PIECES)
    assert (saving.told, len(savers())) == ([], 1)
    go_on.set()
    saving.saver.wait()
    assert [told.step for told in saving.told] == [1, 2, 4]
    assert len(saving.failures) == 1
    assert savers() == []


def test_no_save_is_lost_between_two_lives_of_the_thread(saving):
    for step in range(200):
        saving.saver.save(2, step, [])
        if step % 7 == 0:
            saving.saver.wait()
            assert len(saving.told) == step + 1
    saving.saver.wait()
    assert [told.step for told in saving.told] == list(range(200))
    assert savers() == []


def assert_nothing_is_left(saving: Saving, why: str) -> None:
    (failure,) = saving.failures
    assert isinstance(failure, StorageError)
    assert str(folder_of(saving.root, 7)) in str(failure)
    assert why in str(failure)
    assert "Free space" in failure.remedy
    assert saving.told == []
    assert not list(saving.root.rglob("*.safetensors*"))


def test_a_full_disk(saving):
    folder = folder_of(saving.root, 7)
    folder.mkdir(parents=True)
    (folder / "worker-1.safetensors.partial").symlink_to("/dev/full")
    saving.save(7, PIECES)
    assert_nothing_is_left(saving, "No space left on device")


@pytest.fixture
def files_end_at_8192_bytes() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("files_end_at_8192_bytes")
def test_a_disk_that_takes_only_a_part(saving):
    saving.save(7, PIECES)
    assert_nothing_is_left(saving, "File too large")


def test_a_folder_that_cannot_be_made(saving):
    saving.root.write_text("a file is in its place")
    saving.save(7, PIECES)
    assert_nothing_is_left(saving, "Not a directory")


def test_an_older_checkpoint_outlives_a_newer_that_fails(saving):
    saving.save(6, PIECES)
    folder_of(saving.root, 7).write_text("a file is in its place")
    saving.save(7, PIECES)
    assert [told.step for told in saving.told] == [6]
    assert len(saving.failures) == 1
    assert torch.equal(CheckpointReader(folder_of(saving.root, 6), 6).read("param/w", 0, 5000), WEIGHTS)


def test_whatever_else_goes_wrong_is_told_too(saving):
    """Otherwise the run would wait for this part for ever."""
    nowhere = Piece("param/w", (4,), 0, 4, torch.empty(4, device="meta"))
    saving.save(7, [nowhere])
    (failure,) = saving.failures
    assert "meta" in str(failure)
    assert saving.told == []
