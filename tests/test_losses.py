"""The policy loss against hand-computed numbers; splitting a batch changes neither loss nor gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from mars_trainer.algorithm.losses import (
    ImportanceCorrection,
    LossType,
    PolicyLoss,
    importance_weights,
    k3_kl,
    loss_weights,
    policy_loss,
)

EPSILON, EPSILON_HIGH = 0.2, 0.3


def one_token(ratio: float, advantage: float, **arguments: Any) -> tuple[PolicyLoss, float]:
    """The loss of one token whose probability changed by `ratio`, and its gradient by the token's log-probability."""
    logprob = tensor([[-1.0 + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, one = tensor([[-1.0]], dtype=torch.float64), tensor([[1.0]], dtype=torch.float64)
    result = policy_loss(
        logprob, old, tensor([advantage], dtype=torch.float64), one, one, epsilon=EPSILON, epsilon_high=EPSILON_HIGH, **arguments
    )
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    return result, gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # Inside the clip range: -ratio * A, and d(ratio)/d(logprob) = ratio.
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        (1.0, 0.0, 0.0, 0.0),
        # Already pushed far enough: -clip(ratio) * A, a constant.
        (1.5, 2.0, -1.3 * 2, 0.0),
        (0.5, -2.0, 0.8 * 2, 0.0),
        # Pushed the wrong way: the minimum keeps the unclipped value and its gradient.
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        # Beyond the lower and below the upper bound, which differ.
        (1.25, 2.0, -2.5, -2.5),
        (0.75, -2.0, 0.8 * 2, 0.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    result, slope = one_token(ratio, advantage)
    assert math.isclose(result.loss.item(), loss, abs_tol=1e-12)
    assert math.isclose(slope, gradient, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high"),
    [(1.5, 1.0, 0, 1), (1.5, -1.0, 0, 0), (0.5, -1.0, 1, 0), (0.5, 1.0, 0, 0), (1.0, 1.0, 0, 0), (1.5, 0.0, 0, 0)],
)
def test_clipped_tokens_are_counted_where_clipping_took_the_gradient(ratio: float, advantage: float, low: int, high: int) -> None:
    result, _ = one_token(ratio, advantage)
    assert (result.clipped_low_sum.item(), result.clipped_high_sum.item(), result.tokens.item()) == (low, high, 1)


def test_k3_by_hand() -> None:
    # d = ref - logprob: exp(d) - d - 1. d = ln 2: 2 - 0.693147 - 1; d = -ln 2: 0.5 + 0.693147 - 1; d = 0: 0.
    actual = k3_kl(tensor([-1.0, -1.0, -1.0]), tensor([-1.0 + math.log(2), -1.0 - math.log(2), -1.0]))
    torch.testing.assert_close(actual, tensor([0.306853, 0.193147, 0.0]), atol=1e-6, rtol=0)


@given(logprob=st.floats(-20, 0), ref=st.floats(-20, 0))
def test_k3_is_never_negative(logprob: float, ref: float) -> None:
    assert k3_kl(tensor(logprob, dtype=torch.float64), tensor(ref, dtype=torch.float64)).item() >= -1e-12


def test_k3_is_the_kl_divergence_on_average() -> None:
    # Over p = (0.5, 0.3, 0.2) against q = (0.2, 0.2, 0.6): sum p ln(p / q).
    p, q = tensor([0.5, 0.3, 0.2], dtype=torch.float64), tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    assert math.isclose((p * k3_kl(p.log(), q.log())).sum().item(), (p * (p / q).log()).sum().item(), rel_tol=1e-12)


def test_the_kl_enters_with_beta_and_pulls_towards_the_reference() -> None:
    # ratio 1, A = 2: surrogate -2. ref is ln 2 above: k3 = 0.306853, its slope 1 - exp(d) = -1. beta = 0.1.
    result, slope = one_token(1.0, 2.0, beta=0.1, ref_logprobs_BT=tensor([[-1.0 + math.log(2)]], dtype=torch.float64))
    assert math.isclose(result.loss.item(), -2 + 0.1 * (1 - math.log(2)), rel_tol=1e-12)
    assert math.isclose(slope, -2 - 0.1, rel_tol=1e-12)
    assert math.isclose(result.kl_sum.item(), 1 - math.log(2), rel_tol=1e-12)


def test_the_kl_is_not_clipped_away() -> None:
    _, slope = one_token(1.5, 2.0, beta=0.1, ref_logprobs_BT=tensor([[-1.0 + math.log(1.5)]], dtype=torch.float64))
    assert math.isclose(slope, 0.0, abs_tol=1e-12)
    _, slope = one_token(1.5, 2.0, beta=0.1, ref_logprobs_BT=tensor([[-1.0]], dtype=torch.float64))
    # d = -ln 1.5: slope 1 - exp(d) = 1 - 2/3.
    assert math.isclose(slope, 0.1 / 3, rel_tol=1e-9)


def test_a_kl_without_a_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="beta is 0.1 but there are no reference"):
        one_token(1.0, 1.0, beta=0.1)


def test_token_weights_by_hand() -> None:
    mask = tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 1]])
    # dapo: each of the 6 tokens 1/6. grpo: each of the 3 completions 1/3, shared by its tokens.
    dapo = loss_weights(mask, "dapo", batch_completions=3, batch_tokens=6, max_completion_length=8)
    torch.testing.assert_close(dapo, mask / 6)
    grpo = loss_weights(mask, "grpo", batch_completions=3, batch_tokens=6, max_completion_length=8)
    torch.testing.assert_close(grpo, tensor([[1 / 6, 1 / 6, 0], [1 / 3, 0, 0], [1 / 9, 1 / 9, 1 / 9]]))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_a_batch_of_empty_completions_weighs_nothing(loss_type: LossType) -> None:
    weights = loss_weights(torch.zeros(2, 1), loss_type, batch_completions=2, batch_tokens=0, max_completion_length=8)
    assert torch.equal(weights, torch.zeros(2, 1))


