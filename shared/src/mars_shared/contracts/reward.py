"""What the reward service is asked and what it answers."""

from __future__ import annotations

from pydantic import Field, model_validator

from mars_shared.contracts.base import Contract, Message
from mars_shared.contracts.prompt import Box, Truth
from mars_shared.contracts.rollout import BoxFrame, Kind, RolloutGroup


class ScoreItem(Contract):
    """One completion to score. `frame` is needed for boxes and ignored for text; custom rewards see `question`."""

    completion: str
    truth: Truth
    frame: BoxFrame | None = None
    question: str | None = None


class ReleasedEval(Contract):
    """What the paper's released evaluation script says of a completion."""

    value: float | None = Field(
        description="mIoU, or 1 for a right text and 0 for a wrong one; None: the script drops the sample"
    )
    correct: bool


class Score(Contract):
    """A reward and its named parts, e.g. {"format": 0.5, "accuracy": 1.0}."""

    reward: float
    parts: dict[str, float]
    parsed: bool = Field(description="whether an answer could be read from the completion")
    boxes: tuple[Box, ...] = Field(default=(), description="that the completion answers, in original pixels")


class Unscored(Contract):
    """In the place of a score: why the completion has none. Rewards of the recipes `paper` and `released` always score."""

    error: str


class ScoreRequest(Message):
    """Body of POST /v1/score: a batch, scored item by item in order."""

    items: tuple[ScoreItem, ...] = Field(min_length=1, max_length=4096)
    recipe: str | None = Field(default=None, description="None: the recipe that the service was started with")


class ScoreResponse(Message):
    """Scores in the order of the request's items."""

    recipe: str
    scores: tuple[Score | Unscored, ...]


class ScoredGroup(Message):
    """A group with one score per completion, in the order of the completions."""

    group: RolloutGroup
    scores: tuple[Score, ...]
    released: tuple[ReleasedEval, ...] | None = Field(default=None, description="one per completion, of evaluation groups")
    recipe: str
    scoring_started_at: float = Field(ge=0, description="unix time when scoring began; for the timeline alone")
    reward_s: float = Field(ge=0, description="wall seconds that scoring took")

    def rewards(self, kind: Kind, source: str | None = None) -> tuple[float, ...]:
        """Rewards of one kind; of one source if `source` is given."""
        return tuple(
            score.reward
            for completion, score in zip(self.group.completions, self.scores, strict=True)
            if completion.kind is kind and (source is None or completion.source == source)
        )

    @model_validator(mode="after")
    def _one_score_each(self) -> ScoredGroup:
        if self.released is not None and len(self.released) != len(self.group.completions):
            raise ValueError(
                f"group {self.group.group_id}: {len(self.released)} released results for {len(self.group.completions)} completions"
            )
        if len(self.scores) != len(self.group.completions):
            raise ValueError(
                f"group {self.group.group_id}: {len(self.scores)} scores for {len(self.group.completions)} completions"
            )
        return self
