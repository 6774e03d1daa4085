"""What trackers read: a run folder with events, groups and images, by hand. And trackers that note, fail or hang."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builders import image_bytes, make_group, make_prompt, make_score, make_scored, sampling
from mars_shared.blobs import BlobStore
from mars_shared.contracts import Kind, Purpose, ScoredGroup, Source
from mars_shared.records.groups import GroupRecord, Occasion
from mars_shared.settings import Recipe, load_recipe
from mars_shared.telemetry import EventLog
from mars_trainer.group_log import GroupLog

RECIPE = """
[run]
name = "tracked"
dir = "{dir}"
[model]
path = "{dir}"
max_model_len = 64
[data]
dataset = "digits"
[rollout]
num_generations = 1
max_completion_length = 8
[train]
steps = 9
prompts_per_step = 1
learning_rate = 1e-3
[track]
{track}
"""


class RunFolder:
    """Writes what the trainer writes, event by event."""

    def __init__(self, path: Path, track: str = "samples_every = 1") -> None:
        self.path = path
        (path / "recipe.toml").write_text(RECIPE.format(dir=path, track=track))
        self.recipe: Recipe = load_recipe(path / "recipe.toml")
        self._blobs = [BlobStore(path / "blobs").put(image_bytes(color=color)) for color in ((200, 10, 30), (10, 10, 200))]
        self._groups = GroupLog(path / "groups")
        self._events = EventLog(path / "events.jsonl")

    def step(self, step: int, reward: float, **metrics: float) -> None:
        """A training step that took 2 s of training and 0.5 s of generation."""
        seconds = {"training": 2.0, "generation": 0.5}
        self._events.write("step", step=step, steps=9, metrics={"reward": reward, **metrics}, seconds=seconds, window=[0.0, 2.5])

    def resumed(self, step: int) -> None:
        self._events.write("resumed", step=step, incarnation=2)

    def evaluation(self, step: int, multi: float, *, texts: Sequence[str] = ("7",)) -> None:
        """Half of visible's and all of infrared's answers are right; each text is what one sample is answered with all sources."""
        self._groups.evaluation(step, [self._answered(index, text) for index, text in enumerate(texts)])
        result = {"multi": multi, "mono": {"visible": 0.5, "infrared": 1.0}, "union": 1.0, "multi_minus_union": multi - 1.0}
        result |= {"correct": multi, "parsed": 0.75}
        self._events.write("evaluation", step=step, **result, datasets={"digits": result})

    def _answered(self, index: int, text: str) -> ScoredGroup:
        prompt = make_prompt(index, purpose=Purpose.EVAL, spec=sampling(1, 1, greedy=True))
        sources = zip(("visible", "infrared"), self._blobs, strict=True)
        prompt = prompt.model_copy(
            update={"sources": tuple(Source(name=name, blob=blob, media_type="image/png") for name, blob in sources)}
        )
        group = make_group(prompt)
        multi, *mono = group.completions
        assert multi.kind is Kind.MULTI
        completions = (multi.model_copy(update={"text": text}), *mono)
        return make_scored(
            group.model_copy(update={"completions": completions}), [make_score(value) for value in (1.5, 0.5, 1.5)]
        )


class NotingTracker:
    """Notes what it gets as (kind, step, value); raises as often as `faults` says, and hangs where it is told to."""

    def __init__(self, *, can_rewind: bool, faults: dict[str, list[Exception]] | None = None) -> None:
        self.notes: list[tuple[str, int, Any]] = []
        self.opened = self.closed = 0
        self.hangs: threading.Event | None = None
        self._can_rewind = can_rewind
        self._faults = faults or {}

    def open(self, recipe: Recipe) -> NotingTracker:
        self.opened += 1
        self._fail("open")
        return self

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._fail("scalars")
        if self.hangs is not None:
            self.hangs.wait()
        name = "reward" if "reward" in values else "eval/multi"
        self.notes.append((name, step, values[name]))

    def groups(self, step: int, occasion: Occasion, groups: Sequence[GroupRecord], picture: bytes | None) -> None:
        self._fail("groups")
        self.notes.append((f"groups of {occasion}", step, [group.prompt_id for group in groups]))

    def rewind(self, step: int) -> bool:
        if self._can_rewind:
            self.notes.append(("rewind", step, None))
        return self._can_rewind

    def flush(self) -> None:
        self._fail("flush")

    def close(self) -> None:
        self.closed += 1

    def _fail(self, where: str) -> None:
        if self._faults.get(where):
            raise self._faults[where].pop(0)
