"""From whole groups to padded microbatches, with every prompt's images once.

Rows are padded on the right. With causal attention no real token ever sees the padding, so
no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from mars_shared.errors import InputError
from PIL import Image
from torch import Tensor

Row = tuple[int, int]
"""(index of the group, index of the completion in it)."""


@dataclass(frozen=True)
class TokenLayout:
    """What of a model's configuration decides how a prompt is laid out."""

    image_token_id: int
    pad_token_id: int
    merge_size: int
    """Patches of merge_size x merge_size share one placeholder."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    Attributes:
        name: for error messages, e.g. the task id.
        token_ids: expanded: one placeholder per merged patch.
        pixel_values: [patches of all images, patch size], in placeholder order.
        grid_thw: [images, 3], patches along time, height and width.
    """

    name: str
    token_ids: tuple[int, ...]
    pixel_values: Tensor
    grid_thw: Tensor


@dataclass(frozen=True)
class EncodedGroup:
    """A prompt and the token ids of its completions (which may contain placeholder tokens)."""

    prompt: EncodedPrompt
    completions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Microbatch:
    """B completions with their prompts, S tokens wide; T is the longest completion, F all placeholders.

    Attributes:
        rows: which completion of which group a row is, B of them.
        token_ids: [B, S] prompt, completion, padding.
        position_ids: [3, B, S] multimodal rotary positions.
        pixel_values: [patches, patch size] of the different prompts, each once.
        grid_thw: [images, 3].
        placeholders: [B, S] true at the PROMPT's placeholders, F in all.
        feature_index: [F] which merged vision feature stands at each placeholder, row by row.
        completion_ids: [B, T], padded.
        completion_mask: [B, T] true at real tokens.
        logit_index: [B, T] the position in S whose hidden state predicts each completion token.
    """

    rows: tuple[Row, ...]
    token_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    grid_thw: Tensor
    placeholders: Tensor
    feature_index: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logit_index: Tensor

    def to(self, device: torch.device | str) -> Microbatch:
        """The same with every tensor on `device`."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "rows"}
        return replace(self, **tensors)


def pixels(processor: Any, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """(pixel_values [patches, patch size], grid_thw [images, 3]) by the model's own image processor."""
    features = processor.image_processor(images=list(images), return_tensors="pt")
    return features["pixel_values"], features["image_grid_thw"]


def expand_placeholders(token_ids: Sequence[int], grid_thw: Tensor, layout: TokenLayout) -> tuple[int, ...]:
    """Repeat the k-th image placeholder as often as the k-th image has merged patches."""
    counts = iter(merged_patches(grid_thw, layout))
    expanded: list[int] = []
    for token in token_ids:
        expanded.extend([token] * (next(counts, 1) if token == layout.image_token_id else 1))
    return tuple(expanded)


