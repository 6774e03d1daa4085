"""Policy losses as pure functions of log-probabilities.

Shapes: B completions of at most T tokens, padded; `mask_BT` is 1 at completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dapo"]


@dataclass(frozen=True)
class PolicyLoss:
    """A loss to minimise and what is worth watching; the metrics are sums, for exact means over microbatches."""

    loss: Tensor
    kl_sum: Tensor
    clipped_low_sum: Tensor
    clipped_high_sum: Tensor
    tokens: Tensor


def loss_weights(mask_BT: Tensor, loss_type: LossType, *, batch_completions: int, batch_tokens: int) -> Tensor:
    """What each token weighs in the loss of the whole batch, of which B completions are a part.

    "dapo" (arXiv 2503.14476): 1 / tokens of the batch. "grpo" (arXiv 2402.03300): 1 / (its
    completion's tokens * completions of the batch). Weights of all parts of a batch sum to 1.

    Returns:
        Tensor[B, T]
    """
    if loss_type == "dapo":
        return mask_BT / max(batch_tokens, 1)
    return mask_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1) / batch_completions


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    weights_BT: Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    ref_logprobs_BT: Tensor | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """Clipped surrogate (PPO's) with an optional k3 KL to a reference policy.

    Per token: -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * k3,
    ratio = exp(logprobs - old_logprobs), k3 = exp(ref - logprobs) - (ref - logprobs) - 1
    (Schulman, "Approximating KL divergence"); summed with `weights_BT`.

    Raises:
        ValueError: beta > 0 without reference log-probabilities.
    """
    if beta > 0 and ref_logprobs_BT is None:
        raise ValueError(f"beta is {beta} but there are no reference log-probabilities")
    mask = mask_BT.bool()
    log_ratio = torch.where(mask, logprobs_BT - old_logprobs_BT, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages_B[:, None]
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(per_token)
    if ref_logprobs_BT is not None:
        kl = k3_kl(torch.where(mask, logprobs_BT, 0.0), torch.where(mask, ref_logprobs_BT, 0.0))
        per_token = per_token + beta * kl
    with torch.no_grad():
        low = (ratio < 1 - epsilon) & (advantages < 0) & mask
        high = (ratio > 1 + epsilon_high) & (advantages > 0) & mask
    return PolicyLoss(
        loss=(per_token * weights_BT).sum(),
        kl_sum=(kl.detach() * mask).sum(),
        clipped_low_sum=low.sum(),
        clipped_high_sum=high.sum(),
        tokens=mask.sum(),
    )


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) from samples of the policy."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1
