"""What a scorer finds: named parts that sum to the reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mars_shared.contracts import ScoreItem


@dataclass(frozen=True)
class Parts:
    """Named parts, and whether an answer could be read from the completion."""

    parts: Mapping[str, float]
    parsed: bool


Scorer = Callable[[ScoreItem], Parts]
