"""Where sampler and trainer differ, from what each says of the same group: plain values, compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mars_shared.contracts import BoxFrame
from mars_shared.settings import Recipe


@dataclass(frozen=True)
class Bounds:
    """Of the absolute difference of a token's log-probabilities, nats: of any token, and of the mean over all."""

    maximum: float
    mean: float


BOUNDS = {
    ("float32", "cpu"): Bounds(maximum=1e-3, mean=1e-4),
    ("float32", "cuda"): Bounds(maximum=0.05, mean=0.01),
    ("bfloat16", "cpu"): Bounds(maximum=1.0, mean=0.05),
    ("bfloat16", "cuda"): Bounds(maximum=1.0, mean=0.05),
}
"""By model.dtype and the trainer's device. DECISIONS.md, "The self-test's bounds", has the sources."""


@dataclass(frozen=True)
class ViewFacts:
    """What one side says of one view.

    Attributes:
        images: source names in placeholder order, the order of the next two.
        image_tokens: placeholder tokens.
        pixels: `pixel_hash`.
        logprobs: by completion and token; the trainer's are None where its image tokens differ, so that nothing can be computed.
    """

    images: tuple[str, ...]
    image_tokens: tuple[int, ...]
    pixels: tuple[str, ...]
    frame: BoxFrame
    logprobs: tuple[tuple[float, ...], ...] | None


Facts = Mapping[str | None, ViewFacts]
"""By source; None is the multi-source view."""


@dataclass(frozen=True)
class LogprobDifferences:
    """Of all tokens that were compared, nats."""

    tokens: int
    maximum: float
    mean: float


def bounds_of(recipe: Recipe, device: str) -> Bounds:
    """The recipe's bounds; where they are unset, those of its dtype and the trainer's device ("cpu" or "cuda")."""
    chosen, usual = recipe.self_test, BOUNDS[recipe.model.dtype, device]
    return Bounds(
        maximum=usual.maximum if chosen.max_logprob_difference is None else chosen.max_logprob_difference,
        mean=usual.mean if chosen.mean_logprob_difference is None else chosen.mean_logprob_difference,
    )


def differences(sampler: Facts, trainer: Facts, bounds: Bounds) -> list[str]:
    """One line for everything in which both sides differ beyond its bound; empty if they agree.

    Image tokens, pixels and frames must be equal. What is not a number differs from everything.
    """
    found = [line for source, theirs in sampler.items() for line in _view_differences(source, theirs, trainer[source], bounds)]
    compared = logprob_differences(sampler, trainer)
    if not compared.mean <= bounds.mean:
        found.append(
            f"log-probabilities of {compared.tokens} tokens: mean difference {compared.mean:.3g}; "
            f"bound {bounds.mean:g} (self_test.mean_logprob_difference)"
        )
    return found


def logprob_differences(sampler: Facts, trainer: Facts) -> LogprobDifferences:
    """Over all views where both sides have log-probabilities."""
    values = [
        abs(said - computed)
        for source, theirs in sampler.items()
        for said_T, computed_T in zip(theirs.logprobs or (), trainer[source].logprobs or (), strict=False)
        for said, computed in zip(said_T, computed_T, strict=True)
    ]
    return LogprobDifferences(len(values), max(values, key=_size, default=0.0), math.fsum(values) / max(len(values), 1))


def _size(difference: float) -> float:
    """For ordering: what is not a number is larger than any."""
    return math.inf if math.isnan(difference) else difference


def _view_differences(source: str | None, sampler: ViewFacts, trainer: ViewFacts, bounds: Bounds) -> Iterator[str]:
    name = "view of all sources" if source is None else f"view of source {source!r}"
    if sampler.image_tokens != trainer.image_tokens:
        yield (
            f"{name}: tokens of images {', '.join(sampler.images)}: sampler {sampler.image_tokens}, trainer "
            f"{trainer.image_tokens}; expected equal numbers"
        )
    if len(sampler.pixels) != len(trainer.pixels):
        yield f"{name}: pixel hashes: sampler {len(sampler.pixels)}, trainer {len(trainer.pixels)}; expected equal numbers"
    for image, theirs, ours in zip(sampler.images, sampler.pixels, trainer.pixels, strict=False):
        if theirs != ours:
            yield f"{name}: pixels of image {image!r}: sampler {theirs[:16]}, trainer {ours[:16]}; expected equal hashes"
    if sampler.frame != trainer.frame:
        yield f"{name}: box frame: sampler {_frame_text(sampler.frame)}, trainer {_frame_text(trainer.frame)}; expected equal frames"
    if sampler.logprobs is not None and trainer.logprobs is not None:
        for index, (said_T, computed_T) in enumerate(zip(sampler.logprobs, trainer.logprobs, strict=True)):
            yield from _completion_differences(f"{name}, completion {index}", said_T, computed_T, bounds.maximum)


def _completion_differences(name: str, said_T: tuple[float, ...], computed_T: tuple[float, ...], bound: float) -> Iterator[str]:
    """The worst token, and how many are over the bound."""
    sizes = [_size(abs(said - computed)) for said, computed in zip(said_T, computed_T, strict=True)]
    over = [index for index, size in enumerate(sizes) if size > bound]
    if over:
        worst = max(over, key=lambda index: sizes[index])
        yield (
            f"{name}: log-probabilities of {len(over)} of {len(sizes)} tokens differ, most that of token {worst}: sampler "
            f"{said_T[worst]:.6f}, trainer {computed_T[worst]:.6f}; bound {bound:g} (self_test.max_logprob_difference)"
        )


def _frame_text(frame: BoxFrame) -> str:
    return f"{frame.kind} {frame.width:g} x {frame.height:g}"
