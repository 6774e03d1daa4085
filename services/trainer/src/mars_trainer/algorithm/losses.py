"""Policy losses as pure functions of log-probabilities.

Shapes: B completions of at most T tokens, padded; `mask_BT` is 1 at completion tokens.

GRPO, DAPO and Dr. GRPO share the clipped surrogate and differ in what a token weighs
(`loss_weights`) and in settings: DAPO clips asymmetrically, Dr. GRPO leaves the division by
the std out of the advantages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dapo", "dr_grpo"]
ImportanceCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class PolicyLoss:
    """A loss to minimise and what is worth watching; the metrics are sums, for exact means over microbatches."""

    loss: Tensor
    kl_sum: Tensor
    clipped_low_sum: Tensor
    clipped_high_sum: Tensor
    clipped_dual_sum: Tensor
    tokens: Tensor


def loss_weights(
    mask_BT: Tensor,
    loss_type: LossType,
    *,
    batch_completions: int,
    batch_tokens: int,
    max_completion_length: int,
) -> Tensor:
    """What each token weighs in the loss of the whole batch, of which B completions are a part.

    "dapo" (arXiv 2503.14476): 1 / tokens of the batch. "grpo" (arXiv 2402.03300): 1 / (its
    completion's tokens * completions of the batch). Of these the weights of all parts of a batch
    sum to 1. "dr_grpo" (arXiv 2503.20783): 1 / (completions of the batch * max_completion_length),
    a constant, so that a token weighs the same however long its completion is.

    Returns:
        Tensor[B, T]
    """
    if loss_type == "dapo":
        return mask_BT / max(batch_tokens, 1)
    if loss_type == "dr_grpo":
        return mask_BT / (batch_completions * max_completion_length)
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
    dual_clip: float | None = None,
    importance_BT: Tensor | None = None,
    ref_logprobs_BT: Tensor | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """Clipped surrogate (PPO's) with an optional k3 KL to a reference policy.

    Per token: -importance * min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * k3,
    ratio = exp(logprobs - old_logprobs), k3 = exp(ref - logprobs) - (ref - logprobs) - 1
    (Schulman, "Approximating KL divergence"); summed with `weights_BT`.

    Args:
        dual_clip: c > 1; where A < 0 the surrogate is at least c * A, so that a completion that has
            become much more probable cannot dominate (Ye et al., arXiv 1912.09729). None: no bound.
        importance_BT: [B, T] or [B, 1] without gradient, from `importance_weights`. It doesn't
            weigh the KL, which has no sampler in it (TRL's convention).

    Raises:
        ValueError: beta > 0 without reference log-probabilities, or a dual clip inside the upper one.
    """
    if beta > 0 and ref_logprobs_BT is None:
        raise ValueError(f"beta is {beta} but there are no reference log-probabilities")
    if dual_clip is not None and dual_clip <= 1 + epsilon_high:
        raise ValueError(f"dual_clip is {dual_clip}; expected more than 1 + epsilon_high = {1 + epsilon_high}")
    mask = mask_BT.bool()
    log_ratio = torch.where(mask, logprobs_BT - old_logprobs_BT, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages_B[:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    if importance_BT is not None:
        surrogate = surrogate * importance_BT
    per_token, kl = -surrogate, torch.zeros_like(surrogate)
    if ref_logprobs_BT is not None:
        kl = k3_kl(torch.where(mask, logprobs_BT, 0.0), torch.where(mask, ref_logprobs_BT, 0.0))
        per_token = per_token + beta * kl
    with torch.no_grad():
        low = (ratio < 1 - epsilon) & (advantages < 0) & mask
        high = (ratio > 1 + epsilon_high) & (advantages > 0) & mask
        dual = (ratio > (torch.inf if dual_clip is None else dual_clip)) & (advantages < 0) & mask
    return PolicyLoss(
        loss=(per_token * weights_BT).sum(),
        kl_sum=(kl.detach() * mask).sum(),
        clipped_low_sum=low.sum(),
        clipped_high_sum=high.sum(),
        clipped_dual_sum=dual.sum(),
        tokens=mask.sum(),
    )


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) from samples of the policy."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def importance_weights(
    old_logprobs_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    mask_BT: Tensor,
    correction: ImportanceCorrection,
    *,
    cap: float,
) -> Tensor | None:
    """What the trainer's old policy gives to the samples, over what the sampler gave: decoupled from the clip.

    Two engines with one set of weights differ by rounding, which biases the gradient; weighing
    each token, or each completion, by the ratio of probabilities corrects it (arXiv 2505.24298
    for the decoupling). "truncate" bounds a ratio by `cap`, "mask" drops what is beyond it.

    Returns:
        Tensor[B, T] for a token's ratio, [B, 1] for a completion's (the product of its tokens'),
        without gradient; None for "none".
    """
    if correction == "none":
        return None
    with torch.no_grad():
        log_ratio = torch.where(mask_BT.bool(), old_logprobs_BT - sampler_logprobs_BT, 0.0)
        if correction.startswith("sequence"):
            log_ratio = log_ratio.sum(dim=1, keepdim=True)
        ratio = log_ratio.exp()
        return ratio.clamp(max=cap) if correction.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)
