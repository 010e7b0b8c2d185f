"""Shares follow speeds, steadily, and always add up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.dp.balance import PARTS, Balance, cut, share_sizes
from tricorn.strategy import even_share

weights = st.lists(st.integers(0, 10 * PARTS), min_size=1, max_size=9).filter(any)


@given(weights, st.integers(0, 10_000))
def test_every_sample_is_in_one_share_and_nobody_starves(weights, samples):
    sizes = share_sizes(weights, samples)
    assert sum(sizes) == samples
    assert min(sizes) >= (samples >= len(weights))
    assert cut(weights, samples)[0] == 0


@given(st.integers(1, 9), st.integers(0, 1000))
def test_equal_weights_give_even_shares(workers, samples):
    bounds = cut([PARTS] * workers, samples)
    assert [(bounds[r], bounds[r + 1]) for r in range(workers)] == [
        even_share(samples, r, workers) for r in range(workers)
    ]


def simulate(speeds: list[float], batch: int, steps: int, *, fixed: float = 0.0, noise: float = 0.0, seed: int = 0):
    """The slowest worker's seconds of each step, where a worker takes ``fixed`` plus its samples over its speed."""
    balance, dice = Balance(len(speeds)), random.Random(seed)
    took, changes = [], 0
    for _ in range(steps):
        sizes = share_sizes(balance.weights, batch)
        seconds = [
            (fixed + n / speed) * (1 + noise * dice.uniform(-1, 1)) for n, speed in zip(sizes, speeds, strict=True)
        ]
        took.append(max(seconds))
        changes += balance.observe(sizes, seconds)
    return took, changes


@given(
    st.lists(st.floats(0.1, 1.0), min_size=2, max_size=6), st.integers(64, 1000), st.floats(0, 20),
)  # fmt: skip
def test_it_converges_to_the_speeds(speeds, batch, fixed):
    took, _ = simulate(speeds, batch, 200, fixed=fixed)
    ideal = fixed + batch / sum(speeds)
    # What 5 % of gain, whole samples, and the one sample that everybody has, leave open.
    assert took[-1] <= 1.12 * ideal + 2 / min(speeds)


def test_a_worker_at_a_quarter_of_the_speed_makes_no_one_wait():
    took, changes = simulate([0.25, 1.0], 128, 100)
    assert took[0] == 64 / 0.25
    assert took[-1] <= 1.05 * 128 / 1.25
    assert changes <= 4


@pytest.mark.parametrize("seed", range(20))
def test_noise_changes_nothing(seed):
    _, changes = simulate([1.0, 1.0, 1.0], 96, 500, noise=0.1, seed=seed)
    assert changes == 0


@pytest.mark.parametrize("period", [4_000, 100_000])
def test_stalls(period):
    """A worker runs for a quarter of each period, in microseconds. In long ones no share helps; trying costs little."""

    def mean(balanced: bool) -> float:
        """Of the last of many steps, in microseconds."""
        balance, clock, took = Balance(2), 0, []
        for _ in range(1500):
            sizes = share_sizes(balance.weights, 128)
            done, work = clock, 100 * sizes[0]
            while work:
                if (into := done % period) < period // 4:
                    ran = min(work, period // 4 - into)
                    done, work = done + ran, work - ran
                else:
                    done += period - into
            if balanced:
                balance.observe(sizes, [(done - clock) / 1e6, sizes[1] / 1e4])
            took.append(max(done - clock, 100 * sizes[1]))
            clock += took[-1]
        return sum(took[-500:]) / 500

    assert mean(True) <= mean(False) * (0.5 if period == 4_000 else 1.05)


def test_it_follows_a_change_of_speeds():
    balance = Balance(2)
    for speeds in ([0.25, 1.0], [1.0, 1.0], [1.0, 0.5]):
        for _ in range(100):
            sizes = share_sizes(balance.weights, 120)
            balance.observe(sizes, [n / speed for n, speed in zip(sizes, speeds, strict=True)])
        ideal = [120 * speed / sum(speeds) for speed in speeds]
        assert all(abs(n - want) <= 6 for n, want in zip(share_sizes(balance.weights, 120), ideal, strict=True))


def test_who_was_not_measured_is_not_judged():
    balance = Balance(2)
    for _ in range(100):
        assert not balance.observe([0, 1], [0.0, 1.0])
