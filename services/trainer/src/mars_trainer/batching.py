"""From whole groups to padded microbatches, with every prompt and its images once.

A sequence is a prompt followed by completions of its group side by side: each completion sees
the prompt and itself, never its siblings, and stands at the positions it would have alone. So
G completions cost the prompt once and not G times. Sequences are padded on the right, where
no real token ever looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mars_shared.errors import InputError

Row = tuple[int, int]
"""(index of the group, index of the completion in it)."""

SHARED_SEQUENCE_TOKENS = 4096
"""Longest sequence of several completions: its attention mask grows with the square. Longer ones stand alone."""


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
    """B completions in R sequences of at most S tokens; T is the longest completion, F all placeholders.

    Attributes:
        rows: which completion of which group each of the B is.
        token_ids: [R, S] prompt, its completions, padding.
        position_ids: [3, R, S] multimodal rotary positions.
        attention_mask: [R, 1, S, S], true where a token (third axis) sees another (fourth); None
            where every sequence holds one completion, so that plain causal attention does.
        pixel_values: [patches, patch size] of the different prompts, each once.
        grid_thw: [images, 3].
        placeholders: [R, S] true at the PROMPT's placeholders, F in all.
        feature_index: [F] which merged vision feature stands at each placeholder, sequence by sequence.
        completion_ids: [B, T], padded.
        completion_mask: [B, T] true at real tokens.
        logit_sequence: [B] the sequence that holds each completion.
        logit_index: [B, T] the position in S whose hidden state predicts each completion token.
    """

    rows: tuple[Row, ...]
    token_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    pixel_values: Tensor
    grid_thw: Tensor
    placeholders: Tensor
    feature_index: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logit_sequence: Tensor
    logit_index: Tensor

    def to(self, device: torch.device | str) -> Microbatch:
        """The same with every tensor on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
        return Microbatch(**moved)


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

    A single completion that is over the limit gets a microbatch of its own.

    Raises:
        InputError: a prompt whose placeholders don't match its images, naming it.
    """
    longest = min(SHARED_SEQUENCE_TOKENS, tokens_per_microbatch)
    sequences = [sequence for group in range(len(groups)) for sequence in _share(groups[group], group, longest)]
    for part in _fill(sequences, tokens_per_microbatch):
        yield _collate(groups, part, layout)


@dataclass(frozen=True)
class _Sequence:
    """A prompt and the completions that share it; `width` is all their tokens."""

    group: int
    members: tuple[int, ...]
    width: int


def _share(group: EncodedGroup, index: int, longest: int) -> Iterator[_Sequence]:
    """Sequences of at most `longest` tokens, or of one completion."""
    prompt = len(group.prompt.token_ids)
    members: list[int] = []
    width = prompt
    for member, ids in enumerate(group.completions):
        if members and width + len(ids) > longest:
            yield _Sequence(index, tuple(members), width)
            members, width = [], prompt
        members.append(member)
        width += len(ids)
    if members:
        yield _Sequence(index, tuple(members), width)


def _fill(sequences: Sequence[_Sequence], limit: int) -> Iterator[list[_Sequence]]:
    """Runs of sequences whose padded tokens stay within the limit."""
    part: list[_Sequence] = []
    for sequence in sequences:
        width = max(sequence.width, *(other.width for other in part), 0)
        if part and (len(part) + 1) * width > limit:
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part


def _collate(groups: Sequence[EncodedGroup], sequences: Sequence[_Sequence], layout: TokenLayout) -> Microbatch:
    prompts = {sequence.group: groups[sequence.group].prompt for sequence in sequences}
    images = _PromptImages(prompts, layout)
    rows = [(sequence.group, member) for sequence in sequences for member in sequence.members]
    completions = [torch.tensor(groups[group].completions[member], dtype=torch.long) for group, member in rows]
    shape = (len(sequences), max(sequence.width for sequence in sequences))
    longest = max(map(len, completions))
    token_ids = torch.full(shape, layout.pad_token_id)
    positions = torch.zeros((3, *shape), dtype=torch.long)
    placeholders = torch.zeros(shape, dtype=torch.bool)
    owner = torch.full(shape, _PADDING)
    logit_index = torch.zeros((len(rows), longest), dtype=torch.long)
    logit_sequence = torch.zeros(len(rows), dtype=torch.long)
    remaining = iter(enumerate(completions))
    for number, sequence in enumerate(sequences):
        prompt = torch.tensor(prompts[sequence.group].token_ids)
        end = len(prompt)
        token_ids[number, :end] = prompt
        positions[:, number, :end] = images.positions[sequence.group]
        placeholders[number, :end] = prompt == layout.image_token_id
        owner[number, :end] = _PROMPT
        next_position = int(images.positions[sequence.group].max()) + 1
        for _ in sequence.members:
            row, ids = next(remaining)
            span = slice(end, end + len(ids))
            token_ids[number, span] = ids
            positions[:, number, span] = next_position + torch.arange(len(ids))
            owner[number, span] = row
            logit_sequence[row] = number
            logit_index[row, 1 : len(ids)] = torch.arange(end, max(end, end + len(ids) - 1))
            logit_index[row, 0] = len(prompt) - 1
            end = span.stop
    padded = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=layout.pad_token_id)
    sizes = torch.tensor([len(ids) for ids in completions])
    return Microbatch(
        rows=tuple(rows),
        token_ids=token_ids,
        position_ids=positions,
        attention_mask=_attention_mask(owner) if len(rows) > len(sequences) else None,
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts.values()]),
        grid_thw=torch.cat([prompt.grid_thw for prompt in prompts.values()]),
        placeholders=placeholders,
        feature_index=torch.cat([images.features[sequence.group] for sequence in sequences]),
        completion_ids=padded,
        completion_mask=torch.arange(longest) < sizes[:, None],
        logit_sequence=logit_sequence,
        logit_index=logit_index,
    )


_PROMPT, _PADDING = -1, -2


def _attention_mask(owner: Tensor) -> Tensor:
    """[R, 1, S, S] from each token's owner [R, S]: its completion's row, the prompt, or padding."""
    width = owner.shape[1]
    earlier = torch.ones((width, width), dtype=torch.bool).tril()
    visible = (owner[:, None, :] == _PROMPT) | (owner[:, None, :] == owner[:, :, None])
    return (earlier & visible)[:, None]


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
                    f"prompt {prompt.name}: {found} image placeholder tokens for {len(counts)} images "
                    f"of {counts} merged patches; expected {sum(counts)} placeholders"
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
