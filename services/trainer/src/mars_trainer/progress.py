"""Where a run is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from mars_shared.contracts import PolicyVersion


@dataclass
class Progress:
    """Where a run is; what GET /v1/run answers, and what metrics are read from."""

    run: str
    steps: int
    version: PolicyVersion
    state: str = "starting"
    next_dispatch_index: int = 0
    dead: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    served: dict[str, str] = field(default_factory=dict)
    """Policy version by replica, as its last group said."""
    last_step_at: float = field(default_factory=time.time)
    """Unix time of the last step's end, or of the trainer's start."""
