"""Scored groups become credits: shaping, the choice of advantage, what counts as signal."""

from __future__ import annotations

from typing import Any

import pytest

from builders import make_completion, make_group, make_prompt, make_score, make_scored, sampling, scored_with
from mars_shared.contracts import FinishReason, ScoredGroup, expected_members
from mars_shared.settings import TrainSection
from mars_trainer.credit import Credit, credit

MONO = {"visible": (1.0,), "infrared": (0.0,)}
LONGEST = 8


def credit_of(scored: ScoredGroup, **train: Any) -> Credit:
    return credit(scored, TrainSection(steps=1, prompts_per_step=1, learning_rate=1e-3, **train), LONGEST)


def with_lengths(tokens: tuple[int, ...], rewards: tuple[float, ...]) -> ScoredGroup:
    """G = 2, K = 2, M = 1; lengths and rewards of the four members in canonical order; 8 tokens mean cut off."""
    prompt = make_prompt(spec=sampling(2, 1))
    members = [
        make_completion(
            prompt.task_id, *member, tokens=count, finish_reason=FinishReason.LENGTH if count == LONGEST else FinishReason.STOP
        )
        for member, count in zip(expected_members(prompt), tokens, strict=True)
    ]
    return make_scored(make_group(prompt, members), [make_score(reward) for reward in rewards])


def test_the_setting_chooses_the_advantage() -> None:
    scored = scored_with((2.0, 0.0), MONO)
    # mars: pool (2, 0, 1, 0), mean 3/4, unscaled A = (1.25, -0.75). grpo, dr_grpo: mean 1, A = (1, -1) before scaling by
    # sample std sqrt(2).
    assert credit_of(scored, scale_rewards=False).advantages.advantages_G == (1.25, -0.75)
    assert credit_of(scored, advantage="dr_grpo").advantages.advantages_G == (1.0, -1.0)
    assert credit_of(scored, advantage="grpo").advantages.advantages_G == pytest.approx((0.7071063, -0.7071063), abs=1e-6)
    assert {credit_of(scored, advantage=name).advantages.gain for name in ("mars", "grpo", "dr_grpo")} == {0.5}


def test_overlong_completions_of_both_kinds_are_punished() -> None:
    # Buffer 4 of 8 tokens: lengths 4, 6, 8, 5 cost 0, 0.5, 1, 0.25. Rewards (1, 1), 1, 1 become (1, 0.5), 0, 0.75:
    # mean 0.5625, unscaled A = (0.4375, -0.0625); gain 0.75 - 0.375.
    result = credit_of(with_lengths((4, 6, 8, 5), (1, 1, 1, 1)), overlong_buffer=4, scale_rewards=False)
    assert result.advantages.advantages_G == (0.4375, -0.0625)
    assert result.advantages.gain == 0.375
    assert result.overlong_G == (0.0, -0.5)


def test_without_a_buffer_length_costs_nothing() -> None:
    result = credit_of(with_lengths((4, 6, 8, 5), (1, 1, 1, 1)))
    assert result.overlong_G == (0.0, 0.0) and result.advantages.advantages_G == (0.0, 0.0)


def test_truncated_completions_are_masked_on_request_alone() -> None:
    scored = with_lengths((8, 6, 5, 5), (1, 0, 1, 1))
    assert credit_of(scored).trained_G == (True, True)
    assert credit_of(scored, mask_truncated_completions=True).trained_G == (False, True)


def test_a_group_whose_completions_are_all_masked_has_no_signal() -> None:
    scored = with_lengths((8, 8, 5, 5), (1, 0, 1, 1))
    assert credit_of(scored).signal
    assert not credit_of(scored, mask_truncated_completions=True).signal


@pytest.mark.parametrize(
    ("multi", "mono", "pool", "plain"),
    [
        ((1.0, 0.0), MONO, True, True),
        # All fused completions fail while one source succeeds: a signal for MARS, none for the plain criterion.
        ((0.0, 0.0), MONO, True, False),
        ((0.0, 0.0), {"visible": (0.0,), "infrared": (0.0,)}, False, False),
        ((1.0, 1.0), {}, False, False),
    ],
)
def test_signal_by_the_pool_or_by_multi_source_rewards_alone(
    multi: tuple[float, ...], mono: dict[str, tuple[float, ...]], pool: bool, plain: bool
) -> None:
    scored = scored_with(multi, mono)
    assert credit_of(scored, dynamic_sampling="pool").signal is pool
    assert credit_of(scored, dynamic_sampling="multi").signal is plain
    assert credit_of(scored, advantage="grpo", dynamic_sampling="pool").signal is plain
