"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

ITEMS = Counter("mars_reward_items", "Completions scored", ["via", "truth"])
"""`via` is "http" or "queue", `truth` the kind of ground truth."""

SECONDS = Histogram(
    "mars_reward_seconds", "Wall seconds to score one request or group", ["via"], buckets=(0.001, 0.01, 0.1, 1, 10, 60)
)

GROUPS = Counter("mars_reward_groups", "Groups taken from the queue, by what became of them", ["outcome"])
"""`outcome` is "scored", "dead_letter", "retry" or "lease_lost"."""

FAILURES = Counter("mars_reward_failures", "Completions that got no reward, each attempt counted", ["reason"])
"""`reason` is that of the RewardError, as dead letters name it."""
