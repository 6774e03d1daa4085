"""How many tokens a record's multi-source prompt has, as a replica would render it and a batch would hold it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mars_shared.errors import ConfigError, ImageError, InputError
from mars_shared.messages import build_messages
from mars_shared.model_folder import check_model_folder
from mars_trainer.datasets.records import Record

SizePx = tuple[int, int]


class PromptRuler:
    """Measures prompts for one model; needs no weights in memory.

    Example:
        PromptRuler(Path("models/tiny"))(record, [(56, 56), (56, 56)])
    """

    def __init__(self, model: Path) -> None:
        """Raises ConfigError: the folder lacks a tokenizer with chat template or a Qwen-VL image processor."""
        check_model_folder(model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            processor = AutoImageProcessor.from_pretrained(model)
            self._side_px = int(processor.patch_size * processor.merge_size)
            self._pixels = int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise ConfigError(f"model folder {model}: no usable tokenizer and Qwen-VL image processor ({error})") from error
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError(f"model folder {model}: the tokenizer has no chat template; expected one that places images")
        self._special = tuple(token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special)

    def __call__(self, record: Record, sizes_px: Sequence[SizePx]) -> int:
        """Tokens with every image placeholder expanded.

        Args:
            sizes_px: (width, height) of every image, in order.

        Raises:
            InputError: the question contains one of the model's special tokens.
            ImageError: an image's shape is refused by the model's processor.
        """
        for token in self._special:
            if token in record.question:
                raise InputError(f"{record.where}: the question contains the model's special token {token!r}; remove it")
        names = [image.name for image in record.images]
        ids = self._tokenizer(self.text(record.question, names), add_special_tokens=False)["input_ids"]
        images = [
            self.image_tokens(size, what=f"{record.where}: source {name!r}") for size, name in zip(sizes_px, names, strict=True)
        ]
        return len(ids) - len(images) + sum(images)

    def text(self, question: str, names: Sequence[str]) -> str:
        """The multi-source prompt as the chat template writes it, one placeholder an image."""
        text = self._tokenizer.apply_chat_template(build_messages(question, names), add_generation_prompt=True, tokenize=False)
        return str(text)

    def image_tokens(self, size_px: SizePx, *, what: str) -> int:
        """Tokens of an image of (width, height).

        Raises:
            ImageError: the shape is refused by the model's processor; names `what`.
        """
        width, height = size_px
        try:
            tall, wide = smart_resize(height, width, self._side_px, *self._pixels)
        except ValueError as error:
            raise ImageError(f"{what}: {width} x {height} pixels cannot be resized for the model ({error})") from error
        return int((tall // self._side_px) * (wide // self._side_px))
