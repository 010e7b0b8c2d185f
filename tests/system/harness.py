"""Real runs of the command line: started, watched through their folder, disturbed with real signals."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from tricorn.control.ledger import Ledger
from tricorn.data.order import Permutation, step_range, steps_per_epoch
from tricorn.data.sources import as_source
from tricorn.job import Job
from tricorn.state.flat import build_model, call_model
from tricorn.state.trained import trained_model

from . import jobs

JOBS = Path(jobs.__file__)
TRICORN = Path(sys.executable).with_name("tricorn")
PATIENCE = 200.0 if "TRICORN_ROUNDS" in os.environ else 60.0  # campaigns run beside other load


@dataclass
class Run:
    """One ``tricorn train``, in a folder of its own."""

    process: subprocess.Popen[str]
    runs: Path

    @property
    def folder(self) -> Path:
        return self.runs / "latest"

    def pids(self) -> dict[str, int]:
        """The processes of the roles, as far as they are known by now."""
        try:
            return json.loads((self.folder / "roles.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def steps(self) -> int:
        """How many steps are committed."""
        try:
            with sqlite3.connect(f"file:{self.folder / 'ledger.sqlite'}?mode=ro", uri=True) as db:
                return db.execute("select count(*) from commits where undone is null").fetchone()[0]
        except sqlite3.Error:
            return 0
        finally:
            if "db" in locals():
                db.close()

    def reach(self, steps: int) -> None:
        """Wait until that many steps are committed."""
        until = time.monotonic() + PATIENCE
        while self.steps() < steps:
            assert self.process.poll() is None, f"the run ended: {self.process.communicate()}"
            assert time.monotonic() < until, f"step {steps} is not reached"
            time.sleep(0.005)

    def disturb(self, random: random.Random, victims: list[str], kills: int) -> list[str]:
        """``kill -9`` roles at random moments until that many are dead or the run is over; returns who."""
        killed: list[str] = []
        while self.process.poll() is None and len(killed) < kills:
            time.sleep(random.uniform(0, 0.25))
            victim = random.choice(victims)
            if (pid := self.pids().get(victim)) and psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
                killed.append(victim)
        return killed

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: exit code, standard output, standard error."""
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, err

    def summary(self) -> dict:
        """Wait for a good end: what was printed as the last line."""
        code, out, err = self.end()
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    def counted_once(self, killed: list[str]) -> dict:
        """Wait for a good end, and see that every sample of every epoch is in the model once; the summary."""
        summary = self.summary()
        assert killed
        assert summary["exactly_once"]
        assert summary["steps"] == summary["total_steps"]
        with self.ledger() as ledger:
            for epoch in range(ledger.order.epochs):
                once = np.ones(ledger.order.samples)
                assert np.array_equal(ledger.times_committed(epoch), once), f"epoch {epoch}, killed {killed}"
        return summary

    def weights(self, name: str) -> torch.Tensor:
        """The trained parameters end to end."""
        return flat(trained_model(getattr(jobs, name), self.folder))

    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.sqlite")


def start(runs: Path, job: str, *options: str, file: Path = JOBS) -> Run:
    command = [TRICORN, "train", f"{file}:{job}", "--runs", runs, "--json", "--threads", "1", *options]
    return Run(_launch(command), runs)


def resume(runs: Path, *options: str) -> Run:
    command = [TRICORN, "train", "--resume", runs / "latest", "--runs", runs, "--json", *options]
    return Run(_launch(command), runs)


def _launch(command: list) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(weights: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative in L2."""
    return ((weights.double() - expected.double()).norm() / expected.double().norm()).item()


@cache
def plain(name: str) -> torch.Tensor:
    """The job trained by a loop of plain PyTorch with ``torch.optim``: the weights that every strategy has to reach."""
    job: Job = getattr(jobs, name)
    steps = job.epochs * steps_per_epoch(len(job.train), job.batch_size)

    def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
        declared = job.optimizer
        if declared == jobs.SGD:
            return [torch.optim.SGD(model.parameters(), lr=declared.lr, momentum=declared.momentum)]
        return [torch.optim.Adam(model.parameters(), lr=declared.lr)]

    return trajectory(job, optimizers, steps)[1]


def trajectory(
    job: Job, optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]], steps: int
) -> tuple[list[float], torch.Tensor]:
    """The loss of each step, and the weights end to end after the last, of a loop of plain PyTorch."""
    source = as_source(job.train)
    model = build_model(job)
    dtype = next(model.parameters()).dtype
    stepping, losses = optimizers(model), []
    rates = [optimizer.param_groups[0]["lr"] for optimizer in stepping]
    for step in range(steps):
        epoch, start, stop = step_range(step, len(source), job.batch_size)
        ids = Permutation(job.seed, epoch, source.fingerprint, len(source)).ids(start, stop)
        inputs, target = source.fetch(ids)
        for optimizer, rate in zip(stepping, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * job.schedule(step)
            optimizer.zero_grad()
        loss = job.loss(call_model(model, inputs if isinstance(inputs, tuple) else inputs.to(dtype)), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        for optimizer in stepping:
            optimizer.step()
        losses.append(loss.item())
    return losses, flat(model)
