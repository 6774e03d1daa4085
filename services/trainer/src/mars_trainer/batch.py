"""A step's groups: those to train on, and those without signal that were replaced."""

from __future__ import annotations

from dataclasses import dataclass

from mars_shared.contracts import ScoredGroup
from mars_trainer.credit import Credit
from mars_trainer.exchange import Answer


@dataclass(frozen=True)
class Judged:
    """A group and what its completions are credited with."""

    answer: Answer
    credit: Credit


@dataclass(frozen=True)
class Batch:
    """A step's groups in dispatch order.

    Attributes:
        wanted: groups to train on.
        kept: what is trained on.
        dropped: what dynamic sampling left out.
    """

    wanted: int
    kept: tuple[Judged, ...]
    dropped: tuple[Judged, ...]

    @property
    def all(self) -> list[Judged]:
        """Kept and dropped groups in dispatch order."""
        return sorted((*self.kept, *self.dropped), key=lambda judged: judged.answer.scored.group.prompt.dispatch_index)

    @property
    def answers(self) -> list[Answer]:
        return [judged.answer for judged in self.all]

    @property
    def scored(self) -> list[ScoredGroup]:
        return [judged.answer.scored for judged in self.all]

    @property
    def credits(self) -> list[Credit]:
        return [judged.credit for judged in self.all]

    @property
    def missing(self) -> int:
        """Groups that the step does without."""
        return self.wanted - len(self.kept)

    @property
    def metrics(self) -> dict[str, float]:
        """How many groups the step looked at, and how many of them it trains on."""
        return {"groups": float(len(self.kept) + len(self.dropped)), "groups/trained": float(len(self.kept))}
