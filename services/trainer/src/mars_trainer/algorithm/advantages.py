"""Advantages: hybrid ones (MARS), over the union of multi- and mono-source rewards, and those of GRPO and Dr. GRPO.

MARS, arXiv 2605.25437. Notation: G multi-source rewards r_i; K sources with M mono-source
rewards s_kj each; N = G + K*M; the pool is all N rewards together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

EPS = 1e-6
NO_MONO: Mapping[str, Sequence[float]] = MappingProxyType({})


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of the G multi-source completions, and the statistics they come from.

    `gain` is mean(r) - mean(s): above 0 fusion beats its single sources (promotion), below 0
    it loses to them (conflict). None without mono-source rewards, where it is undefined.
    """

    advantages_G: tuple[float, ...]
    pool_mean: float
    pool_std: float
    gain: float | None
    gain_by_source: Mapping[str, float]


def mars_advantages(
    multi_rewards_G: Sequence[float],
    mono_rewards: Mapping[str, Sequence[float]],
    *,
    scale_rewards: bool = True,
) -> GroupAdvantages:
    """A_i = (r_i - mu) / (sigma + 1e-6), mu and sigma (ddof = 1) over the pool.

    With no mono-source rewards this is plain GRPO. A pool with zero std, or of one reward,
    gives A = 0 for all.

    Args:
        multi_rewards_G: r, at least one.
        mono_rewards: s by source name.
        scale_rewards: False leaves out the division by sigma (Dr. GRPO's choice).

    Raises:
        ValueError: no multi-source reward, or a reward that is not finite (named).

    Example:
        r = (1, 1, 0, 0), s = {"visible": (0,), "infrared": (1,)}: mu = 0.5,
        sigma = sqrt(6 * 0.25 / 5) = 0.5477, A = (+0.9129, +0.9129, -0.9129, -0.9129), gain = 0.
    """
    _check(multi_rewards_G, mono_rewards)
    pool = [*multi_rewards_G, *(reward for rewards in mono_rewards.values() for reward in rewards)]
    return _normalised(multi_rewards_G, mono_rewards, pool, scale_rewards=scale_rewards)


def grpo_advantages(
    multi_rewards_G: Sequence[float], mono_rewards: Mapping[str, Sequence[float]] = NO_MONO, *, scale_rewards: bool = True
) -> GroupAdvantages:
    """GRPO (arXiv 2402.03300): the pool is the multi-source rewards; mono-source ones give the gain and nothing else."""
    _check(multi_rewards_G, mono_rewards)
    return _normalised(multi_rewards_G, mono_rewards, multi_rewards_G, scale_rewards=scale_rewards)


def dr_grpo_advantages(
    multi_rewards_G: Sequence[float], mono_rewards: Mapping[str, Sequence[float]] = NO_MONO
) -> GroupAdvantages:
    """Dr. GRPO (arXiv 2503.20783): GRPO without the division by the std, which favours groups of small spread."""
    return grpo_advantages(multi_rewards_G, mono_rewards, scale_rewards=False)


def _normalised(
    multi_rewards_G: Sequence[float], mono_rewards: Mapping[str, Sequence[float]], pool: Sequence[float], *, scale_rewards: bool
) -> GroupAdvantages:
    pool_mean = math.fsum(pool) / len(pool)
    pool_std = _sample_std(pool, pool_mean)
    if pool_std == 0.0:
        advantages = (0.0,) * len(multi_rewards_G)
    else:
        divisor = pool_std + EPS if scale_rewards else 1.0
        advantages = tuple((reward - pool_mean) / divisor for reward in multi_rewards_G)
    mono = [reward for rewards in mono_rewards.values() for reward in rewards]
    multi_mean = math.fsum(multi_rewards_G) / len(multi_rewards_G)
    return GroupAdvantages(
        advantages_G=advantages,
        pool_mean=pool_mean,
        pool_std=pool_std,
        gain=multi_mean - math.fsum(mono) / len(mono) if mono else None,
        gain_by_source={name: multi_mean - math.fsum(s) / len(s) for name, s in mono_rewards.items() if s},
    )


def _check(multi_rewards_G: Sequence[float], mono_rewards: Mapping[str, Sequence[float]]) -> None:
    if not multi_rewards_G:
        raise ValueError("expected at least one multi-source reward, got none")
    for name, rewards in [("multi-source", multi_rewards_G), *mono_rewards.items()]:
        for index, reward in enumerate(rewards):
            if not math.isfinite(reward):
                raise ValueError(f"reward of {name} completion {index} is {reward}; expected a finite number")


def _sample_std(values: Sequence[float], mean: float) -> float:
    if len(values) < 2 or min(values) == max(values):
        return 0.0
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