def random_batch(lengths: list[int], seed: int) -> tuple[Tensor, ...]:
    """logprobs, old, ref (all B x T), advantages (B) and mask (B x T) of completions with these lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    logprobs, noise, other = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = (torch.arange(shape[1]) < tensor(lengths)[:, None]).double()
    return -logprobs, -logprobs + (noise - 0.5), -other, torch.randn(len(lengths), generator=generator, dtype=torch.float64), mask


def loss_and_gradient(
    batch: tuple[Tensor, ...], loss_type: LossType, parts: list[list[int]]
) -> tuple[float, Tensor, list[float]]:
    """Sum over microbatches, each cut to its own longest completion, as the trainer pads them."""
    logprobs, old, ref, advantages, mask = batch
    leaf = logprobs.clone().requires_grad_()
    tokens, total, weight_sums = int(mask.sum()), 0.0, []
    for rows in parts:
        width = int(mask[rows].sum(dim=1).max())
        part = mask[rows, :width]
        weights = loss_weights(part, loss_type, batch_completions=len(mask), batch_tokens=tokens, max_completion_length=8)
        result = policy_loss(
            leaf[rows, :width],
            old[rows, :width],
            advantages[rows],
            part,
            weights,
            epsilon=EPSILON,
            epsilon_high=EPSILON_HIGH,
            ref_logprobs_BT=ref[rows, :width],
            beta=0.1,
        )
        result.loss.backward()
        total += result.loss.item()
        weight_sums.append(weights.sum().item())
    assert leaf.grad is not None
    return total, leaf.grad, weight_sums


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    loss_type=st.sampled_from(["grpo", "dapo", "dr_grpo"]),
    cuts=st.sets(st.integers(1, 6)),
    seed=st.integers(0, 2**31),
)
def test_microbatches_change_neither_loss_nor_gradient(
    lengths: list[int], loss_type: LossType, cuts: set[int], seed: int
) -> None:
    batch = random_batch(lengths, seed)
    rows = list(range(len(lengths)))
    edges = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    parts = [rows[a:b] for a, b in itertools.pairwise(edges)]
    whole, whole_gradient, whole_weights = loss_and_gradient(batch, loss_type, [rows])
    split, split_gradient, split_weights = loss_and_gradient(batch, loss_type, parts)
    assert math.isclose(whole, split, rel_tol=1e-9, abs_tol=1e-12)
    torch.testing.assert_close(whole_gradient, split_gradient)
    total = sum(lengths) / (8 * len(lengths)) if loss_type == "dr_grpo" else 1
    assert math.isclose(sum(whole_weights), total) and math.isclose(sum(split_weights), total)


@pytest.mark.parametrize("rubbish", [7.5, -math.inf, math.nan])
def test_padding_reaches_neither_loss_nor_gradient_nor_counts(rubbish: float) -> None:
    logprobs, old, ref, advantages, mask = random_batch([2, 4], seed=3)
    clean = loss_and_gradient((logprobs, old, ref, advantages, mask), "grpo", [[0, 1]])
    dirty = [values.masked_fill(mask == 0, rubbish) for values in (logprobs, old, ref)]
    total, gradient, _ = loss_and_gradient((*dirty, advantages, mask), "grpo", [[0, 1]])
    assert math.isclose(total, clean[0]) and torch.equal(gradient, clean[1])
    assert torch.equal(gradient[mask == 0], torch.zeros(2, dtype=torch.float64))


def test_at_ratio_1_the_gradient_is_the_plain_policy_gradient() -> None:
    """d loss / d logprob = -A_i * weight, whatever the clip range."""
    logprobs, _, _, advantages, mask = random_batch([3, 2], seed=1)
    leaf = logprobs.clone().requires_grad_()
    weights = loss_weights(mask, "dapo", batch_completions=2, batch_tokens=5, max_completion_length=8)
    result = policy_loss(leaf, leaf.detach(), advantages, mask, weights, epsilon=0.0, epsilon_high=0.0)
    result.loss.backward()
    torch.testing.assert_close(leaf.grad, -advantages[:, None] * mask / 5)
    assert result.clipped_low_sum.item() == result.clipped_high_sum.item() == 0


def test_the_counts_are_sums_over_completion_tokens() -> None:
    # Ratios 2 and 0.5 in each row, the third token is padding; A = (1, -1): one clipped high, one clipped low.
    old = torch.full((2, 3), -1.0)
    logprobs = old + tensor([[math.log(2), math.log(0.5), 0.9]] * 2)
    mask = tensor([[1.0, 1, 0]] * 2)
    result = policy_loss(
        logprobs, old, tensor([1.0, -1.0]), mask, mask / 4, epsilon=0.2, epsilon_high=0.2, ref_logprobs_BT=old, beta=0.0
    )
    assert (result.clipped_low_sum.item(), result.clipped_high_sum.item(), result.tokens.item()) == (1, 1, 4)
    # Row 1: min(2, 1.2) + 0.5 = 1.7; row 2: -max(2, 1.2) - max(0.5, 0.8) = -2.8; loss = -(1.7 - 2.8) / 4.
    assert math.isclose(result.loss.item(), 1.1 / 4, rel_tol=1e-6)
    # k3 at d = -ln 2 and ln 2, twice: 2 * (0.193147 + 0.306853) = 1.
    assert math.isclose(result.kl_sum.item(), 1.0, rel_tol=1e-6)


def test_dr_grpo_weighs_every_token_the_same_whatever_the_lengths() -> None:
    mask = tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 1]])
    # 3 completions of at most 5 tokens: 1 / 15 each.
    actual = loss_weights(mask, "dr_grpo", batch_completions=3, batch_tokens=6, max_completion_length=5)
    torch.testing.assert_close(actual, mask / 15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "counted"),
    [
        # A < 0 and ratio > c = 3: the loss stays at -c * A and its gradient ends.
        (5.0, -2.0, 6.0, 0.0, 1),
        # Below c nothing changes, nor where A > 0.
        (2.5, -2.0, 5.0, 5.0, 0),
        (0.5, -2.0, 1.6, 0.0, 0),
        (5.0, 2.0, -2.6, 0.0, 0),
        (1.0, 2.0, -2.0, -2.0, 0),
    ],
)
def test_the_dual_clip_bounds_negative_advantages(
    ratio: float, advantage: float, loss: float, gradient: float, counted: int
) -> None:
    result, slope = one_token(ratio, advantage, dual_clip=3.0)
    assert math.isclose(result.loss.item(), loss, abs_tol=1e-12)
    assert math.isclose(slope, gradient, abs_tol=1e-12)
    assert result.clipped_dual_sum.item() == counted


def test_a_dual_clip_inside_the_upper_clip_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"dual_clip is 1.3; expected more than 1 \+ epsilon_high"):
        one_token(1.0, 1.0, dual_clip=1.3)


def test_importance_weighs_the_surrogate_and_not_the_kl() -> None:
    # ratio 1, A = 2, importance 0.5: -1; k3 at d = ln 2 is 0.306853.
    reference = tensor([[-1.0 + math.log(2)]], dtype=torch.float64)
    result, slope = one_token(1.0, 2.0, importance_BT=tensor([[0.5]]), beta=0.1, ref_logprobs_BT=reference)
    assert math.isclose(result.loss.item(), -1 + 0.1 * (1 - math.log(2)), rel_tol=1e-9)
    assert math.isclose(slope, -1 - 0.1, rel_tol=1e-9)


RATIOS = tensor([[2.0, 0.5, 3.0], [1.0, 4.0, 9.0]])
"""Of the old policy to the sampler; the last token of the second completion is padding."""


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 2.5], [1.0, 2.5, 1.0]]),
        ("token_mask", [[2.0, 0.5, 0.0], [1.0, 0.0, 1.0]]),
        # Products: 2 * 0.5 * 3 = 3 and 1 * 4 = 4.
        ("sequence_truncate", [[2.5], [2.5]]),
        ("sequence_mask", [[0.0], [0.0]]),
    ],
)
def test_importance_weights_by_hand(correction: ImportanceCorrection, expected: list[list[float]]) -> None:
    sampler = torch.full((2, 3), -1.0)
    mask = tensor([[1.0, 1, 1], [1, 1, 0]])
    actual = importance_weights(sampler + RATIOS.log(), sampler, mask, correction, cap=2.5)
    assert actual is not None
    torch.testing.assert_close(actual, tensor(expected))


def test_importance_weights_carry_no_gradient_and_none_is_none() -> None:
    old = torch.zeros(1, 2, requires_grad=True)
    weights = importance_weights(old, torch.zeros(1, 2), torch.ones(1, 2), "token_truncate", cap=2.0)
    assert weights is not None and not weights.requires_grad
    assert importance_weights(old, torch.zeros(1, 2), torch.ones(1, 2), "none", cap=2.0) is None


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("correction", ["token_mask", "sequence_truncate"])
def test_padding_does_not_enter_importance_weights(correction: ImportanceCorrection, rubbish: float) -> None:
    mask = tensor([[1.0, 0.0]])
    actual = importance_weights(tensor([[0.0, rubbish]]), torch.zeros(1, 2), mask, correction, cap=2.0)
    assert actual is not None and torch.equal(actual, torch.ones_like(actual))
