"""Keeps a few whole groups as JSON lines, for people to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from mars_shared.contracts import ScoredGroup

KEEP_PER_STEP = 2
KEEP_EVERY_STEPS = 10
KEEP_PER_EVALUATION = 8

Occasion = Literal["step", "evaluation"]


class SampleLog:
    """Appends {"occasion", "step", "scored"} lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Keep the first groups of every KEEP_EVERY_STEPS-th step."""
        if step % KEEP_EVERY_STEPS == 0:
            self._write("step", step, groups[:KEEP_PER_STEP])

    def evaluation(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Keep the first groups of an evaluation: the same samples each time."""
        self._write("evaluation", step, groups[:KEEP_PER_EVALUATION])

    def _write(self, occasion: Occasion, step: int, groups: Sequence[ScoredGroup]) -> None:
        for scored in groups:
            line = {"occasion": occasion, "step": step, "scored": scored.model_dump(mode="json")}
            self._file.write(json.dumps(line) + "\n")


def read_samples(path: Path, occasion: Occasion) -> Iterator[tuple[int, ScoredGroup]]:
    """(step, group) of one occasion, in order; a torn last line is left out."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            entry = json.loads(line)
            if entry["occasion"] == occasion:
                yield entry["step"], ScoredGroup.model_validate(entry["scored"])
