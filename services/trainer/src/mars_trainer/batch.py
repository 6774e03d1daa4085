"""A step's groups as they come in: those to train on, and those without signal that were replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mars_shared.contracts import ScoredGroup
from mars_trainer.credit import Credit
from mars_trainer.exchange import Answer


@dataclass
class Batch:
    """Answers in the order in which they were asked, with their credits.

    Attributes:
        wanted: groups to train on.
        filters: whether groups without signal are dropped and replaced (dynamic sampling).
        rounds: how often groups were asked for.
    """

    wanted: int
    filters: bool
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
        """All groups."""
        return [answer.scored for answer in self.answers]

    @property
    def kept(self) -> list[tuple[Answer, Credit]]:
        """What to train on."""
        return [(answer, credit) for answer, credit in self._pairs() if credit.signal or not self.filters]

    @property
    def dropped(self) -> list[Answer]:
        """What is not trained on."""
        return [answer for answer, credit in self._pairs() if self.filters and not credit.signal]

    @property
    def missing(self) -> int:
        """Groups to train on that are still to come."""
        return self.wanted - len(self.kept)

    @property
    def metrics(self) -> dict[str, float]:
        """How often the step had to ask, for how many groups, and how many of them it trains on."""
        return {
            "generation_batches": float(self.rounds),
            "groups": float(len(self.answers)),
            "groups/trained": float(len(self.kept)),
        }

    def _pairs(self) -> list[tuple[Answer, Credit]]:
        return list(zip(self.answers, self.credits, strict=True))
