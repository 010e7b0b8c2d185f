"""Saving beside the training: pieces are copies already, so a thread writes them while steps go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tricorn.control import messages as m
from tricorn.control.checkpoints import folder_of
from tricorn.errors import StorageError
from tricorn.state.shards import Piece, write_shard


class Saver:
    """Writes this role's shard of each checkpoint and reports it. One at a time; a second waits for the first."""

    def __init__(
        self, role: str, root: Path, send: Callable[[m.Report], None], fail: Callable[[Exception], None]
    ) -> None:
        self._role = role
        self._root = root
        self._send = send
        self._fail = fail
        self._thread: threading.Thread | None = None

    def save(self, epoch: int, step: int, pieces: Sequence[Piece]) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(epoch, step, pieces), name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is durable."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, epoch: int, step: int, pieces: Sequence[Piece]) -> None:
        folder = folder_of(self._root, step)
        files = []
        try:
            if pieces:
                shard = write_shard(folder, f"{self._role}.safetensors", pieces)
                files.append(m.File(name=shard.name, bytes=shard.bytes, sha256=shard.sha256))
        except OSError as error:
            self._fail(StorageError(f"the checkpoint {folder} cannot be written: {error.strerror or error}"))
        except Exception as error:  # such as MemoryError: untold, the run would wait for this part for ever
            self._fail(error)
        else:
            self._send(m.Saved(epoch=epoch, step=step, files=files))
