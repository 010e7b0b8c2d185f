"""Shards on disk: durable or absent, hashed, and put together from any slices."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tricorn.errors import CheckpointDamaged, UsageError
from tricorn.state.shards import CheckpointReader, Piece, write_shard

WHOLE = torch.arange(40, dtype=torch.float64)


def piece(key: str, start: int, stop: int) -> Piece:
    return Piece(key, (40,), start, stop, WHOLE[start:stop].clone())


def test_a_shard_is_recorded_as_it_lies_on_disk(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "new" / "folder", "a.safetensors", [piece("param/w", 0, 40)])
    content = (tmp_path / "new" / "folder" / record.name).read_bytes()
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_disk_that_refuses_leaves_nothing_and_the_old_shard_whole(tmp_path: Path) -> None:
    before = write_shard(tmp_path, "a.safetensors", [piece("param/w", 0, 40)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before.bytes, hard))  # a file can grow no longer than the old shard
    try:
        with pytest.raises(OSError, match="File too large"):
            write_shard(tmp_path, "a.safetensors", [piece("param/w", 0, 40), piece("param/v", 0, 40)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest() == before.sha256


@given(data=st.data())
def test_any_slice_is_read_from_overlapping_pieces(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    bounds = st.tuples(st.integers(0, 39), st.integers(1, 40)).filter(lambda pair: pair[0] < pair[1])
    written = data.draw(st.lists(bounds, min_size=1, max_size=6, unique_by=lambda pair: pair[0]))
    for number, (low, high) in enumerate(written):
        write_shard(folder, f"{number}.safetensors", [piece("param/w", low, high)])
    reader = CheckpointReader(folder, 1)
    start, stop = data.draw(bounds)
    there = {element for low, high in written for element in range(low, high)}
    if there >= set(range(start, stop)):
        assert torch.equal(reader.read("param/w", start, stop), WHOLE[start:stop])
    else:
        gap = min(set(range(start, stop)) - there)
        with pytest.raises(CheckpointDamaged, match=f"has no elements {gap} to {stop} of param/w"):
            reader.read("param/w", start, stop)


def test_names_may_hold_anything(tmp_path: Path) -> None:
    write_shard(tmp_path, "a.safetensors", [piece("param/block@2.weight", 3, 8)])
    reader = CheckpointReader(tmp_path, 1)
    assert "param/block@2.weight" in reader
    assert torch.equal(reader.read("param/block@2.weight", 4, 6), WHOLE[4:6])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(tmp_path, 1)
    assert "param/w" not in reader
    with pytest.raises(CheckpointDamaged, match=rf"the checkpoint {tmp_path} has no elements 0 to 5 of param/w"):
        reader.read("param/w", 0, 5)
    assert reader.read("param/w", 0, 0).numel() == 0


def test_every_piece_of_a_tensor_knows_its_whole_shape(tmp_path: Path) -> None:
    for start in (0, 20):
        write_shard(tmp_path, f"{start}.safetensors", [piece("param/w", start, start + 20)._replace(shape=(8, 5))])
    reader = CheckpointReader(tmp_path, 1)
    assert torch.equal(reader.read_whole("param/w", (8, 5)), WHOLE)
    assert torch.equal(reader.read_slice("param/w", torch.Size((8, 5)), 15, 25), WHOLE[15:25])
    for shape in [(5, 8), (40,), (4, 5), (8, 5, 1)]:
        with pytest.raises(UsageError, match=r"param/w has the shape \(8, 5\) in the checkpoint .* in the model"):
            reader.read_slice("param/w", shape, 0, 20)


def test_a_file_that_tells_no_shapes_is_damaged(tmp_path: Path) -> None:
    save_file({"param/w@0": WHOLE}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointDamaged, match="does not say what shape param/w has"):
        CheckpointReader(tmp_path, 1)


@pytest.mark.parametrize("shapes", ["{", '{"param/w": 40}', "[]"])
def test_a_file_whose_shapes_cannot_be_read_is_damaged(tmp_path: Path, shapes: str) -> None:
    save_file({"param/w@0": WHOLE}, tmp_path / "a.safetensors", metadata={"shapes": shapes})
    with pytest.raises(CheckpointDamaged, match="shapes cannot be read"):
        CheckpointReader(tmp_path, 1)
