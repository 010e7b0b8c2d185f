"""The checkpoints of a run: a folder for each, valid once its manifest is there and every hash agrees.

checkpoints/000000120/worker-0.safetensors ...   written and synced by the roles
checkpoints/000000120/manifest.json              written last, by the coordinator
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tricorn.control.intervals import Intervals
from tricorn.control.messages import Count, File
from tricorn.documents import UNREADABLE
from tricorn.errors import CheckpointDamaged

KEPT = 2


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``step`` updates are in the weights: those of the steps in the intervals ``applied``."""

    step: Count
    applied: list[tuple[Count, Count]]
    files: list[File]


def folder_of(root: Path, step: int) -> Path:
    return root / f"{step:09d}"


def publish(root: Path, manifest: Manifest) -> None:
    """Make the files a checkpoint, durably, and drop all but the newest ``KEPT``. Raises OSError.

    A checkpoint of a later step is none any more: it was damaged, and the run went back behind it.
    """
    folder = folder_of(root, manifest.step)
    named = {file.name for file in manifest.files}
    for path in folder.glob("*.safetensors*"):
        if path.name not in named:  # left by a role that died, perhaps of another plan
            path.unlink()
    partial = folder / "manifest.json.partial"
    try:
        with partial.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / "manifest.json")
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    for later in (old for old in published(root) if old > folder):
        (later / "manifest.json").unlink(missing_ok=True)
    oldest = published(root)[:KEPT][-1]
    for old in _numbered(root.iterdir()):
        if old < oldest:  # also what a role left that died while it saved
            shutil.rmtree(old, ignore_errors=True)


def published(root: Path) -> list[Path]:
    """The folders with a manifest, newest first; whether they are whole is another question."""
    return sorted(_numbered(path.parent for path in root.glob("*/manifest.json")), reverse=True)


def _numbered(folders: Iterable[Path]) -> list[Path]:
    """Those that are a checkpoint's by their name; anything else in there is not ours."""
    return [folder for folder in folders if re.fullmatch("[0-9]{9,}", folder.name)]


def damage(folder: Path) -> str:
    """What is wrong with a published checkpoint, naming the file; empty when it is whole."""
    path = folder / "manifest.json"
    try:
        manifest = load_manifest(folder)
    except CheckpointDamaged as error:
        return str(error)
    if folder_of(folder.parent, manifest.step) != folder:
        return f"{path} speaks of step {manifest.step}"
    if len(Intervals(manifest.applied)) != manifest.step:
        return f"{path} does not account for {manifest.step} steps"
    for file in manifest.files:
        if problem := _file_damage(folder / file.name, file):
            return problem
    return ""


def _file_damage(path: Path, file: File) -> str:
    try:
        if path.stat().st_size != file.bytes:
            return f"{path} has {path.stat().st_size} bytes instead of {file.bytes}"
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                return f"{path} does not have the content that was written (its SHA-256 differs)"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return ""


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a published checkpoint. Raises CheckpointDamaged if it cannot be read."""
    path = folder / "manifest.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except UNREADABLE as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from None


def newest_whole(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one."""
    damages: list[str] = []
    for folder in published(root):
        if not (problem := damage(folder)):
            return folder, damages
        damages.append(problem)
    return None, damages


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
