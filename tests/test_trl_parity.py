"""Value and gradient of our losses equal those of TRL's GRPOTrainer on the same tensors.

TRL's own `_compute_loss` runs; only the model's forward pass is replaced by the given
log-probabilities. The table of differences stands at the end of the test run's output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Tables
from mars_trainer.algorithm.losses import ImportanceCorrection, LossType, importance_weights, loss_weights, policy_loss

MAX_LENGTH = 40
CAP = 1.5
BOUND = 1e-5
EPSILON = 0.2


@dataclass(frozen=True)
class Variant:
    """One set of settings that both sides have."""

    name: str
    loss_type: LossType
    epsilon_high: float = 0.2
    beta: float = 0.0
    dual_clip: float | None = None
    correction: ImportanceCorrection = "none"


VARIANTS = [
    Variant("grpo", "grpo"),
    Variant("grpo, k3 KL", "grpo", beta=0.04),
    Variant("dapo", "dapo", epsilon_high=0.28),
    Variant("dapo, dual clip", "dapo", epsilon_high=0.28, dual_clip=2.0),
    Variant("dapo, k3 KL", "dapo", epsilon_high=0.28, beta=0.04),
    Variant("dr_grpo", "dr_grpo"),
    Variant("dr_grpo, k3 KL", "dr_grpo", beta=0.04),
    *[
        Variant(f"{loss_type}, k3 KL, {correction}", loss_type, beta=0.04, correction=correction)
        for loss_type in ("grpo", "dapo", "dr_grpo")
        for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ],
]


@dataclass(frozen=True)
class Batch:
    """B completions of 1 to T tokens; ratios reach beyond the clips and the importance cap."""

    logprobs_BT: Tensor
    old_BT: Tensor
    sampler_BT: Tensor
    ref_BT: Tensor
    advantages_B: Tensor
    mask_BT: Tensor


def make_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_LENGTH + 1, (24,), generator=generator)
    mask = (torch.arange(MAX_LENGTH) < lengths[:, None]).float()
    old = -3 * torch.rand(mask.shape, generator=generator)

    def near(scale: float) -> Tensor:
        return old + scale * torch.randn(mask.shape, generator=generator)

    return Batch(near(0.4), old, near(0.4), near(0.5), torch.randn(24, generator=generator), mask)


def ours(variant: Variant, batch: Batch) -> tuple[float, Tensor]:
    leaf = batch.logprobs_BT.clone().requires_grad_()
    tokens = int(batch.mask_BT.sum())
    weights = loss_weights(
        batch.mask_BT,
        variant.loss_type,
        batch_completions=len(batch.mask_BT),
        batch_tokens=tokens,
        max_completion_length=MAX_LENGTH,
    )
    result = policy_loss(
        leaf,
        batch.old_BT,
        batch.advantages_B,
        batch.mask_BT,
        weights,
        epsilon=EPSILON,
        epsilon_high=variant.epsilon_high,
        dual_clip=variant.dual_clip,
        importance_BT=our_importance(variant, batch),
        ref_logprobs_BT=batch.ref_BT if variant.beta else None,
        beta=variant.beta,
    )
    return value_and_gradient(result.loss, leaf)


def our_importance(variant: Variant, batch: Batch) -> Tensor | None:
    return importance_weights(batch.old_BT, batch.sampler_BT, batch.mask_BT, variant.correction, cap=CAP)


def value_and_gradient(loss: Tensor, leaf: Tensor) -> tuple[float, Tensor]:
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def theirs(variant: Variant, batch: Batch) -> tuple[float, Tensor]:
    from trl import GRPOTrainer

    leaf = batch.logprobs_BT.clone().requires_grad_()
    ids, nothing = torch.zeros(batch.mask_BT.shape, dtype=torch.long), torch.zeros((len(batch.mask_BT), 1), dtype=torch.long)
    inputs: dict[str, Any] = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": ids,
        "completion_mask": batch.mask_BT,
        "advantages": batch.advantages_B,
        "old_per_token_logps": batch.old_BT,
        "ref_per_token_logps": batch.ref_BT,
        "num_items_in_batch": batch.mask_BT.sum(),
        "importance_sampling_ratio": trl_importance(variant, batch),
    }
    return value_and_gradient(GRPOTrainer._compute_loss(trl_settings(variant, leaf), None, inputs), leaf)


def trl_importance(variant: Variant, batch: Batch) -> Tensor | None:
    """What TRL multiplies with in its four modes, token by token: it computes it within the making of a batch."""
    if variant.correction == "none":
        return None
    level, _, mode = variant.correction.partition("_")
    ratios = torch.ones(batch.mask_BT.shape if level == "token" else (len(batch.mask_BT), 1))
    for row in range(len(batch.mask_BT)):
        length = int(batch.mask_BT[row].sum())
        differences = [batch.old_BT[row, t].item() - batch.sampler_BT[row, t].item() for t in range(length)]
        for place, difference in enumerate(differences if level == "token" else [math.fsum(differences)]):
            ratio = math.exp(difference)
            ratios[row, place] = ratio if ratio <= CAP else (CAP if mode == "truncate" else 0.0)
    return ratios


def trl_settings(variant: Variant, logprobs: Tensor) -> SimpleNamespace:
    """What TRL's loss reads of its trainer."""
    same = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=same,
        args=SimpleNamespace(delta=variant.dual_clip, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=variant.beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=variant.epsilon_high,
        epsilon_low=EPSILON,
        importance_sampling_level="token",
        loss_type=variant.loss_type,
        max_completion_length=MAX_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=variant.correction != "none",
        vllm_importance_sampling_correction=variant.correction != "none",
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_loss_and_gradient_equal_those_of_trl(variant: Variant, tables: Tables) -> None:
    worst_loss = worst_gradient = 0.0
    for seed in range(5):
        batch = make_batch(seed)
        our_loss, our_gradient = ours(variant, batch)
        trl_loss, trl_gradient = theirs(variant, batch)
        worst_loss = max(worst_loss, abs(our_loss - trl_loss))
        worst_gradient = max(worst_gradient, (our_gradient - trl_gradient).abs().max().item())
        assert our_gradient.abs().max() > 1e-4
        if variant.correction != "none":
            capped = (trl_importance(variant, batch) == (CAP if "truncate" in variant.correction else 0.0)).float().mean()
            assert 0.05 < capped < 0.95
    tables.add("parity with TRL", variant=variant.name, loss=f"{worst_loss:.1e}", gradient=f"{worst_gradient:.1e}")
    assert worst_loss < BOUND and worst_gradient < BOUND
