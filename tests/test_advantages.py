"""Hybrid advantages against hand-computed numbers and the identities of the method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mars_trainer.algorithm.advantages import (
    EPS,
    GroupAdvantages,
    dr_grpo_advantages,
    grpo_advantages,
    mars_advantages,
)

rewards = st.floats(-10, 10, allow_nan=False)
multi_rewards = st.lists(rewards, min_size=1, max_size=16)


@st.composite
def equal_mono_rewards(draw: st.DrawFn, *, min_mono: int = 1) -> dict[str, list[float]]:
    """K from 1 to 8 sources with M from `min_mono` to 4 rewards each."""
    num_sources, num_mono = draw(st.integers(1, 8)), draw(st.integers(min_mono, 4))
    return {f"source-{k}": draw(st.lists(rewards, min_size=num_mono, max_size=num_mono)) for k in range(num_sources)}


mono_rewards = equal_mono_rewards()
any_mono_rewards = equal_mono_rewards(min_mono=0)


def close(actual: Sequence[float], expected: Sequence[float], tolerance: float = 1e-9) -> bool:
    return len(actual) == len(expected) and all(
        math.isclose(a, b, abs_tol=tolerance) for a, b in zip(actual, expected, strict=True)
    )


def test_a_group_by_hand() -> None:
    # r = (1, 0), s = (1, 1): N = 4, mu = 3/4, squares 3 * 1/16 + 9/16 = 12/16, sigma = sqrt(0.75 / 3) = 0.5.
    # A = (0.25, -0.75) / 0.500001. r_bar = 0.5, s_bar = 1, so gain = -0.5: a conflict.
    group = mars_advantages((1, 0), {"visible": (1,), "infrared": (1,)})
    assert close(group.advantages_G, (0.25 / 0.500001, -0.75 / 0.500001))
    assert (group.pool_mean, group.pool_std, group.gain) == (0.75, 0.5, -0.5)
    assert group.gain_by_source == {"visible": -0.5, "infrared": -0.5}


def test_the_pool_is_weighted_by_completions_and_not_by_sources() -> None:
    # r = (2, 0), s = {a: (1, 1), b: (5,)}: pool (2, 0, 1, 1, 5), mu = 9/5 = 1.8,
    # squares 0.04 + 3.24 + 0.64 + 0.64 + 10.24 = 14.8, sigma = sqrt(14.8 / 4) = sqrt(3.7);
    # r_bar = 1, s_bar = 7/3, gain = -4/3; against a alone 0, against b alone -4.
    group = mars_advantages((2, 0), {"a": (1, 1), "b": (5,)})
    sigma = math.sqrt(3.7)
    assert close(group.advantages_G, (0.2 / (sigma + 1e-6), -1.8 / (sigma + 1e-6)))
    assert group.gain is not None and math.isclose(group.gain, -4 / 3)
    assert group.gain_by_source == {"a": 0.0, "b": -4.0}


def test_fusion_that_beats_its_sources_is_pushed_up_as_a_whole() -> None:
    # r = (1, 1), s = (0, 0): mu = 0.5, sigma = sqrt(4 * 0.25 / 3), both A = 0.5 / sigma > 0 although r has no spread.
    group = mars_advantages((1, 1), {"visible": (0,), "infrared": (0,)})
    assert close(group.advantages_G, (0.5 / (math.sqrt(1 / 3) + 1e-6),) * 2)
    assert group.gain == 1


def test_one_multi_source_completion_with_mono_ones_is_a_valid_pool() -> None:
    # r = (1,), s = (0, 0): mu = 1/3, squares 4/9 + 1/9 + 1/9 = 2/3, sigma = sqrt(2/3 / 2) = sqrt(1/3); A = (2/3) / sigma.
    group = mars_advantages((1,), {"visible": (0,), "infrared": (0,)})
    assert close(group.advantages_G, ((2 / 3) / (math.sqrt(1 / 3) + 1e-6),))


def test_a_pool_of_one_reward_has_no_signal() -> None:
    group = mars_advantages((0.7,), {})
    assert group == GroupAdvantages((0.0,), 0.7, 0.0, None, {})


@given(value=rewards, generations=st.integers(1, 8), mono=st.integers(0, 3))
def test_a_pool_of_equal_rewards_gives_zero_to_all(value: float, generations: int, mono: int) -> None:
    group = mars_advantages((value,) * generations, {"visible": (value,) * mono})
    assert group.advantages_G == (0.0,) * generations
    assert group.pool_std == 0.0


def test_without_mono_rollouts_it_is_grpo_and_the_gain_is_undefined() -> None:
    # r = (1, 0, 0, 0): mean 0.25, sample std sqrt((9/16 + 3/16) / 3) = 0.5.
    expected = (0.75 / 0.500001, *(-0.25 / 0.500001,) * 3)
    for group in (
        grpo_advantages((1, 0, 0, 0)),
        mars_advantages((1, 0, 0, 0), {}),
        mars_advantages((1, 0, 0, 0), {"visible": ()}),
    ):
        assert close(group.advantages_G, expected)
        assert group.gain is None and group.gain_by_source == {}


def test_without_scaling_only_the_mean_is_subtracted() -> None:
    group = mars_advantages((1, 0), {"visible": (1,), "infrared": (1,)}, scale_rewards=False)
    assert close(group.advantages_G, (0.25, -0.75))
    assert close(grpo_advantages((3, 1), scale_rewards=False).advantages_G, (1, -1))


@given(multi=multi_rewards, mono=mono_rewards)
def test_each_deviation_is_the_weighted_sum_of_its_two_anchors(multi: list[float], mono: dict[str, list[float]]) -> None:
    """r_i - mu = lambda * (r_i - r_bar) + (1 - lambda) * (r_i - s_bar)"""
    singles = list(itertools.chain.from_iterable(mono.values()))
    share = len(multi) / (len(multi) + len(singles))
    r_bar, s_bar = math.fsum(multi) / len(multi), math.fsum(singles) / len(singles)
    group = mars_advantages(multi, mono, scale_rewards=False)
    assert close(group.advantages_G, [share * (r - r_bar) + (1 - share) * (r - s_bar) for r in multi])


@given(multi=multi_rewards, mono=mono_rewards)
def test_the_mean_advantage_is_the_gain_on_the_scale_of_the_pool(multi: list[float], mono: dict[str, list[float]]) -> None:
    """mean(A) = (1 - lambda) * gain / (sigma + eps)"""
    singles = list(itertools.chain.from_iterable(mono.values()))
    share = len(multi) / (len(multi) + len(singles))
    group = mars_advantages(multi, mono)
    assert group.gain is not None
    mean = math.fsum(group.advantages_G) / len(multi)
    assert math.isclose(mean, (1 - share) * group.gain / (group.pool_std + EPS), rel_tol=1e-9, abs_tol=1e-7)


@given(multi=multi_rewards, mono=mono_rewards, order=st.randoms(use_true_random=False))
def test_the_order_of_completions_and_sources_does_not_matter(
    multi: list[float], mono: dict[str, list[float]], order: object
) -> None:
    positions = list(range(len(multi)))
    order.shuffle(positions)  # type: ignore[attr-defined]
    turned = {name: list(reversed(mono[name])) for name in reversed(list(mono))}
    straight = mars_advantages(multi, mono)
    shuffled = mars_advantages([multi[p] for p in positions], turned)
    assert close(shuffled.advantages_G, [straight.advantages_G[p] for p in positions])
    assert close(
        [shuffled.pool_mean, shuffled.pool_std, shuffled.gain or 0], [straight.pool_mean, straight.pool_std, straight.gain or 0]
    )


@given(multi=multi_rewards, sources=st.integers(0, 8))
def test_without_mono_rollouts_mars_is_grpo_and_advantages_sum_to_zero(multi: list[float], sources: int) -> None:
    group = mars_advantages(multi, {f"source-{k}": [] for k in range(sources)})
    assert math.isclose(math.fsum(group.advantages_G), 0, abs_tol=1e-7)
    assert group == grpo_advantages(multi)


@given(multi=multi_rewards, mono=any_mono_rewards)
def test_grpo_looks_at_mono_rollouts_for_the_gain_alone(multi: list[float], mono: dict[str, list[float]]) -> None:
    group, hybrid = grpo_advantages(multi, mono), mars_advantages(multi, mono)
    assert group.advantages_G == grpo_advantages(multi).advantages_G
    assert (group.gain, group.gain_by_source) == (hybrid.gain, hybrid.gain_by_source)


@given(multi=multi_rewards, mono=any_mono_rewards)
def test_dr_grpo_is_grpo_without_the_division(multi: list[float], mono: dict[str, list[float]]) -> None:
    mean = math.fsum(multi) / len(multi)
    assert close(dr_grpo_advantages(multi, mono).advantages_G, [r - mean for r in multi])


@given(multi=multi_rewards, mono=any_mono_rewards)
def test_hybrid_advantages_are_zero_exactly_when_the_pool_has_no_spread(multi: list[float], mono: dict[str, list[float]]) -> None:
    pool = [*multi, *itertools.chain.from_iterable(mono.values())]
    spread = max(pool) - min(pool)
    assume(spread == 0 or spread > 1e-9)  # squares of still smaller ones vanish
    group = mars_advantages(multi, mono)
    assert (group.pool_std == 0) == (spread == 0)
    if spread == 0:
        assert set(group.advantages_G) == {0.0}


@pytest.mark.parametrize(("generations", "sources", "mono"), [(4, 2, 1), (2, 3, 2), (6, 0, 0), (3, 1, 4)])
def test_the_expected_gradient_by_monte_carlo(generations: int, sources: int, mono: int) -> None:
    """The first theorem by sampling groups from a categorical policy; the next test goes through all of them."""
    rng = np.random.default_rng(0)
    p, q, reward = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6]), np.array([0.0, 1.0, 3.0])
    samples = 20_000
    answers = rng.choice(3, size=(samples, generations), p=p)
    singles = reward[rng.choice(3, size=(samples, sources, mono), p=q)]
    estimates = np.zeros((samples, 3))
    for index in range(samples):
        by_source = {str(k): singles[index, k].tolist() for k in range(sources)}
        group = mars_advantages(reward[answers[index]].tolist(), by_source, scale_rewards=False)
        scores = np.eye(3)[answers[index]] - p
        estimates[index] = (np.array(group.advantages_G)[:, None] * scores).mean(axis=0)
    expected = (1 - 1 / (generations + sources * mono)) * p * (reward - (p * reward).sum())
    deviation = (estimates.mean(axis=0) - expected) / (estimates.std(axis=0) / math.sqrt(samples))
    assert np.abs(deviation).max() < 4, deviation


@given(multi=multi_rewards, mono=mono_rewards, shift=st.floats(-5, 5))
def test_a_constant_added_to_all_rewards_changes_no_advantage(
    multi: list[float], mono: dict[str, list[float]], shift: float
) -> None:
    moved = mars_advantages(
        [r + shift for r in multi], {name: [s + shift for s in values] for name, values in mono.items()}, scale_rewards=False
    )
    assert close(moved.advantages_G, mars_advantages(multi, mono, scale_rewards=False).advantages_G)


@given(multi=multi_rewards, mono=mono_rewards)
def test_advantages_are_always_finite_and_ordered_as_the_rewards(multi: list[float], mono: dict[str, list[float]]) -> None:
    group = mars_advantages(multi, mono)
    assert all(math.isfinite(a) for a in group.advantages_G)
    pairs = sorted(zip(multi, group.advantages_G, strict=True))
    assert all(low <= high for (_, low), (_, high) in itertools.pairwise(pairs))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("multi", "mono", "name"),
    [
        ((1, None, 0), {"visible": (0,)}, "multi-source completion 1"),
        ((1, 0), {"visible": (0,), "infrared": (0, None)}, "infrared completion 1"),
        ((None, 0), {"multi-source": (0,)}, "multi-source completion 0"),
    ],
)
def test_a_reward_that_is_not_finite_is_an_error_that_names_the_completion(
    value: float, multi: Sequence[float | None], mono: Mapping[str, Sequence[float | None]], name: str
) -> None:
    def filled(values: Sequence[float | None]) -> list[float]:
        return [value if item is None else item for item in values]

    with pytest.raises(ValueError, match=f"{name} is {value}; expected a finite number"):
        mars_advantages(filled(multi), {source: filled(values) for source, values in mono.items()})


def test_no_multi_source_reward_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one multi-source reward"):
        mars_advantages((), {"visible": (1,)})


@pytest.mark.parametrize(("generations", "sources", "mono"), [(2, 0, 0), (3, 0, 0), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2)])
def test_the_expected_gradient_is_the_true_one_times_1_minus_1_over_n(generations: int, sources: int, mono: int) -> None:
    """The first theorem without the division by sigma, exactly, by going through every possible group.

    A policy over three answers with probabilities p and rewards R; d/d theta_a log p(y) = [y = a] - p_a, so the true
    gradient is p_a * (R_a - E[R]). Single sources see another question, here answered with probabilities q.
    """
    p, q, reward = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)), (Fraction(1, 5), Fraction(1, 5), Fraction(3, 5)), (0, 1, 3)
    singles = sources * mono
    total = generations + singles
    expected_reward = sum(probability * value for probability, value in zip(p, reward, strict=True))
    true_gradient = [p[a] * (reward[a] - expected_reward) for a in range(3)]
    gradient = [0.0, 0.0, 0.0]
    for answers in itertools.product(range(3), repeat=total):
        multi, single = answers[:generations], answers[generations:]
        chance = math.prod(p[y] for y in multi) * math.prod(q[y] for y in single)
        by_source = {f"source-{k}": [reward[y] for y in single[k * mono : (k + 1) * mono]] for k in range(sources)}
        advantages = mars_advantages([reward[y] for y in multi], by_source, scale_rewards=False).advantages_G
        for a in range(3):
            score = sum((float(y == a) - float(p[a])) * advantage for y, advantage in zip(multi, advantages, strict=True))
            gradient[a] += float(chance) * score / generations
    assert close(gradient, [float(g) * (1 - 1 / total) for g in true_gradient])
