"""What is kept of every scored group: all that people look at, without token ids and log-probabilities."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from mars_shared.contracts import FinishReason, Kind, PolicyVersion, Source, Truth
from mars_shared.contracts.base import Contract, Message
from mars_shared.contracts.prompt import Box
from mars_shared.records.segments import Facts, Line, SegmentReader

Occasion = Literal["step", "evaluation"]


class AnswerRecord(Contract):
    """One completion with its score. `advantage` is None where nothing is learned from it: mono-source ones, evaluations."""

    kind: Kind
    source: str | None
    index: int
    text: str
    tokens: int = Field(ge=0)
    finish_reason: FinishReason
    reward: float
    parts: dict[str, float]
    parsed: bool
    boxes: tuple[Box, ...] = Field(description="in original pixels")
    advantage: float | None


class Statistics(Contract):
    """Of a training group, after overlong punishment (method: the pool is what advantages are normalised over)."""

    pool_mean: float
    pool_std: float
    signal: bool = Field(description="whether the group can teach anything")
    trained: bool = Field(description="False: dynamic sampling left it out")


class GroupRecord(Message):
    """A group as it was scored, and what became of it."""

    time: float = Field(description="unix time when it was written down")
    occasion: Occasion
    step: int = Field(ge=0, description="that it was trained in, or of the policy that was evaluated")
    task_id: str
    prompt_id: str
    question: str
    sources: tuple[Source, ...]
    truth: Truth | None
    answers: tuple[AnswerRecord, ...] = Field(min_length=1)
    statistics: Statistics | None
    gain: float | None = Field(description="mean multi-source minus mean mono-source reward; None without mono-source answers")
    gain_by_source: dict[str, float]
    policy_version: PolicyVersion
    replica: str
    generation_s: float
    reward_s: float

    @property
    def name(self) -> str:
        """Its own in the run: a step that a restart repeats writes groups of the same names."""
        return self.task_id if self.occasion == "step" else f"eval-{self.step}-{self.prompt_id}"

    @property
    def dataset(self) -> str:
        """The first part of the prompt's name."""
        return self.prompt_id.split("/", 1)[0]


def group_facts(entry: dict[str, Any]) -> Facts:
    """What lists and filters of groups need of a `GroupRecord`'s JSON.

    Raises:
        ValueError: it is none.
    """
    record = GroupRecord.model_validate(entry)
    rewards = [answer.reward for answer in record.answers if answer.kind is Kind.MULTI]
    return {
        "name": record.name,
        "occasion": record.occasion,
        "step": record.step,
        "prompt_id": record.prompt_id,
        "dataset": record.dataset,
        "sources": [source.name for source in record.sources],
        "reward": fmean(rewards),
        "gain": record.gain,
        "gain_by_source": record.gain_by_source,
        "losing_to": sorted(name for name, gain in record.gain_by_source.items() if gain < 0),
        "signal": None if record.statistics is None else record.statistics.signal,
        "replica": record.replica,
    }


def read_groups(folder: Path) -> list[GroupRecord]:
    """All groups of a run's folder of them, each once: what a restart repeated counts as done last."""
    reader = SegmentReader(folder, group_facts)
    latest = latest_of(reader.refresh())
    return [GroupRecord.model_validate(reader.entry(line)) for line in latest]


def latest_of(lines: list[Line]) -> list[Line]:
    """One line a group, the last one, in the order of the steps."""
    latest = {line.facts["name"]: line for line in lines}
    return sorted(latest.values(), key=lambda line: (line.facts["step"], line.segment, line.offset))
