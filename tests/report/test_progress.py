"""What a person sees of a run, in a terminal and where there is none."""

from __future__ import annotations

import io
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.plan import Plan
from tricorn.report.progress import LiveProgress, Progress, duration, progress, remaining
from tricorn.testing.clock import VirtualClock

SUMMARY = {
    "run": "runs/one",
    "steps": 40,
    "samples": 4000,
    "seconds": 80.0,
    "samples_per_second": 50.0,
    "loss": 0.25,
    "metrics": {"accuracy": 0.98},
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train(shown: Progress, clock: VirtualClock, *, evaluate: bool) -> None:
    """Two epochs of 20 steps, 2 seconds each."""
    shown.started(Plan(strategy="ps", workers=2, servers=1), total_steps=40, epochs=2)
    for step in range(1, 41):
        clock.advance(2.0)
        epoch = (step - 1) // 20
        shown.step(step, epoch=epoch, loss=1 / step, samples_per_second=50.0 if step > 1 else 0.0)
        if evaluate and step % 20 == 0:
            shown.evaluated(epoch, {"accuracy": 0.9 + epoch / 20})
    shown.finished(SUMMARY)


def test_plain_lines_are_sparse_and_tell_each_epoch() -> None:
    stream, clock = io.StringIO(), VirtualClock()
    train(Progress(stream, every=30.0, now=clock.now), clock, evaluate=True)
    assert stream.getvalue().splitlines() == [
        "ps with 2 workers and 1 server: 40 steps",
        "step 15/40  epoch 1/2  loss 0.0667  50 samples/s  50.0 s left",
        "epoch 1/2 done  loss 0.0500  50 samples/s  evaluation accuracy 0.9",
        "step 35/40  epoch 2/2  loss 0.0286  50 samples/s  10.0 s left",
        "epoch 2/2 done  loss 0.0250  50 samples/s  evaluation accuracy 0.95",
        "done: 40 steps, 4,000 samples in 1 min 20 s (50 samples/s)  loss 0.25  evaluation accuracy 0.98",
        "run: runs/one",
    ]


def test_an_epoch_without_evaluation_has_its_line_too() -> None:
    stream, clock = io.StringIO(), VirtualClock()
    train(Progress(stream, every=1e9, now=clock.now), clock, evaluate=False)
    assert stream.getvalue().splitlines()[1:3] == [
        "epoch 1/2 done  loss 0.0500  50 samples/s",
        "epoch 2/2 done  loss 0.0250  50 samples/s",
    ]


def test_a_rate_is_told_once_it_is_known() -> None:
    stream, clock = io.StringIO(), VirtualClock()
    shown = Progress(stream, every=0.0, now=clock.now)
    for step, rate in enumerate((0.0, 0.4, 50.0, 1234.5), 1):
        shown.step(step, epoch=0, loss=1.0, samples_per_second=rate)
    rates = [line.partition("loss 1.0000")[2] for line in stream.getvalue().splitlines()]
    assert rates == ["", "  0.40 samples/s", "  50 samples/s", "  1,234 samples/s"]


def test_a_notice_is_told_at_once() -> None:
    stream = io.StringIO()
    Progress(stream).notice("worker-1 was lost at step 7; the others go on")
    assert stream.getvalue() == "worker-1 was lost at step 7; the others go on\n"


def test_the_stream_decides() -> None:
    assert type(progress(io.StringIO())) is Progress
    live = progress(Terminal())
    live.close()
    assert type(live) is LiveProgress


def test_a_terminal_shows_a_bar_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    stream, clock, threads = Terminal(), VirtualClock(), threading.active_count()
    shown = LiveProgress(stream, now=clock.now)
    assert threading.active_count() == threads
    train(shown, clock, evaluate=True)
    written = stream.getvalue()
    assert "15/40 epoch 1/2  loss 0.0667  50 samples/s  50.0 s left" in written
    assert "epoch 2/2 done  loss 0.0250  50 samples/s  evaluation accuracy 0.95\n" in written
    assert written.endswith("run: runs/one\n")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is shown again
    shown.close()


def test_the_live_line_is_redrawn_ten_times_a_second_at_most() -> None:
    stream, clock = Terminal(), VirtualClock()
    shown = LiveProgress(stream, now=clock.now)
    shown.started(Plan(strategy="dp"), total_steps=10_000, epochs=1)
    for step in range(1, 1001):
        clock.advance(0.001)
        shown.step(step, epoch=0, loss=1.0, samples_per_second=1.0)
    shown.close()
    assert 5 <= stream.getvalue().count("samples/s") <= 13


@given(first=st.integers(0, 100), steps=st.integers(1, 1000), pace=st.floats(0.001, 100), left=st.integers(0, 1000))
def test_an_even_pace_is_foretold(first: int, steps: int, pace: float, left: int) -> None:
    now = 5.0 + steps * pace
    foretold = remaining(first, 5.0, first + steps, now, first + steps + left)
    assert foretold == pytest.approx(left * pace, rel=1e-6, abs=1e-9)


def test_there_is_no_pace_before_the_second_step() -> None:
    assert remaining(3, 5.0, 3, 5.0, 10) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.44, "9.4 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_read_by_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
