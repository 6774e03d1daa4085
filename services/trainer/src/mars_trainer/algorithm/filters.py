"""DAPO's filters and shaping (arXiv 2503.14476), as pure functions."""

from __future__ import annotations

from collections.abc import Iterable


def has_signal(rewards: Iterable[float]) -> bool:
    """Whether rewards differ at all; a group of equal ones has zero std, hence zero advantages."""
    values = list(rewards)
    return bool(values) and min(values) < max(values)


def overlong_punishment(length: int, *, max_length: int, buffer: int, penalty: float = 1.0) -> float:
    """Soft overlong punishment: 0 up to max_length - buffer, then falling linearly to -penalty at max_length.

    Source: DAPO, equation 13.

    Raises:
        ValueError: a buffer that is not within 1..max_length.

    Example:
        overlong_punishment(75, max_length=100, buffer=50) == -0.5
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"overlong buffer is {buffer} tokens; expected 1 to max_length = {max_length}")
    beyond = length - (max_length - buffer)
    return -penalty * min(max(beyond, 0) / buffer, 1.0)
