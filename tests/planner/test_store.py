from pathlib import Path

import pytest

from tricorn.planner import store

from .world import links, profile


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRICORN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_links_come_back_as_they_were() -> None:
    assert store.load_links() is None
    store.save_links(links())
    assert store.load_links() == links()


def test_a_profile_is_good_as_long_as_its_files_are_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "job.py"
    file.write_text("a = 1")
    kept = store.KeptProfile(profile(), store.digests([str(file), str(tmp_path / "nowhere")]), {"{}": None})
    store.save_profile("job", kept)
    assert store.load_profile("job") == kept
    assert store.load_profile("other") is None
    file.write_text("a = 2")
    assert store.load_profile("job") is None
    file.unlink()
    assert store.load_profile("job") is None


def test_what_is_damaged_is_as_if_it_were_not_there(cache: Path) -> None:
    store.save_links(links())
    (kept,) = cache.iterdir()
    kept.write_text(kept.read_text()[:-9])
    assert store.load_links() is None


def test_a_place_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file")
    store.save_links(links())
    assert store.load_links() is None
