"""Run folders as a trainer leaves them, with events and groups that a test can compute with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from builders import image_bytes, make_group, make_prompt, make_score, make_scored, sampling
from mars_shared.blobs import BlobStore
from mars_shared.contracts import Kind, Purpose, ScoredGroup, Source, Truth
from mars_shared.contracts.prompt import Box
from mars_shared.records.start import Host, RunStart
from mars_shared.telemetry import EventLog
from mars_trainer.algorithm.advantages import mars_advantages
from mars_trainer.batch import Batch, Judged
from mars_trainer.credit import Credit
from mars_trainer.group_log import GroupLog

SOURCES = ("visible", "infrared")
IMAGE = image_bytes((56, 28))


class RunFolder:
    """Writes what a run leaves behind; rewards of a group are those of its multi-source answers, then visible, then infrared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = BlobStore(folder / "blobs")
        self.groups = GroupLog(folder / "groups")
        self.events = EventLog(folder / "events.jsonl")

    def start(
        self,
        *,
        seed: int = 0,
        incarnation: int = 1,
        model: str | None = None,
        versions: dict[str, str] | None = None,
        sections: dict[str, dict[str, Any]] | None = None,
        **train: Any,
    ) -> None:
        """`sections` are of the recipe besides those that it has here, and `train` are settings of its section."""
        recipe = {
            "run": {"name": f"test-{seed}", "dir": str(self.folder), "seed": seed},
            "train": {"steps": 6, "learning_rate": 0.001, **train},
            "weights": {"url": None},
            **(sections or {}),
        }
        host = Host(platform="Linux", cpu="A CPU", cores=2)
        start = RunStart(incarnation=incarnation, recipe=recipe, model=model, versions=versions or {"torch": "2.9.1"}, host=host)
        self.events.write("started", **start.model_dump(mode="json"))

    def step(self, step: int, *groups: ScoredGroup, steps: int = 6, **metrics: float) -> None:
        if groups:
            self.groups.step(step, Batch(len(groups), tuple(judged(group) for group in groups), ()))
        seconds = {"training": 2.0, "weight_push": 0.0, "generation": 1.0, "reward": 0.5, "waiting": 0.5}
        self.events.write("step", step=step, steps=steps, metrics={"reward": 0.5, "kl": 0.0, **metrics}, seconds=seconds)

    def evaluation(self, step: int, multi: float, *groups: ScoredGroup, union: float = 0.75) -> None:
        self.groups.evaluation(step, groups)
        result = {
            "samples": 4,
            "multi": multi,
            "mono": {"visible": 0.5, "infrared": 0.25},
            "union": union,
            "multi_minus_union": multi - union,
            "correct": multi,
            "parsed": 1.0,
            "intervals": {"multi": [multi - 0.125, multi + 0.125]},
        }
        self.events.write("evaluation", step=step, **result, datasets={"digits": result}, seconds=3.0)

    def group(
        self,
        index: int,
        rewards: Sequence[float],
        *,
        text: str = "7",
        purpose: Purpose = Purpose.TRAIN,
        question: str = "Which digit?",
        truth: Truth | None = None,
        boxes: Sequence[Box] = (),
    ) -> ScoredGroup:
        """A scored group of the dataset `digits`; every answer is `text`, and answers `boxes`."""
        spec = sampling(len(rewards) - 2, 1, greedy=len(rewards) == 3)
        made = make_prompt(index, sources=SOURCES, spec=spec, purpose=purpose)
        changed: dict[str, Any] = {"prompt_id": f"digits/test/{index}", "question": question, "sources": self._sources()}
        group = make_group(made.model_copy(update={**changed, **({"truth": truth} if truth else {})}))
        answers = tuple(completion.model_copy(update={"text": text}) for completion in group.completions)
        scores = [make_score(reward).model_copy(update={"boxes": tuple(boxes)}) for reward in rewards]
        return make_scored(group.model_copy(update={"completions": answers}), scores)

    def _sources(self) -> tuple[Source, ...]:
        return tuple(Source(name=name, blob=self.blobs.put(IMAGE), media_type="image/png") for name in SOURCES)


def judged(group: ScoredGroup) -> Judged:
    found = mars_advantages(group.rewards(Kind.MULTI), {name: group.rewards(Kind.MONO, name) for name in SOURCES})
    signs = (True,) * len(group.rewards(Kind.MULTI))
    credit = Credit(found, signs, tuple(0.0 for _ in signs), signal=found.pool_std > 0)
    return Judged(cast(Any, SimpleNamespace(scored=group)), credit)
