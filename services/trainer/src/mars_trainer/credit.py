"""What a scored group's completions are credited with: shaped rewards, advantages, a place in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mars_shared.contracts import Completion, FinishReason, Kind, ScoredGroup
from mars_shared.settings import TrainSection
from mars_trainer.algorithm.advantages import GroupAdvantages, dr_grpo_advantages, grpo_advantages, mars_advantages
from mars_trainer.algorithm.filters import has_signal, overlong_punishment


@dataclass(frozen=True)
class Credit:
    """Of one group; G multi-source completions in their order.

    Attributes:
        advantages: with the statistics they come from, after overlong punishment.
        trained_G: whether a completion enters the loss; a truncated one may be masked.
        overlong_G: the overlong punishment in its reward, 0 or below.
        signal: whether the group can teach anything, by the recipe's criterion.
    """

    advantages: GroupAdvantages
    trained_G: tuple[bool, ...]
    overlong_G: tuple[float, ...]
    signal: bool


def credit(scored: ScoredGroup, train: TrainSection, max_completion_length: int) -> Credit:
    """Shape a group's rewards and normalise them as the recipe says.

    Overlong punishment applies to mono-source completions too: the pool compares like with like.
    """
    multi_members = [c for c in scored.group.completions if c.kind is Kind.MULTI]
    overlong_G = _overlong(multi_members, train, max_completion_length)
    multi = _sum(scored.rewards(Kind.MULTI), overlong_G)
    mono = {
        source.name: _mono_rewards(scored, source.name, train, max_completion_length) for source in scored.group.prompt.sources
    }
    if train.advantage == "dr_grpo":
        advantages = dr_grpo_advantages(multi, mono)
    else:
        normalise = mars_advantages if train.advantage == "mars" else grpo_advantages
        advantages = normalise(multi, mono, scale_rewards=train.scale_rewards)
    trained_G = tuple(not (train.mask_truncated_completions and c.finish_reason is FinishReason.LENGTH) for c in multi_members)
    spread = has_signal(multi) if train.dynamic_sampling == "multi" else advantages.pool_std > 0
    return Credit(advantages, trained_G, overlong_G, signal=spread and any(trained_G))


def _mono_rewards(scored: ScoredGroup, name: str, train: TrainSection, max_length: int) -> tuple[float, ...]:
    members = [c for c in scored.group.completions if c.kind is Kind.MONO and c.source == name]
    return _sum(scored.rewards(Kind.MONO, name), _overlong(members, train, max_length))


def _overlong(members: Sequence[Completion], train: TrainSection, max_length: int) -> tuple[float, ...]:
    buffer, penalty = train.overlong_buffer, train.overlong_penalty
    if buffer is None:
        return (0.0,) * len(members)
    return tuple(overlong_punishment(len(c.token_ids), max_length=max_length, buffer=buffer, penalty=penalty) for c in members)


def _sum(rewards: Sequence[float], punishments: Sequence[float]) -> tuple[float, ...]:
    return tuple(reward + punishment for reward, punishment in zip(rewards, punishments, strict=True))
