"""What a replica counts, for Prometheus; vLLM's own metrics stand beside it under /metrics."""

from __future__ import annotations

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
    "mars_rollout_weight_update_seconds", "Wall seconds to verify and apply one version", buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30)
)

POLICY_STEP = Gauge("mars_rollout_policy_step", "Step of the served policy version")
POLICY_INCARNATION = Gauge("mars_rollout_policy_incarnation", "Incarnation of the served policy version")


def count_group(group: RolloutGroup) -> None:
    """Count a group that was made."""
    purpose = group.prompt.purpose.value
    GROUPS.labels(purpose=purpose, outcome="made").inc()
    GENERATION_SECONDS.labels(purpose=purpose).observe(group.generation_s)
    for completion in group.completions:
        TOKENS.labels(purpose=purpose, kind=completion.kind.value).inc(len(completion.token_ids))


def count_update(version: PolicyVersion, seconds: float) -> None:
    """Count an applied version."""
    UPDATES.inc()
    UPDATE_SECONDS.observe(seconds)
    POLICY_STEP.set(version.step)
    POLICY_INCARNATION.set(version.incarnation)
