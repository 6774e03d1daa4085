"""Keeps a few whole groups as JSON lines, for people to look at."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mars_shared.contracts import ScoredGroup
from mars_shared.telemetry import LineLog, parse_lines
from mars_trainer.algorithm.advantages import GroupAdvantages

KEEP_PER_STEP = 2
KEEP_EVERY_STEPS = 10
KEEP_PER_EVALUATION = 8

Occasion = Literal["step", "evaluation"]


class SampleLog:
    """Appends {"occasion", "step", "scored", "advantages"} lines."""

    def __init__(self, path: Path) -> None:
        self._lines = LineLog(path)

    def step(self, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[GroupAdvantages]) -> None:
        """Keep the first groups of the first and every KEEP_EVERY_STEPS-th step."""
        if step == 1 or step % KEEP_EVERY_STEPS == 0:
            self._write("step", step, groups[:KEEP_PER_STEP], advantages[:KEEP_PER_STEP])

    def evaluation(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Keep the first groups of an evaluation: the same samples each time."""
        kept = groups[:KEEP_PER_EVALUATION]
        self._write("evaluation", step, kept, [None] * len(kept))

    def _write(
        self, occasion: Occasion, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[GroupAdvantages | None]
    ) -> None:
        for scored, statistics in zip(groups, advantages, strict=True):
            line = {
                "occasion": occasion,
                "step": step,
                "scored": scored.model_dump(mode="json"),
                "advantages": None if statistics is None else asdict(statistics),
            }
            self._lines.append(json.dumps(line))


@dataclass(frozen=True)
class KeptGroup:
    """A group as it was kept; `advantages` has GroupAdvantages' fields, None for evaluations."""

    step: int
    scored: ScoredGroup
    advantages: dict[str, Any] | None


def read_samples(path: Path, occasion: Occasion) -> Iterator[KeptGroup]:
    """Groups of one occasion, in order; a torn last line is left out."""
    for entry in parse_lines(io.StringIO(path.read_text(encoding="utf-8"))):
        if entry["occasion"] == occasion:
            yield KeptGroup(entry["step"], ScoredGroup.model_validate(entry["scored"]), entry["advantages"])
