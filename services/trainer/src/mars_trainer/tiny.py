"""A real Qwen2.5-VL small enough to learn on a laptop, with a tokenizer of its own.

`write_tiny` lays down a whole model folder in Hugging Face format with random weights; the
warm start (`mars_trainer.warm_start`) teaches it to answer. Every vision block attends fully, so
that window attention plays no part whatever the image size.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MAX_SIDE_PX = 448
TEMPLATE_PIECES = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "```json\n",
    "\n```",
    '{"bbox_2d": [',
    "]}",
    ", ",
    ": ",
    " is clear",
)
WORDS = (
    *("system", "user", "assistant", "You", " are", " a", " helpful", " assistant"),
    *("visible", " visible", "infrared", " infrared", "both", " both"),
    *("Which", " Which", " digit", "Find", " Find", " every", " person"),
)
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ['image', 'image_url'] -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- else -%}
{{ raise_exception('content type is ' ~ part.type ~ '; expected text or image') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """One token per special token, template piece, word and number 0..448; bytes for everything else.

    Byte-level, so that decoding gives back any text exactly. Pieces and words aren't special:
    they survive `skip_special_tokens`.
    """
    alphabet = _byte_alphabet()
    wholes = [*TEMPLATE_PIECES, *WORDS, *map(str, range(MAX_SIDE_PX + 1))]
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for token in [*alphabet, *("".join(alphabet[byte] for byte in whole.encode()) for whole in wholes)]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    pieces = "|".join(_escape(piece) for piece in sorted(TEMPLATE_PIECES, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{pieces}|[0-9]+| ?[A-Za-z]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte, in byte order (ByteLevel's own mapping)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def _escape(piece: str) -> str:
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in piece)


def build_config(vocabulary_size: int) -> Qwen2_5_VLConfig:
    """1.7 M parameters; head sizes of 32 are the smallest that vLLM's CPU attention takes."""
    token = {name: SPECIAL_TOKENS.index(name) for name in SPECIAL_TOKENS}
    text = {
        "vocab_size": vocabulary_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1, 2, 3],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def write_tiny(folder: Path, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Write a whole model folder with random weights and return the model, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in _processor_files().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer.get_vocab_size()))
    save_policy(model, folder)
    return model


def save_policy(model: Qwen2_5_VLForConditionalGeneration, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, generation config and weights in `dtype`; the model itself stays as it is."""
    logging.disable_progress_bar()
    rounded = copy.deepcopy(model).to(dtype)
    rounded.generation_config = GenerationConfig(
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"), pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>")
    )
    rounded.save_pretrained(folder)


def _processor_files() -> dict[str, dict[str, Any]]:
    image = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": 56 * 56, "longest_edge": MAX_SIDE_PX**2},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 1024,
    }
    processor = "Qwen2_5_VLProcessor"
    return {
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": processor,
            **image,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "processor_class": processor,
            **image,
        },
    }
