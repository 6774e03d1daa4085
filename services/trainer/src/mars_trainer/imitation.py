"""What supervised training imitates: a sample's prompt as a replica renders it, and the completion that answers it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from mars_shared.contracts import BoxesTruth, FrameKind, Truth
from mars_shared.errors import ConfigError, InputError
from mars_shared.images import open_image
from mars_shared.messages import Messages
from mars_trainer.batching import EncodedPrompt, expand_placeholders, pixels
from mars_trainer.datasets.base import Sample
from mars_trainer.model import Policy

PER_MILLE = 1000
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def encode_prompt(
    sample: Sample, messages: Messages, shown: Sequence[str], policy: Policy, max_image_pixels: int
) -> EncodedPrompt:
    """A sample's prompt with its images.

    Args:
        shown: source names in placeholder order.
        max_image_pixels: an image with more is refused.

    Raises:
        InputError: an image cannot be used (ImageError, MediaTypeError, TooLargeError).
    """
    images = [
        open_image(sample.images[name], what=f"{sample.label}, source {name!r}", max_pixels=max_image_pixels) for name in shown
    ]
    pixel_values, grid_thw = pixels(policy.processor, images)
    text = policy.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = policy.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return EncodedPrompt(sample.prompt_id, expand_placeholders(prompt_ids, grid_thw, policy.layout), pixel_values, grid_thw)


def completion_ids(text: str, policy: Policy) -> tuple[int, ...]:
    """The tokens of a completion and the end token, as a replica would sample them.

    Raises:
        ConfigError: the tokenizer has no end token.
    """
    tokenizer = policy.processor.tokenizer
    if tokenizer.eos_token_id is None:
        raise ConfigError("the model's tokenizer has no end token; set eos_token in its tokenizer_config.json")
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def frame_size(kind: FrameKind, truth: Truth, grid_thw: Tensor, policy: Policy) -> tuple[int, int]:
    """(width, height) of the frame in which a completion writes boxes about its first image; (0, 0) for texts.

    Args:
        grid_thw: [images, 3], patches along time, height and width.
    """
    if not isinstance(truth, BoxesTruth):
        return 0, 0
    if kind is FrameKind.PER_MILLE:
        return PER_MILLE, PER_MILLE
    if kind is FrameKind.ORIGINAL:
        return truth.width_px, truth.height_px
    side_px = int(policy.processor.image_processor.patch_size)
    return int(grid_thw[0, 2]) * side_px, int(grid_thw[0, 1]) * side_px


def completion_text(truth: Truth, thought: str | None, frame: tuple[int, int]) -> str:
    """The completion to imitate.

    Args:
        thought: what stands in <think>; None: the answer alone.
        frame: (width, height) in which boxes are written, in whole numbers.

    Example:
        completion_text(TextTruth(text="two or 2"), "two cups", (0, 0)) ==
            "<think>two cups</think><answer>two</answer>"
    """
    answer = _fenced_boxes(truth, frame) if isinstance(truth, BoxesTruth) else first_alternative(truth.text)
    return ("" if thought is None else f"<think>{thought}</think>") + f"<answer>{answer}</answer>"


def first_alternative(text: str) -> str:
    """The first of a truth's alternatives: "two" of "two or 2". Rewards accept each of them."""
    words = text.split()
    ends = [index for index, word in enumerate(words) if index and word.casefold() == "or"]
    return " ".join(words[: ends[0]]) if ends else text


def refuse_markup(sample: Sample, policy: Policy) -> None:
    """Refuse a sample whose texts would be read as structure.

    Raises:
        InputError: its question, thought or answer contains one of the model's special tokens, or the latter two a tag.
    """
    special = [token.content for token in policy.processor.tokenizer.added_tokens_decoder.values() if token.special]
    answer = sample.truth.text if not isinstance(sample.truth, BoxesTruth) else ""
    for field, text, refused in (
        ("question", sample.question, special),
        ("thought", sample.thought or "", [*special, *TAGS]),
        ("answer", answer, [*special, *TAGS]),
    ):
        if found := [token for token in refused if token in text]:
            raise InputError(f"{sample.label}: {field}: contains {found[0]!r}, which marks structure; remove it")


def _fenced_boxes(truth: BoxesTruth, frame: tuple[int, int]) -> str:
    scale = (frame[0] / truth.width_px, frame[1] / truth.height_px) * 2
    boxes = [[round(value * factor) for value, factor in zip(box, scale, strict=True)] for box in truth.boxes]
    return f"```json\n{json.dumps([{'bbox_2d': box} for box in boxes])}\n```"
