from pathlib import Path

import pytest

from tricorn import planner
from tricorn.plan import Plan
from tricorn.planner import store
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.replan import Outlook
from tricorn.planner.search import predicted

from .world import ground, links, profile


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
    whole = kept.read_bytes()
    for damaged in (whole[:-9], whole.replace(b'":', b'\xff":'), b"[]"):
        kept.write_bytes(damaged)
        assert store.load_links() is None


def test_a_place_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file")
    store.save_links(links())
    assert store.load_links() is None


def test_what_a_run_teaches_is_kept_with_the_profile_it_was_predicted_from() -> None:
    on = ground()
    plan = Plan(strategy="dp", workers=2)
    prediction = predicted(plan, on)
    assert isinstance(prediction, Prediction)
    store.save_profile("job", store.KeptProfile(on.profile, {}, {}))
    store.save_profile("other", store.KeptProfile(profile(batch=9.0), {}, {}))
    computing = prediction.terms["compute"]
    slow = {
        "step": prediction.seconds + computing,
        "compute": 2 * computing,
        "exchange": prediction.seconds - computing,
    }
    for key in ("job", "other", "nowhere"):
        planner.learn(Outlook(prediction, on, {}, key), slow, 10_000)
    kept, other = store.load_profile("job"), store.load_profile("other")
    assert kept is not None
    assert other is not None
    assert store.load_profile("nowhere") is None
    assert not other.seen
    taught = predicted(plan, Ground(kept.profile, on.links, on.cluster, kept.seen))
    assert isinstance(taught, Prediction)
    assert taught.terms["compute"] == pytest.approx(2 * prediction.terms["compute"], rel=0.01)
