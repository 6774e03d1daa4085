"""What a replica counts, for Prometheus; vLLM's own metrics stand beside it under /metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from mars_shared.contracts import PolicyVersion, RolloutGroup

GROUPS = Counter("mars_rollout_groups", "Groups, by purpose and by what became of them", ["purpose", "outcome"])
"""`outcome` is "made", "dead_letter", "retry", "handed_back", "lease_lost" or "superseded"."""

TOKENS = Counter("mars_rollout_tokens", "Sampled tokens", ["purpose", "kind"])
"""`kind` is "multi" or "mono"."""

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
"""`stage` is "plan", "fetch", "decode" (verify and apply to the mirror), "rehearse", "write" or "pack"."""

FETCHED_BYTES = Counter("mars_rollout_weight_fetched_bytes", "Bytes of publications fetched", ["kind"])
"""`kind` is "snapshot" or "delta"."""

REFUSED = Counter("mars_rollout_weights_refused", "Publications and announced versions that were not applied", ["reason"])
"""`reason` is "damaged" (a publication is not what its manifest says), or, of the announced version, "unreachable" (no good
publications lead to it), "replayed", "model" or "engine" (its tensors don't fit)."""

POLICY_STEP = Gauge("mars_rollout_policy_step", "Step of the served policy version")
POLICY_INCARNATION = Gauge("mars_rollout_policy_incarnation", "Incarnation of the served policy version")


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
