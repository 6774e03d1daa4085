"""A prompt becomes token ids, once: chat template, placeholders, lengths, box frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mars_shared.contracts import BoxFrame, FrameKind, Prompt, View
from mars_shared.errors import ConfigError, ImageError, InputError, TooLongError
from mars_shared.messages import build_messages, images_shown
from mars_shared.model_folder import check_model_folder

PER_MILLE = 1000
SizePx = tuple[int, int]


@dataclass(frozen=True)
class ViewDraft:
    """A view before the engine has expanded its placeholders.

    Attributes:
        source: None for the multi-source view.
        token_ids: one placeholder token per image.
        images: source names in placeholder order.
        expanded_length: tokens once every placeholder is expanded.
    """

    source: str | None
    token_ids: tuple[int, ...]
    images: tuple[str, ...]
    frame: BoxFrame
    expanded_length: int


class PromptRenderer:
    """Renders prompts for one model.

    Example:
        drafts = renderer.views(prompt, {"visible": (56, 56), "infrared": (56, 56)})
    """

    def __init__(self, model: Path, max_model_len: int) -> None:
        """Raises ConfigError: the folder lacks a tokenizer with chat template or a Qwen-VL image processor."""
        self._max_model_len = max_model_len
        config = check_model_folder(model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._images = ImageGeometry(AutoImageProcessor.from_pretrained(model))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model folder {model}: no usable tokenizer and image processor ({_first_line(error)})") from error
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError(f"model folder {model}: the tokenizer has no chat template; expected one that places images")
        self._special = tuple(t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special)
        self._placeholder = int(config["image_token_id"])

    def views(self, prompt: Prompt, sizes_px: Mapping[str, SizePx]) -> tuple[ViewDraft, ...]:
        """The multi-source view, then one per source if the prompt asks for mono-source completions.

        Args:
            sizes_px: (width, height) of every source's decoded image, by name.

        Raises:
            InputError: the question contains one of the model's special tokens.
            TooLongError: a view and its completion exceed the model's context.
            ImageError: an image's shape is refused by the model's processor.
        """
        self._refuse_special_tokens(prompt)
        mono = [source.name for source in prompt.sources] if prompt.sampling.num_mono else []
        return tuple(self._view(prompt, only, sizes_px) for only in (None, *mono))

    def _view(self, prompt: Prompt, only: str | None, sizes_px: Mapping[str, SizePx]) -> ViewDraft:
        names = tuple(source.name for source in prompt.sources)
        view: View = prompt.sampling.mono_view
        shown = images_shown(names, only=only, view=view)
        token_ids = self.token_ids(build_messages(prompt.question, names, only=only, view=view))
        if token_ids.count(self._placeholder) != len(shown):
            raise ConfigError(
                f"the chat template placed {token_ids.count(self._placeholder)} images where {len(shown)} were given; "
                "expected one placeholder token per image"
            )
        image_tokens = [self._images.token_count(sizes_px[name], what=_item(prompt, name)) for name in shown]
        length = len(token_ids) - len(shown) + sum(image_tokens)
        self._check_length(prompt, only, length)
        frame = self._images.frame(prompt.box_frame, sizes_px[shown[0]], what=_item(prompt, shown[0]))
        return ViewDraft(only, tuple(token_ids), shown, frame, length)

    def token_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Chat messages up to where the assistant's answer begins."""
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(token) for token in ids]

    def _refuse_special_tokens(self, prompt: Prompt) -> None:
        for token in self._special:
            if token in prompt.question:
                raise InputError(
                    f"prompt {prompt.prompt_id}: the question contains the model's special token {token!r}; remove it"
                )
            for source in prompt.sources:
                if token in source.name:
                    raise InputError(f"{_item(prompt, source.name)}: the name contains the model's special token {token!r}")

    def _check_length(self, prompt: Prompt, only: str | None, length: int) -> None:
        wanted = prompt.sampling.max_completion_length
        if length + wanted > self._max_model_len:
            view = "multi-source view" if only is None else f"view of source {only!r}"
            raise TooLongError(
                f"prompt {prompt.prompt_id}: the {view} has {length} tokens and max_completion_length is {wanted}; "
                f"expected at most {self._max_model_len} together (model.max_model_len)"
            )


class ImageGeometry:
    """What a Qwen-VL image processor makes of an image's size."""

    def __init__(self, processor: Any) -> None:
        try:
            self._patch_px: int = processor.patch_size
            self._merge: int = processor.merge_size
            size = processor.size
            self._min_pixels, self._max_pixels = int(size["shortest_edge"]), int(size["longest_edge"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"image processor {type(processor).__name__} has no {error}; expected a Qwen-VL image processor"
            ) from error

    def resized(self, size_px: SizePx, *, what: str) -> SizePx:
        """(width, height) after the processor's smart resize.

        Raises:
            ImageError: the processor refuses the shape.
        """
        width, height = size_px
        try:
            tall, wide = smart_resize(height, width, self._patch_px * self._merge, self._min_pixels, self._max_pixels)
        except ValueError as error:
            raise ImageError(f"{what}: {width} x {height} pixels cannot be resized for the model ({error})") from error
        return wide, tall

    def token_count(self, size_px: SizePx, *, what: str) -> int:
        """Tokens that an image's placeholder expands to."""
        wide, tall = self.resized(size_px, what=what)
        side = self._patch_px * self._merge
        return (wide // side) * (tall // side)

    def frame(self, kind: FrameKind, size_px: SizePx, *, what: str) -> BoxFrame:
        """The frame in which boxes about an image are written."""
        if kind is FrameKind.PER_MILLE:
            return BoxFrame(kind=kind, width=PER_MILLE, height=PER_MILLE)
        width, height = size_px if kind is FrameKind.ORIGINAL else self.resized(size_px, what=what)
        return BoxFrame(kind=kind, width=width, height=height)


def _item(prompt: Prompt, source: str) -> str:
    return f"prompt {prompt.prompt_id}, source {source!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
