"""A step's groups as they come in: those that can teach something, and those without signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mars_shared.contracts import ScoredGroup
from mars_trainer.credit import Credit
from mars_trainer.exchange import Answer


@dataclass
class Batch:
    """Answers in the order in which they were asked, with their credits; `wanted` of them should have signal."""

    wanted: int
    answers: list[Answer] = field(default_factory=list)
    credits: list[Credit] = field(default_factory=list)
    rounds: int = 0

    def add(self, answers: Sequence[Answer], credits: Sequence[Credit]) -> None:
        """What one round of asking brought."""
        self.answers.extend(answers)
        self.credits.extend(credits)
        self.rounds += 1

    @property
    def scored(self) -> list[ScoredGroup]:
        return [answer.scored for answer in self.answers]

    @property
    def all(self) -> list[tuple[ScoredGroup, Credit]]:
        return list(zip(self.scored, self.credits, strict=True))

    @property
    def with_signal(self) -> list[tuple[ScoredGroup, Credit]]:
        return [(scored, credit) for scored, credit in self.all if credit.signal]

    @property
    def without_signal(self) -> set[int]:
        """Dispatch indices of groups without signal."""
        return {scored.group.prompt.dispatch_index for scored, credit in self.all if not credit.signal}

    @property
    def missing(self) -> int:
        """Groups with signal that are still to come."""
        return self.wanted - len(self.with_signal)

    @property
    def metrics(self) -> dict[str, float]:
        """How often the step had to ask."""
        return {"generation_batches": float(self.rounds), "groups": float(len(self.answers))}
