"""Checkpoints: what is not whole is named and passed over, and nothing outside the folder is ever looked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tricorn.control.checkpoints import (
    KEPT,
    Manifest,
    damage,
    folder_of,
    load_manifest,
    newest_whole,
    publish,
    published,
)
from tricorn.control.messages import File
from tricorn.errors import CheckpointDamaged

SHARDS = ("worker-0.safetensors", "worker-1.safetensors")


def shard(folder: Path, name: str, content: bytes) -> File:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return File(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def make(root: Path, step: int, applied: list[tuple[int, int]] | None = None) -> Path:
    folder = folder_of(root, step)
    files = [shard(folder, name, f"{name} of step {step}".encode()) for name in SHARDS]
    publish(root, Manifest(step=step, applied=applied or [(0, step)], files=files))
    return folder


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return make(tmp_path, 10)


@pytest.fixture
def newer(older: Path) -> Path:
    return make(older.parent, 120, [(0, 100), (110, 130)])


def test_the_newest_is_found_with_what_it_holds(newer):
    assert newest_whole(newer.parent) == (newer, [])
    manifest = load_manifest(newer)
    assert (manifest.step, manifest.applied) == (120, [(0, 100), (110, 130)])
    assert [file.name for file in manifest.files] == list(SHARDS)


def test_there_is_none(tmp_path):
    assert newest_whole(tmp_path / "checkpoints") == (None, [])


def test_without_a_manifest_it_is_none(older):
    shard(folder_of(older.parent, 50), SHARDS[0], b"written, but its run ended before all were")
    assert newest_whole(older.parent) == (older, [])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def removed(path: Path) -> None:
    path.unlink()


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [*SHARDS, "manifest.json"])
@pytest.mark.parametrize("harm", [emptied, shortened, lengthened, removed, replaced_by_a_folder])
def test_a_damaged_file_is_named_and_the_previous_checkpoint_chosen(
    older: Path, newer: Path, harm: Callable[[Path], None], name: str
):
    harm(newer / name)
    found, damages = newest_whole(newer.parent)
    assert found == older
    if (harm, name) == (removed, "manifest.json"):
        assert damages == []  # then it never was one
    else:
        (problem,) = damages
        assert str(newer / name) in problem


def test_any_bit_that_flips_is_seen(older, newer):
    for name in (*SHARDS, "manifest.json"):
        path = newer / name
        whole = path.read_bytes()
        for place in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert str(newer) in damage(newer), f"bit {place} of {name}"
        path.write_bytes(whole)
    assert newest_whole(newer.parent) == (newer, [])


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "..", ".", "", "a/b.safetensors", "worker-0.safetensors\n"]
)
def test_a_manifest_cannot_name_what_lies_outside_its_folder(older, newer, name):
    (newer.parent / "secret").write_bytes(b"secret")
    manifest = json.loads((newer / "manifest.json").read_text())
    manifest["files"][0] = {"name": name, "bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (newer / "manifest.json").write_text(json.dumps(manifest))
    found, (problem,) = newest_whole(newer.parent)
    assert found == older
    assert problem.startswith(f"{newer}/manifest.json cannot be read")
    assert "$.files[0].name" in problem


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": 11}, {"step": 10**30}, {"applied": [[0, 2**62]]}, {"applied": [[5, 130]]}, {"more": 1}],
)
def test_a_manifest_that_contradicts_itself_or_its_folder_is_damaged(newer, change):
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(manifest | change))
    assert str(newer / "manifest.json") in damage(newer)


def test_only_the_newest_are_kept(tmp_path):
    folders = [make(tmp_path, step) for step in (5, 10, 15, 1_000_000_000)]
    assert published(tmp_path) == folders[::-1][:KEPT]
    assert sorted(tmp_path.iterdir()) == sorted(folders[-KEPT:])


def test_one_that_the_run_went_back_behind_takes_no_place(tmp_path):
    folders = [make(tmp_path, step) for step in (100, 200)]
    emptied(folders[1] / SHARDS[0])
    again = make(tmp_path, 150)
    assert published(tmp_path) == [again, folders[0]]


def test_a_folder_of_somebody_else_is_left_alone(newer):
    copies = [newer.rename(newer.parent / "000000120 copy"), newer.parent / "old"]
    copies[1].mkdir()
    (copies[1] / "manifest.json").write_text("{}")
    folders = [make(newer.parent, step) for step in (130, 140)]
    assert published(newer.parent) == folders[::-1]
    assert all((copy / "manifest.json").exists() for copy in copies)


def test_shards_that_no_manifest_names_are_not_left_to_be_read(tmp_path):
    folder = folder_of(tmp_path, 7)
    for stale in ("worker-9.safetensors", "server-0.safetensors.partial"):
        shard(folder, stale, b"of a role that died, under another plan")
    make(tmp_path, 7)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *SHARDS]


def test_a_disk_that_will_not_take_the_manifest_leaves_none(older, tmp_path):
    folder = folder_of(tmp_path, 20)
    files = [shard(folder, SHARDS[0], b"content")]
    (folder / "manifest.json").mkdir()
    with pytest.raises(OSError, match="manifest"):
        publish(tmp_path, Manifest(step=20, applied=[(0, 20)], files=files))
    assert not (folder / "manifest.json.partial").exists()
    found, _ = newest_whole(tmp_path)
    assert found == older
    with pytest.raises(FileNotFoundError):
        publish(tmp_path, Manifest(step=30, applied=[(0, 30)], files=[]))


def test_a_manifest_that_is_damaged_meanwhile(newer):
    (newer / "manifest.json").write_bytes(b'{"step": "\xff"}')
    with pytest.raises(CheckpointDamaged, match="cannot be read"):
        load_manifest(newer)
