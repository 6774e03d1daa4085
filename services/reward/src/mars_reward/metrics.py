"""What the service counts, for Prometheus."""

from __future__ import annotations

from itertools import product

from prometheus_client import Counter, Histogram

from mars_shared.errors import RewardCpuTimeoutError, RewardDiedError, RewardError, RewardNotFiniteError, RewardTimeoutError

ITEMS = Counter("mars_reward_items", "Completions scored", ["via", "truth"])
VIAS, TRUTHS = ("http", "queue"), ("text", "boxes")

SECONDS = Histogram(
    "mars_reward_seconds", "Wall seconds to score one request or group", ["via"], buckets=(0.001, 0.01, 0.1, 1, 10, 60)
)

GROUPS = Counter("mars_reward_groups", "Groups taken from the queue, by what became of them", ["outcome"])
OUTCOMES = ("scored", "dead_letter", "retry", "handed_back", "lease_lost")

FAILURES = Counter("mars_reward_failures", "Completions that got no reward, each attempt counted", ["reason"])
REASONS = tuple(
    error.reason for error in (RewardError, RewardTimeoutError, RewardCpuTimeoutError, RewardDiedError, RewardNotFiniteError)
)
"""As dead letters name them."""


def show_all() -> None:
    """Make every series begin at 0: what never happened is then seen as such, and a first time as an increase."""
    for via, truth in product(VIAS, TRUTHS):
        ITEMS.labels(via=via, truth=truth)
    for via in VIAS:
        SECONDS.labels(via=via)
    for outcome in OUTCOMES:
        GROUPS.labels(outcome=outcome)
    for reason in REASONS:
        FAILURES.labels(reason=reason)


show_all()
