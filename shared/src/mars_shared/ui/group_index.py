"""All groups of a run by what they are about, filtered in the order of the steps; the groups themselves stay on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mars_shared.records.groups import GroupRecord, Occasion, group_facts, latest_of
from mars_shared.records.segments import Facts, Line, SegmentReader

Outcome = Literal["conflict", "promotion", "no_signal"]


class GroupFilter(BaseModel):
    """Which groups to list; what is None does not matter."""

    model_config = ConfigDict(extra="forbid")

    occasion: Occasion | None = None
    outcome: Outcome | None = Field(default=None, description="gain below 0, gain above 0, or nothing to learn from")
    dataset: str | None = None
    source: str | None = Field(default=None, description="the group has this source")
    losing_to: str | None = Field(default=None, description="this source alone earns more than all together")
    min_reward: Annotated[float | None, Field(allow_inf_nan=False)] = Field(default=None, description="mean, multi-source")
    max_reward: Annotated[float | None, Field(allow_inf_nan=False)] = None
    min_step: int | None = None
    max_step: int | None = None

    def passing(self, groups: list[Facts]) -> list[Facts]:
        """Those that pass, in their order."""
        for test in self._tests():
            groups = [facts for facts in groups if test(facts)]
        return groups

    def _tests(self) -> list[Callable[[Facts], bool]]:
        tests: list[Callable[[Facts], bool]] = []
        if self.occasion is not None:
            tests.append(lambda facts: facts["occasion"] == self.occasion)
        if self.outcome is not None:
            tests.append(OUTCOMES[self.outcome])
        if self.dataset is not None:
            tests.append(lambda facts: facts["dataset"] == self.dataset)
        if (source := self.source) is not None:
            tests.append(lambda facts: source in facts["sources"])
        if (better := self.losing_to) is not None:
            tests.append(lambda facts: better in facts["losing_to"])
        return [*tests, *_within("reward", self.min_reward, self.max_reward), *_within("step", self.min_step, self.max_step)]


def _within(name: str, low: float | None, high: float | None) -> Iterator[Callable[[Facts], bool]]:
    if low is not None:
        yield lambda facts: bool(facts[name] >= low)
    if high is not None:
        yield lambda facts: bool(facts[name] <= high)


OUTCOMES: dict[Outcome, Callable[[Facts], bool]] = {
    "conflict": lambda facts: facts["gain"] is not None and facts["gain"] < 0,
    "promotion": lambda facts: facts["gain"] is not None and facts["gain"] > 0,
    "no_signal": lambda facts: facts["signal"] is False,
}


class GroupIndex:
    """Follows the groups of a run; for one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._reader = SegmentReader(folder, group_facts)
        self._lines: dict[str, Line] = {}
        self._sorted: list[Facts] = []
        self._datasets: set[str] = set()
        self._sources: set[str] = set()

    def refresh(self) -> None:
        """Take up what was written since the last call."""
        if new := self._reader.refresh():
            self._lines.update((line.facts["name"], line) for line in new)
            self._sorted = [line.facts for line in latest_of(list(self._lines.values()))]
            self._datasets.update(line.facts["dataset"] for line in new)
            self._sources.update(source for line in new for source in line.facts["sources"])

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def unreadable(self) -> int:
        """Lines of the folder that hold no record of a group."""
        return self._reader.unreadable

    def names(self, wanted: GroupFilter) -> list[str]:
        """Of the groups that pass, in the order of the steps."""
        return [facts["name"] for facts in wanted.passing(self._sorted)]

    def facts(self, names: list[str]) -> list[Facts]:
        """What some groups are about."""
        return [self._lines[name].facts for name in names]

    def record(self, name: str) -> GroupRecord | None:
        """A whole group, from disk; None if there is none of that name."""
        line = self._lines.get(name)
        return None if line is None else GroupRecord.model_validate(self._reader.entry(line))

    def choices(self) -> dict[str, list[str]]:
        """Datasets and sources that occur."""
        return {"datasets": sorted(self._datasets), "sources": sorted(self._sources)}
