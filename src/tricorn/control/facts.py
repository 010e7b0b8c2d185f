"""What the coordinator has to know of job and plan."""

from __future__ import annotations

import msgspec


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator has to know of job and plan. Times are in seconds."""

    workers: int
    servers: int
    synchronous: bool
    samples: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    evaluation_samples: int
    checkpoint_seconds: float
    checkpoint_steps: int  # 0: by time alone
    heartbeat_timeout: float
    start_timeout: float = 120.0
    regroup_timeout: float = 600.0
    barren_restarts: int = 8  # restarts without a committed step in between, before the run fails
