"""A run's folder, written as a run writes it, read and told as a page."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tricorn import folder as folders
from tricorn.cli.report import report
from tricorn.control import record as recording
from tricorn.control.intervals import Intervals
from tricorn.control.messages import Failed
from tricorn.control.record import Record
from tricorn.engine.base import JobFacts
from tricorn.errors import RoleFailed, UsageError
from tricorn.plan import Plan
from tricorn.planner.prediction import Prediction
from tricorn.report.page import html
from tricorn.report.reading import read
from tricorn.testing.clock import VirtualClock

ASP = Plan(strategy="ps", workers=2, servers=1, consistency="asp")
FOUND = {"steps": 100.0, "all": 1.0, "data": 0.1, "compute": 0.6}
FOREIGN = "<script>alert('x')</script>&"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    clock = VirtualClock(100.0)
    monkeypatch.setattr(recording.time, "time", lambda: 1.7e9 + clock.now())
    return clock


def facts(name: str = "digits", epochs: int = 2) -> JobFacts:
    return JobFacts(
        name=name, file=None, entry="job", fingerprint="data", samples=12, evaluation_samples=4, batch_size=4,
        epochs=epochs, seed=0, precision="float32", device="cpu", optimizer={"kind": "sgd"}, metrics=["accuracy"],
    )  # fmt: skip


def foreseen(plan: Plan, memory: dict[str, int]) -> dict[str, object]:
    terms = {"compute": 0.004, "data": 0.001, "exchange": 0.002, "wire": 0.0, "update": 0.0, "waiting": 0.0}
    prediction = Prediction(plan=plan, terms=terms, scatter=0.1, memory=memory, sent=2e6)
    return {**prediction.as_dict(), "machines": [{"name": "lab-3", "cores": 4.0, "memory": 16 * 10**9}]}


def trained(
    folder: Path, clock: VirtualClock, *, job: JobFacts | None = None, plan: Plan = ASP,
    memory: dict[str, int] | None = None, word: str = "worker-1 is gone (killed by SIGKILL)", ends: str | None = "done",
    steps: int = 6, error: Failed | None = None,
) -> Path:  # fmt: skip
    """A run that loses a worker after four steps, of which it goes back two."""
    job = job or facts()
    folder.mkdir()
    folders.prepare(folder, job, plan)
    folders.predict(folder, foreseen(plan, memory or {"worker": 300_000_000, "server": 100_000_000}))
    (folder / "lock").touch()
    with contextlib.closing(Record(folder, job.order, plan, "a launch")) as record:

        def run(first: int, stop: int, membership: int) -> None:
            for step in range(first, stop):
                clock.advance(0.5)
                record.ledger.commit([step], membership)
                record.trace(step, 2.0 / (step + 1))

        record.begin(1, Intervals(), "the coordinator begins; from the initial weights at step 0")
        run(0, 4, 1)
        record.measured(3, {"loss": 0.9, "accuracy": 0.5})
        clock.advance(7.0)
        record.begin(2, Intervals([(0, 2)]), f"{word}; from a checkpoint at step 2")
        run(2, steps, 2)
        record.measured(steps, {"loss": 0.4, "accuracy": 0.75})
        record.note("server-0", steps, "staleness", {"0": 30.0, "1": 60.0, "16-31": 10.0})
        record.note("worker-0", steps, "seconds", FOUND)
        record.note("worker-1", steps, "seconds", FOUND | {"compute": 0.8})
        record.note("worker-0", steps, "shares", {"0": 0.625, "1": 0.375})
        if ends is not None:
            record.finish(ends, 6_000_000, {"worker-0": 330_000_000, "server-0": 90_000_000}, error)
    return folder


class _Page(HTMLParser):
    """Its text, and a check that every element which was opened is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def told(folder: Path) -> str:
    """What the page of the run says, once it is known to be whole and to need nothing else."""
    text = html(read(folder))
    for drawn in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(drawn)
    page = _Page(text)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert "http" not in text.replace("http-equiv", "")
    return re.sub(r"\s+", " ", " ".join(page.words))


