"""The policy: loading it, and the log-probabilities it gives to completions.

Completions may contain image or video placeholder tokens, since a policy samples them sooner
or later. To the sampler they are ordinary tokens by then, and so they are here: images are
merged into the prompt's placeholders alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from mars_shared.errors import CheckpointError, ConfigError
from mars_shared.model_folder import check_model_folder
from mars_trainer.batching import Microbatch, TokenLayout


@dataclass(frozen=True)
class Policy:
    """A model with the processor that belongs to it."""

    model: Qwen2_5_VLForConditionalGeneration
    processor: Any
    layout: TokenLayout


class TokenStatistics(NamedTuple):
    """Of every completion token, [B, T] float32, 0 at padding; only `logprobs` carries gradients."""

    logprobs: Tensor
    entropy: Tensor


def load_policy(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Policy:
    """Load a Qwen2.5-VL folder in Hugging Face format.

    Raises:
        ConfigError: no such folder, a file missing, or another architecture.
        CheckpointError: weights missing or not of this configuration.
    """
    check_model_folder(path)
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, local_files_only=True, attn_implementation="sdpa", output_loading_info=True
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"model folder {path}: weights don't fit its config.json: {error}") from error
    absent, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if absent or surplus:
        raise CheckpointError(
            f"model folder {path}: weights don't fit its config.json; missing {absent[:5]}, unexpected {surplus[:5]}"
        )
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return Policy(model.to(device), processor, layout_of(model, processor))


def layout_of(model: Qwen2_5_VLForConditionalGeneration, processor: Any) -> TokenLayout:
    """Placeholder and padding ids and the merge size of a model.

    Raises:
        ConfigError: the tokenizer has no padding token.
    """
    config, pad_token_id = model.config, processor.tokenizer.pad_token_id
    if pad_token_id is None:
        raise ConfigError("the model's tokenizer has no padding token; set pad_token in its tokenizer_config.json")
    return TokenLayout(
        image_token_id=config.image_token_id,
        pad_token_id=pad_token_id,
        merge_size=config.vision_config.spatial_merge_size,
    )


def completion_logprobs(
    model: Qwen2_5_VLForConditionalGeneration, batch: Microbatch, temperature: float, chunk_tokens: int
) -> Tensor:
    """Log-probabilities of completion tokens, [B, T] float32 with gradients, 0 at padding."""
    return completion_statistics(model, batch, temperature, chunk_tokens).logprobs


def completion_statistics(
    model: Qwen2_5_VLForConditionalGeneration, batch: Microbatch, temperature: float, chunk_tokens: int
) -> TokenStatistics:
    """Log-probability and entropy of every completion token at `temperature`.

    Logits exist for `chunk_tokens` tokens at a time, in the backward pass too: each chunk is
    computed again there.
    """
    hidden = _hidden_states(model, batch)
    mask = batch.completion_mask
    predicting = hidden[batch.logit_sequence[:, None], batch.logit_index][mask]
    targets = batch.completion_ids[mask]
    weight = model.lm_head.weight
    chunks = [
        checkpoint(_chunk_statistics, states, weight, ids, temperature, use_reentrant=False, preserve_rng_state=False)
        for states, ids in zip(predicting.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    logprobs, entropy = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return TokenStatistics(empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropy))


def _hidden_states(model: Qwen2_5_VLForConditionalGeneration, batch: Microbatch) -> Tensor:
    """[R, S, hidden] of the last layer, after the final norm."""
    embeddings = model.get_input_embeddings()(batch.token_ids)
    if batch.grid_thw.shape[0]:
        vision = model.get_image_features(batch.pixel_values, batch.grid_thw).pooler_output
        features = torch.cat(list(vision))[batch.feature_index].to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(batch.placeholders[..., None], features)
    mask = None if batch.attention_mask is None else {"full_attention": batch.attention_mask}
    output = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    )
    return output.last_hidden_state


def _chunk_statistics(states: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logprobs [n], entropy [n]) of n tokens from hidden states [n, hidden] and lm_head [vocabulary, hidden]."""
    logits = functional.linear(states, weight).float() / temperature
    log_normalizer = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = log_normalizer - (logits.softmax(dim=-1) * logits).sum(dim=-1)
    return chosen - log_normalizer, entropy
