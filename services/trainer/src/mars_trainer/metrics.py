"""What a step reports, from its scored groups and the learner's numbers. Names as in docs/metrics.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from mars_shared.contracts import FinishReason, Kind, ScoredGroup
from mars_trainer.algorithm.advantages import GroupAdvantages
from mars_trainer.credit import Credit


def rollout_metrics(groups: Sequence[ScoredGroup], credits: Sequence[Credit]) -> dict[str, float]:
    """Rewards, gains and lengths of a step's groups; a metric with nothing to average is left out."""
    if not groups:
        return {}
    advantages = [credit.advantages for credit in credits]
    multi_rewards = [reward for scored in groups for reward in scored.rewards(Kind.MULTI)]
    metrics = {
        "reward": _mean(multi_rewards),
        "reward_std": _mean(item.pool_std for item in advantages),
        "no_signal_rate": _mean(not credit.signal for credit in credits),
        "overlong_punishment": _mean(value for credit in credits for value in credit.overlong_G),
    }
    for name in sorted({key for scored in groups for key in _part_names(scored)}):
        metrics[f"reward/{name}"] = _mean(
            score.parts.get(name, 0.0)
            for scored in groups
            if name in _part_names(scored)
            for completion, score in zip(scored.group.completions, scored.scores, strict=True)
            if completion.kind is Kind.MULTI
        )
    return metrics | _gains(groups, advantages) | _lengths(groups)


def _part_names(scored: ScoredGroup) -> set[str]:
    """Parts of any of the group's rewards; a completion that lacks one earned nothing there."""
    return {name for score in scored.scores for name in score.parts}


def _gains(groups: Sequence[ScoredGroup], advantages: Sequence[GroupAdvantages]) -> dict[str, float]:
    gains = [item.gain for item in advantages if item.gain is not None]
    if not gains:
        return {}
    by_source: dict[str, list[float]] = {}
    for item in advantages:
        for name, gain in item.gain_by_source.items():
            by_source.setdefault(name, []).append(gain)
    return {
        "gain": _mean(gains),
        "promotion_rate": _mean(gain > 0 for gain in gains),
        "conflict_rate": _mean(gain < 0 for gain in gains),
        "multi_minus_union": _mean(_multi_minus_union(scored) for scored in groups),
        **{f"gain/{name}": _mean(values) for name, values in sorted(by_source.items())},
    }


def _multi_minus_union(scored: ScoredGroup) -> float:
    sources = [source.name for source in scored.group.prompt.sources]
    best = max(_mean(scored.rewards(Kind.MONO, name)) for name in sources)
    return _mean(scored.rewards(Kind.MULTI)) - best


def _lengths(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    completions = [c for scored in groups for c in scored.group.completions if c.kind is Kind.MULTI]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "completions/mean_length": _mean(lengths),
        "completions/median_length": float(statistics.median(lengths)),
        "completions/clipped_ratio": _mean(c.finish_reason is FinishReason.LENGTH for c in completions),
    }


def staleness_metrics(groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
    """By how many steps the policy at `step` is ahead of the policies that sampled the multi-source tokens it trains on."""
    lags = [
        (step - span.version.step, span.end - span.start)
        for scored in groups
        for completion in scored.group.completions
        if completion.kind is Kind.MULTI
        for span in completion.spans
    ]
    tokens = sum(count for _, count in lags)
    if not tokens:
        return {}
    return {"staleness/mean": sum(lag * count for lag, count in lags) / tokens, "staleness/max": float(max(lags)[0])}


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as they are.

    Raises:
        ValueError: one is not finite; a NaN never reaches a log unseen.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"metric {name} is {value}; expected a finite number")
    return dict(metrics)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