def test_a_page_tells_what_happened(tmp_path, clock):
    said = told(trained(tmp_path / "run", clock))
    for part in (
        "digits with ps asp, 2 workers, 1 server", "6 of 6 steps", "0.75 held out: accuracy", "lab-3",
        "A step took 5 ms, the mean of at least 100 steps of each worker; predicted were 7 ms",
        "Furthest off is updating, exchanging, links: 1 ms, predicted 2 ms",
        "computing 3.5 ms measured 4 ms predicted", "worker-0 330 MB 300 MB 1.10", "server-0 90 MB 100 MB 0.90",
        "worker-1 is gone (killed by SIGKILL); from a checkpoint at step 2 7.5 s",
        "The busiest computes 1.14 times as long as the mean", "62.5%", "16-31 10 (10.0%)", "1 60 (60.0%)",
        "Every sample of every epoch is in the model once.", "2 were taken back",
        "Roles sent each other 1 MB a step, predicted 2 MB. What a lost role sent is not counted.",
    ):  # fmt: skip
        assert part in said


def test_what_comes_from_files_is_escaped(tmp_path, clock):
    error = Failed(kind="JobFailed", message=FOREIGN, remedy=f"{FOREIGN} --resume RUN", where=FOREIGN, trace="")
    folder = trained(
        tmp_path / FOREIGN.replace("/", ""), clock, job=facts(FOREIGN), word=FOREIGN, ends="failed", error=error
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step":6,"evaluation":{{"{FOREIGN}":1.0}},"time":1e9}}\n')
        file.write(f'{{"step":6,"staleness":{{"{FOREIGN}":1.0}},"role":"{FOREIGN}","time":1e9}}\n')
    assert f"failed {FOREIGN} with" not in html(read(folder))
    assert told(folder).count(FOREIGN) >= 7
    assert f"--resume {shlex.quote(str(folder))}" in told(folder)


def test_a_run_that_goes_on_and_one_that_was_killed(tmp_path, clock):
    folder = trained(tmp_path / "run", clock, ends=None, steps=5)
    assert "ended without a word" in told(folder)
    with folders.held(folder):
        said = told(folder)
    assert "in progress" in said
    assert "5 of 6 steps" in said
    assert "at most once" in said


def test_the_summary_of_an_earlier_launch_is_not_told(tmp_path, clock):
    folder = trained(tmp_path / "run", clock, ends="stopped", steps=5)
    assert "can be resumed" in told(folder)
    with contextlib.closing(Record(folder, facts().order, ASP, "another")) as record:
        record.begin(3, Intervals([(0, 5)]), "the coordinator begins; from a checkpoint at step 5")
    assert "ended without a word" in told(folder)


@pytest.mark.parametrize("begun", [True, False])
def test_nor_that_of_one_with_fewer_epochs(tmp_path, clock, begun):
    folder = trained(tmp_path / "run", clock)
    folders.prepare(folder, facts(epochs=4), ASP)
    if begun:
        with contextlib.closing(Record(folder, facts(epochs=4).order, ASP, "another")) as record:
            record.begin(3, Intervals([(0, 6)]), "the coordinator begins; from a checkpoint at step 6")
    said = told(folder)
    assert "ended without a word" in said
    assert "in the model at most once" in said


def test_a_launch_is_no_loss_and_a_coordinator_that_is_replaced_is_one(tmp_path, clock):
    folder = trained(tmp_path / "run", clock, ends="stopped", steps=4)
    lost = "What a lost role sent is not counted."
    assert lost in told(folder)
    for step, replaces in ((4, False), (5, True)):
        with contextlib.closing(Record(folder, facts().order, ASP, "another", replaces=replaces)) as record:
            record.begin(step - 1, Intervals([(0, step)]), f"the coordinator begins; from a checkpoint at step {step}")
            record.ledger.commit([step], step - 1)
            record.finish("stopped", 6_000, {"worker-0": 1_000})
        said = told(folder)
        assert "Roles sent each other" in said
        assert (lost in said) is replaces
    events = read(folder).events
    assert [event.loss for event in events] == [False, True, False, True]
    assert events[-1].text == "the coordinator was lost; the coordinator begins; from a checkpoint at step 5"


def test_an_error_of_a_run_from_python_says_how_python_goes_on(tmp_path, clock):
    error = Failed(kind="RoleFailed", message="worker-0 cannot live", remedy=RoleFailed.remedy, where="", trace="")
    folder = trained(tmp_path / "my run", clock, ends="failed", error=error)
    assert f"`tricorn.train(job, resume={str(folder)!r})` goes on" in told(folder)


def test_what_was_predicted_stands_in_the_summary(tmp_path, clock):
    summary = json.loads((trained(tmp_path / "run", clock) / "summary.json").read_bytes())
    assert summary["predicted_peak_bytes"] == {"worker": 300_000_000, "server": 100_000_000}
    assert summary["predicted_bytes_a_step"] == 2e6


@pytest.fixture
def anyone() -> Iterator[Path]:
    """A folder that all may read, and a reader whom permissions hold back."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
            for path in [Path(folder), *Path(folder).iterdir()]:
                path.chmod(0o755)


@pytest.mark.parametrize("left", [set(), {"-wal", "-shm"}, {"-wal"}])
def test_a_run_that_cannot_be_written_to_has_its_proof(tmp_path, clock, anyone, left):
    whole, folder = trained(tmp_path / "run", clock, steps=5, ends="stopped"), anyone / "run"
    with contextlib.closing(Record(whole, facts().order, ASP, "a launch")) as record:
        record.ledger.commit([5], 2)
        shutil.copytree(whole, folder)  # with what the ledger has not put in its place
    if not left:
        shutil.copy(whole / "ledger.sqlite", folder)
    for end in {"-wal", "-shm"} - left:
        (folder / f"ledger.sqlite{end}").unlink()
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(PermissionError):
        (folder / "x").touch()
    said = told(folder)
    if left == {"-wal"}:  # no proof is better than one without the last steps
        assert "ledger.sqlite cannot be read" in said
        assert "are in the model" not in said
    else:
        assert "Every sample of every epoch is in the model" in said
        assert "6 steps are in the model" in said


def test_memory_is_foreseen_by_stage(tmp_path, clock):
    plan = Plan(strategy="mp", workers=2)
    said = told(trained(tmp_path / "run", clock, plan=plan, memory={"stage 0": 10**8, "stage 1": 10**9}))
    assert "worker-0 330 MB 100 MB 3.30" in said


def test_plans_that_were_left_are_told(tmp_path, clock):
    folder = trained(tmp_path / "run", clock)
    summary = json.loads((folder / "summary.json").read_bytes())
    summary["changes"] = [{"steps": 2, "plan": {"strategy": "dp"}, "measured": {"step": 0.02}, "bytes_sent": 5}]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "sent 2 dp, 2 workers 20 ms 5 B" in told(folder)


def test_damaged_files_give_a_page_or_one_error(tmp_path, clock):
    folder = trained(tmp_path / "run", clock)
    dice = random.Random(0)
    files = ("metrics.jsonl", "summary.json", "predicted.json", "ledger.sqlite", "plan.json", "job.json")
    whole = {name: (folder / name).read_bytes() for name in files}
    outcomes = set()
    for turn in range(90 * int(os.environ.get("TRICORN_ROUNDS", "1"))):
        name = files[turn % len(files)]
        damaged = bytearray(whole[name])
        for _ in range(dice.choice((1, 3, 40))):
            damaged[dice.randrange(len(damaged))] = dice.choice(b'9e-{}[]",:\x00\xff')
        (folder / name).write_bytes(damaged if turn % 2 else damaged[: dice.randrange(len(damaged))])
        try:
            told(folder)
            outcomes.add("a page")
        except UsageError:
            outcomes.add("an error")
        for beside in (name, f"{name}-wal", f"{name}-shm"):
            (folder / beside).unlink(missing_ok=True)
        (folder / name).write_bytes(whole[name])
    assert outcomes == {"a page", "an error"}


def test_damage_is_told(tmp_path, clock):
    folder = trained(tmp_path / "run", clock)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step":7,"lo\n{"step":6,"loss":null,"time":1e9}\n')
    (folder / "summary.json").write_text("{}")
    (folder / "ledger.sqlite").unlink()
    said = told(folder)
    for part in ("1 of 16 lines of metrics.jsonl are damaged", "summary.json cannot be read", "there is no ledger",
                 "1 losses are not finite"):  # fmt: skip
        assert part in said


def test_a_long_run_has_no_longer_page(tmp_path, clock):
    folder = trained(tmp_path / "run", clock, job=facts(epochs=10_000))
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step":{step},"loss":0.5,"time":{1.7e9 + step / 100}}}\n' for step in range(6, 30_000))
    assert len(html(read(folder))) < 60_000


def test_the_verb_writes_a_file_and_prints_its_path(tmp_path, clock, capsys):
    folder = trained(tmp_path / "run", clock)
    report(runs=tmp_path)
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text().endswith("</html>\n")
    report("run", output=tmp_path / "other.html", runs=tmp_path)
    assert (tmp_path / "other.html").read_bytes() == (folder / "report.html").read_bytes()
    with pytest.raises(UsageError, match="cannot be written"):
        report("run", output=tmp_path / "no" / "folder.html", runs=tmp_path)
    with pytest.raises(UsageError, match="there is no run other"):
        report("other", runs=tmp_path)
