"""How much memory and disk a run needs, from its model's shapes: estimates to plan with, not measurements."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from mars_shared.errors import CheckpointError
from mars_shared.settings import Recipe

MASTER_BYTES = 4
ADAM_BYTES = 8
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ACTIVATION_VALUES_PER_HIDDEN = 17
"""Values kept for the backward pass per token, layer and hidden unit, without attention scores
(Korthikanti et al., arXiv 2205.05198, equation 2: 34 bytes at two bytes a value)."""
LOGIT_COPIES = 3
"""Logits, their softmax and its gradient exist together for a chunk of tokens."""


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    kv_values_per_token: int
    """Keys and values of all layers."""


@dataclass(frozen=True)
class Need:
    """Bytes of one part of one place: "trainer", "each replica" or "disk"."""

    place: str
    part: str
    size_bytes: int


def model_shape(folder: Path) -> ModelShape:
    """From config.json and the headers of the safetensors files; no weights are read.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    text = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        parameters=sum(_values(file) for file in sorted(folder.glob("*.safetensors"))),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kv_values_per_token=2 * text.num_hidden_layers * text.num_key_value_heads * head,
    )


def _values(file: Path) -> int:
    """Numbers in a safetensors file, by its header: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (struct.error, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{file}: no readable safetensors header ({error})") from error


def needs(recipe: Recipe, shape: ModelShape, *, sources: int) -> Iterator[Need]:
    """What a run needs, for prompts with `sources` images.

    Activations count one microbatch of `tokens_per_microbatch` tokens; a replica's key-value cache
    is what all completions of its concurrent groups would fill at `max_model_len`, of which vLLM
    holds as much as it is given.
    """
    train, rollout, served = recipe.train, recipe.rollout, DTYPE_BYTES[recipe.model.dtype]
    parameters = shape.parameters
    yield Need("trainer", "fp32 masters", MASTER_BYTES * parameters)
    yield Need("trainer", "gradients", MASTER_BYTES * parameters)
    yield Need("trainer", "AdamW state", ADAM_BYTES * parameters)
    yield Need("trainer", "copy of the published weights", served * parameters)
    if train.beta > 0:
        yield Need("trainer", "reference policy, for the KL", MASTER_BYTES * parameters)
    per_token = ACTIVATION_VALUES_PER_HIDDEN * served * shape.layers * shape.hidden
    yield Need("trainer", f"activations of {train.tokens_per_microbatch} tokens", per_token * train.tokens_per_microbatch)
    logits = LOGIT_COPIES * MASTER_BYTES * train.logprob_chunk_tokens * shape.vocabulary
    yield Need("trainer", f"logits of {train.logprob_chunk_tokens} tokens", logits)
    members = rollout.num_generations + sources * rollout.num_mono
    tokens = rollout.concurrent_groups * members * recipe.model.max_model_len
    yield Need("each replica", "weights", served * parameters)
    yield Need("each replica", "copy of the weights, in the host's memory or on disk", served * parameters)
    if rollout.kv_cache_mib is None:
        yield Need("each replica", f"key-value cache of {tokens} tokens", served * shape.kv_values_per_token * tokens)
    else:
        yield Need("each replica", "key-value cache, as rollout.kv_cache_mib says", rollout.kv_cache_mib << 20)
    checkpoint = (MASTER_BYTES + ADAM_BYTES) * parameters
    # The oldest goes once the next is written.
    kept, shots = train.keep_checkpoints, recipe.weights.keep_snapshots
    yield Need("disk", f"{kept} checkpoints, and the next while it is written", (kept + 1) * checkpoint)
    yield Need("disk", f"{shots} snapshots, and the next while it is written", (shots + 1) * served * parameters)
