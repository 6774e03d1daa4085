"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

ITEMS = Counter("mars_reward_items", "Completions scored", ["via", "truth"])
"""`via` is "http" or "queue", `truth` the kind of ground truth."""

SECONDS = Histogram(
    "mars_reward_seconds", "Wall seconds to score one request or group", ["via"], buckets=(0.001, 0.01, 0.1, 1, 10, 60)
)

GROUPS = Counter("mars_reward_groups", "Groups taken from the queue, by what became of them", ["outcome"])
"""`outcome` is "scored", "dead_letter", "retry", "handed_back" or "lease_lost"."""

TIME_OUTS = Counter("mars_reward_time_outs", "Completions that a custom reward did not come back from; they got 0", ["cause"])
"""`cause` is "cpu", "wall" or "exit"."""
