"""Ranks that find each other, and one that shows what cannot be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tricorn.comm import meeting
from tricorn.comm.backend import group
from tricorn.errors import ProtocolError

NO_TEXT = b'"\xff"'


def test_a_card_that_cannot_be_read() -> None:
    def swap(own: Any, shown: list[torch.Tensor], timeout: float) -> None:
        shown[1].copy_(torch.frombuffer(bytearray(NO_TEXT.ljust(meeting.CARD)), dtype=torch.uint8))

    mesh: Any = SimpleNamespace(rank=0, size=2, swap=swap)
    with pytest.raises(ProtocolError, match="cannot be read"):
        meeting.show(mesh, "host", 1.0)


@pytest.mark.parametrize("said", ["{", "[]", "5"])
def test_a_place_in_memory_that_cannot_be_read(said: str) -> None:
    store: Any = SimpleNamespace(set=lambda *_: None, wait=lambda *_: None, get=lambda _: said.encode())
    with pytest.raises(ProtocolError, match="the group 'some' has its memory cannot be read"):
        group._meet(store, 0, 2, 1.0, "some")
