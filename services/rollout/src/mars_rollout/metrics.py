"""What a replica counts, for Prometheus; vLLM's own metrics stand beside it under /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from prometheus_client import Counter, Gauge, Histogram

from mars_shared.contracts import Kind, PolicyVersion, Purpose, RolloutGroup

GROUPS = Counter("mars_rollout_groups", "Groups, by purpose and by what became of them", ["purpose", "outcome"])
OUTCOMES = ("made", "dead_letter", "retry", "handed_back", "lease_lost", "superseded")
UNREAD = "unknown"
"""The purpose of a group whose prompt was not read."""

TOKENS = Counter("mars_rollout_tokens", "Sampled tokens", ["purpose", "kind"])

GENERATION_SECONDS = Histogram(
    "mars_rollout_generation_seconds", "Wall seconds to make one group", ["purpose"], buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300)
)

UPDATES = Counter("mars_rollout_weight_updates", "Versions applied")

UPDATE_SECONDS = Histogram(
    "mars_rollout_weight_update_seconds",
    "Wall seconds of one stage of an update",
    ["stage"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
STAGES = ("plan", "fetch", "decode", "rehearse", "write", "pack")
"""To decode is to verify, and to apply to the mirror."""

FETCHED_BYTES = Counter("mars_rollout_weight_fetched_bytes", "Bytes of publications fetched", ["kind"])
FETCHED_KINDS = ("snapshot", "delta")

REFUSED = Counter("mars_rollout_weights_refused", "Publications and announced versions that were not applied", ["reason"])
REASONS = ("damaged", "unreachable", "replayed", "model", "engine")
"""A damaged publication is not what its manifest says; of the announced version, "unreachable": no good publications lead to
it, "engine": its tensors don't fit."""

POLICY_STEP = Gauge("mars_rollout_policy_step", "Step of the served policy version")
POLICY_INCARNATION = Gauge("mars_rollout_policy_incarnation", "Incarnation of the served policy version")


def show_all() -> None:
    """Make every series begin at 0: what never happened is then seen as such, and a first time as an increase."""
    for purpose, outcome in product(Purpose, OUTCOMES):
        GROUPS.labels(purpose=purpose.value, outcome=outcome)
    for outcome in ("dead_letter", "handed_back", "lease_lost"):
        GROUPS.labels(purpose=UNREAD, outcome=outcome)
    for purpose, kind in product(Purpose, Kind):
        TOKENS.labels(purpose=purpose.value, kind=kind.value)
    for purpose in Purpose:
        GENERATION_SECONDS.labels(purpose=purpose.value)
    for stage in STAGES:
        UPDATE_SECONDS.labels(stage=stage)
    for fetched in FETCHED_KINDS:
        FETCHED_BYTES.labels(kind=fetched)
    for reason in REASONS:
        REFUSED.labels(reason=reason)


show_all()


def count_group(group: RolloutGroup) -> None:
    """Count a group that was made."""
    purpose = group.prompt.purpose.value
    GROUPS.labels(purpose=purpose, outcome="made").inc()
    GENERATION_SECONDS.labels(purpose=purpose).observe(group.generation_s)
    for completion in group.completions:
        TOKENS.labels(purpose=purpose, kind=completion.kind.value).inc(len(completion.token_ids))


def count_fetched(kind: str, size_bytes: int) -> None:
    """Count a fetched file of a publication."""
    FETCHED_BYTES.labels(kind=kind).inc(size_bytes)


def count_refused(reason: str) -> None:
    """Count a publication or an announced version that is not applied."""
    REFUSED.labels(reason=reason).inc()


def count_stages(seconds: Mapping[str, float]) -> None:
    """Count how long the stages of an update took."""
    for stage, duration in seconds.items():
        UPDATE_SECONDS.labels(stage=stage).observe(duration)


def count_update(version: PolicyVersion) -> None:
    """Count an applied version."""
    UPDATES.inc()
    POLICY_STEP.set(version.step)
    POLICY_INCARNATION.set(version.incarnation)
