from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tricorn.control.ledger import Ledger

from .served import GROWTH, Served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A coordinator that has to serve a whole good run after whatever the test does to it."""
    served = Served(tmp_path)
    yield served
    try:
        assert served.run()["exactly_once"] is True
        growth = served.resident() - served.memory
        assert growth < GROWTH
    finally:
        printed = served.close()
    assert (served.process.returncode, printed) == (0, "")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.exactly_once()
