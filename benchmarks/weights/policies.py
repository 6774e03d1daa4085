"""Policies whose weights are sent: the tiny one, larger ones of its architecture, and their recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mars_shared.settings import DatasetName, Recipe
from mars_shared.weights.bits.kernels import Bits
from mars_trainer.model import load_policy
from mars_trainer.model_writer import write_model
from mars_trainer.publish import bits_of, policy_tensors
from mars_trainer.tiny import build_config
from mars_trainer.warm_start import WarmStartConfig, train

TINY = Path("models/tiny")
HEAD = 32
"""Channels of an attention head: as few as vLLM's CPU attention takes."""
THREADS = 1


@dataclass(frozen=True)
class Size:
    """Width and depth of both parts of a policy."""

    hidden: int
    intermediate: int
    layers: int
    depth: int


SIZES = {"20m": Size(384, 1024, 6, 5), "100m": Size(768, 2048, 9, 4)}
"""22.3 and 100.1 million parameters."""


def enlarged(size: Size, vocabulary: int) -> Qwen2_5_VLConfig:
    """The tiny policy's configuration, wider and deeper."""
    heads = size.hidden // HEAD
    whole = build_config(vocabulary).to_dict()
    common = {"hidden_size": size.hidden, "intermediate_size": size.intermediate}
    whole["text_config"] |= common | {
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "layer_types": ["full_attention"] * size.layers,
    }
    whole["vision_config"] |= common | {
        "depth": size.depth,
        "num_heads": heads,
        "out_hidden_size": size.hidden,
        "fullatt_block_indexes": list(range(size.depth)),
    }
    return Qwen2_5_VLConfig.from_dict(whole)


def write_enlarged(size: Size, folder: Path) -> None:
    """A whole model folder with random weights in float32, and tokenizer and processor of the tiny policy."""
    vocabulary = load_policy(TINY).model.config.text_config.vocab_size
    torch.manual_seed(0)
    write_model(Qwen2_5_VLForConditionalGeneration(enlarged(size, vocabulary)), TINY, folder, torch.float32, {})


def write_taught(size: Size, folder: Path, steps: int, report: Callable[[str], None]) -> None:
    """As `write_enlarged`, after some steps of supervised training: a policy that earns rewards at all."""
    write_enlarged(size, folder)
    torch.set_num_threads(THREADS)
    policy = load_policy(folder)
    config = WarmStartConfig(
        out=folder, steps=steps, stop_after=steps, warmup_steps=10, samples=((DatasetName.DIGITS, 16),), learning_rate=1e-3
    )
    train(policy, config, report)
    policy.model.save_pretrained(folder)


def make_recipe(folder: Path, model: Path, lr: float, dtype: str = "bfloat16") -> Recipe:
    """A run of the digits task whose store keeps every publication.

    A snapshot every 12 versions, so that a joiner finds deltas after the newest one at 50 versions as well as at 6.
    """
    return Recipe.model_validate(
        {
            "run": {"name": "bench-weights", "dir": folder},
            "model": {"path": model, "dtype": dtype, "max_model_len": 1024},
            "data": {"dataset": "digits"},
            "rollout": {"num_generations": 6, "num_mono": 1, "max_completion_length": 14, "kv_cache_mib": 64},
            "train": {"steps": 1000, "prompts_per_step": 2, "learning_rate": lr, "threads": THREADS},
            "weights": {"snapshot_every": 12, "keep_snapshots": 1000},
        }
    )


def published(model: nn.Module) -> dict[str, Bits]:
    """Bits of every tensor as replicas get them, in memory of their own."""
    return {name: bits_of(tensor).copy() for name, tensor in policy_tensors(model, torch.bfloat16)}


@torch.no_grad()
def nudge(model: nn.Module, lr: float, random: torch.Generator) -> None:
    """Change every parameter as AdamW would without training: normal, 0.3 lr wide, by a factor that differs from row to row.

    AdamW makes steps 0.23 lr wide of gradients without any signal, at beta1 = 0.9; signal makes them wider.
    """
    for parameter in model.parameters():
        rows = parameter.view(parameter.shape[0], -1)
        width = 0.3 * lr * torch.exp(torch.randn(rows.shape[0], 1, generator=random) / 2)
        rows.add_(torch.randn(rows.shape, generator=random).mul_(width))