def merged_patches(grid_thw: Tensor, layout: TokenLayout) -> list[int]:
    """Placeholders that each image takes."""
    return [int(grid.prod()) // layout.merge_size**2 for grid in grid_thw]


def make_microbatches(groups: Sequence[EncodedGroup], layout: TokenLayout, tokens_per_microbatch: int) -> Iterator[Microbatch]:
    """Microbatches in order, each of at most `tokens_per_microbatch` padded tokens.

    A group stays together unless it alone is over the limit; a single completion that is over
    it gets a microbatch of its own.

    Raises:
        InputError: a prompt whose placeholders don't match its images, naming it.
    """
    lengths = [[len(group.prompt.token_ids) + len(ids) for ids in group.completions] for group in groups]
    for rows in _pack(lengths, tokens_per_microbatch):
        yield _collate(groups, rows, layout)


def _pack(lengths: Sequence[Sequence[int]], limit: int) -> Iterator[list[Row]]:
    rows: list[Row] = []
    longest = 0
    for group, group_lengths in enumerate(lengths):
        if rows and group_lengths and (len(rows) + len(group_lengths)) * max(longest, *group_lengths) > limit:
            yield rows
            rows, longest = [], 0
        for index, length in enumerate(group_lengths):
            if rows and (len(rows) + 1) * max(longest, length) > limit:
                yield rows
                rows, longest = [], 0
            rows.append((group, index))
            longest = max(longest, length)
    if rows:
        yield rows


def _collate(groups: Sequence[EncodedGroup], rows: list[Row], layout: TokenLayout) -> Microbatch:
    prompts = {group: groups[group].prompt for group, _ in rows}
    images = _PromptImages(prompts, layout)
    completions = [groups[group].completions[index] for group, index in rows]
    starts = [len(prompts[group].token_ids) for group, _ in rows]
    width = max(start + len(ids) for start, ids in zip(starts, completions, strict=True))
    longest = max(map(len, completions))
    token_ids = torch.full((len(rows), width), layout.pad_token_id)
    completion_ids = torch.full((len(rows), longest), layout.pad_token_id)
    placeholders = torch.zeros((len(rows), width), dtype=torch.bool)
    positions = torch.zeros((3, len(rows), width), dtype=torch.long)
    for row, ((group, _), ids, start) in enumerate(zip(rows, completions, starts, strict=True)):
        prompt = torch.tensor(prompts[group].token_ids)
        token_ids[row, :start] = prompt
        token_ids[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.long)
        completion_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        placeholders[row, :start] = prompt == layout.image_token_id
        positions[:, row, :start] = images.positions[group]
        positions[:, row, start:] = images.positions[group].max() + 1 + torch.arange(width - start)
    steps = torch.arange(longest)
    sizes = torch.tensor([len(ids) for ids in completions])
    return Microbatch(
        rows=tuple(rows),
        token_ids=token_ids,
        position_ids=positions,
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts.values()]),
        grid_thw=torch.cat([prompt.grid_thw for prompt in prompts.values()]),
        placeholders=placeholders,
        feature_index=torch.cat([images.features[group] for group, _ in rows]),
        completion_ids=completion_ids,
        completion_mask=steps < sizes[:, None],
        logit_index=(torch.tensor(starts)[:, None] - 1 + steps).clamp(max=width - 1),
    )


class _PromptImages:
    """Per prompt: rotary positions [3, prompt] and the indices of its merged features in the microbatch."""

    def __init__(self, prompts: dict[int, EncodedPrompt], layout: TokenLayout) -> None:
        self.positions: dict[int, Tensor] = {}
        self.features: dict[int, Tensor] = {}
        offset = 0
        for group, prompt in prompts.items():
            counts = merged_patches(prompt.grid_thw, layout)
            found = prompt.token_ids.count(layout.image_token_id)
            if found != sum(counts):
                raise InputError(
                    f"prompt {prompt.name}: {found} image placeholder tokens for {len(counts)} images of {counts} merged patches; "
                    f"expected {sum(counts)} placeholders"
                )
            self.positions[group] = rotary_positions(prompt.token_ids, prompt.grid_thw, layout)
            self.features[group] = torch.arange(offset, offset + found)
            offset += found


def rotary_positions(token_ids: Iterable[int], grid_thw: Tensor, layout: TokenLayout) -> Tensor:
    """Multimodal rotary positions of a prompt, [3 (time, height, width), tokens].

    Text counts up by one. An image's patches lie on their own grid, which begins where the text
    before it ended; text goes on after the longest side (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    tokens, grids = list(token_ids), iter(grid_thw)
    parts: list[Tensor] = []
    place, next_position = 0, 0
    while place < len(tokens):
        if tokens[place] != layout.image_token_id:
            parts.append(torch.full((3, 1), next_position))
            place, next_position = place + 1, next_position + 1
            continue
        time, height, width = (int(n) for n in next(grids))
        sides = (torch.arange(time), torch.arange(height // layout.merge_size), torch.arange(width // layout.merge_size))
        grid = torch.stack(torch.meshgrid(*sides, indexing="ij")).reshape(3, -1) + next_position
        parts.append(grid)
        place, next_position = place + grid.shape[1], int(grid.max()) + 1
    return torch.cat(parts, dim=1)
