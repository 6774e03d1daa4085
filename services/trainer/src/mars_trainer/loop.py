"""The training loop: ask for a batch of groups, learn from them, publish, checkpoint, repeat.

Reading order: `TrainingRun.run`, then `_step`. With max_staleness = 0 every group is made by
the very policy that it trains.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mars_shared.contracts import PolicyVersion, Prompt, WeightManifest
from mars_shared.errors import InputError
from mars_shared.queue import DeadLetter
from mars_shared.settings import Recipe
from mars_shared.telemetry import EventLog, read_events
from mars_trainer.batch import Batch
from mars_trainer.checkpoint import Checkpoint, CheckpointStore, Ledger
from mars_trainer.credit import credit
from mars_trainer.datasets import RunData
from mars_trainer.dispatch import PromptMaker, place_of
from mars_trainer.evaluate import EvaluationKind, evaluate, results_name, summarise_by_dataset, write_results
from mars_trainer.exchange import Answer, Exchange
from mars_trainer.learner import Learner
from mars_trainer.metrics import finite, rollout_metrics
from mars_trainer.publish import Publisher
from mars_trainer.samples import SampleLog
from mars_trainer.selftest import SelfTest
from mars_trainer.timeline import stage_seconds

logger = logging.getLogger(__name__)

REPLACEMENTS_PER_PLACE = 2


@dataclass
class Progress:
    """Where a run is; what GET /v1/run answers."""

    run: str
    steps: int
    version: PolicyVersion
    state: str = "starting"
    next_dispatch_index: int = 0
    dead: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    served: dict[str, str] = field(default_factory=dict)
    """Policy version by replica, as its last group said."""


@dataclass
class TrainingRun:
    """One incarnation of a run, from its newest checkpoint to its last step."""

    recipe: Recipe
    data: RunData
    learner: Learner
    prompts: PromptMaker
    training: Exchange
    evaluation: Exchange
    publisher: Publisher
    checkpoints: CheckpointStore
    events: EventLog
    samples: SampleLog
    evaluations: Path
    """Folder of the results of every sample, one file an evaluation."""
    ledger: Ledger
    progress: Progress
    self_test: SelfTest | None = None
    _unacknowledged: list[Answer] = field(default_factory=list)
    _replaced: int = 0

    async def run(self) -> None:
        """Train to the recipe's last step; evaluates at the start, at intervals and at the end."""
        await self.training.start()
        await self.evaluation.start()
        await asyncio.to_thread(self._publish)
        self.progress.state = "published"
        if self.self_test:
            await self.self_test.run(self.version)
        if self.version.step == 0:
            await self._evaluate()
            await asyncio.to_thread(self._checkpoint)
        while self.version.step < self.recipe.train.steps:
            await self._step()
        await self._evaluate()
        self.progress.state = "finished"
        self.events.write("finished", step=self.version.step, weights=self.learner.weights_hash())

    async def evaluate_newest(self) -> None:
        """Evaluate the newest checkpoint's policy, or the base model where there is none; the run itself stays as it was."""
        await self.evaluation.start()
        await asyncio.to_thread(self._publish)
        self.progress.state = "published"
        await self._ask_held_out("evaluated")
        self.progress.state = "finished"

    @property
    def version(self) -> PolicyVersion:
        """The policy being trained and served."""
        return self.ledger.version

    async def _step(self) -> None:
        began = time.time()
        self.progress.state = "collecting"
        batch = await self._collect()
        self.progress.state = "training"
        trained_from = time.time()
        learned = await asyncio.to_thread(self._learn, batch)
        trained_to = time.time()
        self._advance(batch)
        await asyncio.to_thread(self._publish)
        pushed = time.time()
        await self.training.acknowledge(batch.dropped)  # nothing of them is in the weights, so no checkpoint waits for them
        self._say_what_is_missing(batch)
        metrics = finite(rollout_metrics(batch.scored, batch.credits) | batch.metrics | learned)
        window = (began, pushed)
        seconds = stage_seconds(window, _intervals(batch.answers, (trained_from, trained_to), (trained_to, pushed)))
        self._report(metrics, seconds, window, batch.answers)
        self.samples.step(self.version.step, batch.scored, [credit.advantages for credit in batch.credits])
        last = self.version.step == self.recipe.train.steps
        if last or self.version.step % self.recipe.train.checkpoint_every == 0:
            await asyncio.to_thread(self._checkpoint)
            await self.training.acknowledge(self._unacknowledged)
            self._unacknowledged.clear()
        if not last and self.recipe.eval.every and self.version.step % self.recipe.eval.every == 0:
            await self._evaluate()

    async def _collect(self) -> Batch:
        """Ask for a step's groups; with dynamic sampling, for others in place of those without signal, within bounds."""
        train, longest = self.recipe.train, self.recipe.rollout.max_completion_length
        batch = Batch(wanted=train.prompts_per_step, filters=train.dynamic_sampling != "none")
        self._replaced = 0
        for _ in range(train.max_generation_batches if batch.filters else 1):
            prompts = [self._next_prompt() for _ in range(batch.missing)]
            answers = await self.training.gather(prompts, replace=self._replacement)
            batch.add(answers, [credit(answer.scored, train, longest) for answer in answers])
            if not batch.missing:
                break
        if not batch.answers:
            raise InputError(
                f"step {self.version.step + 1}: every prompt died, {self._replaced} replacements too; see the events"
            )
        return batch

    def _learn(self, batch: Batch) -> dict[str, float]:
        if not batch.kept:
            self.learner.skip()
            return {}
        return self.learner.step([answer.scored for answer, _ in batch.kept], [credit for _, credit in batch.kept])

    def _say_what_is_missing(self, batch: Batch) -> None:
        """A step with fewer groups than wanted: dynamic sampling came to its bound, or prompts died."""
        if batch.missing:
            kept = len(batch.kept)
            self.events.write(
                "short" if kept else "skipped",
                step=self.version.step,
                kept=kept,
                wanted=batch.wanted,
                without_signal=len(batch.dropped),
                rounds=batch.rounds,
            )

    def _next_prompt(self) -> Prompt:
        """The prompt of the next dispatch index; a sample that cannot be opened is passed over, and said.

        Raises:
            InputError: not one sample of the training set can be opened.
        """
        rows = len(self.data.train)
        for _ in range(rows):
            index = self.progress.next_dispatch_index
            self.progress.next_dispatch_index += 1
            place = place_of(index, rows=rows, seed=self.recipe.run.seed)
            try:
                sample = self.data.train[place.row]
                return self.prompts.training(sample, epoch=place.epoch, dispatch_index=index, version=self.version)
            except InputError as error:
                self.progress.dead.append(index)
                self.events.write("dead", reason=str(error))
        raise InputError(f"none of the {rows} training samples can be opened; see the events, or run `mars data check`")

    def _replacement(self, prompt: Prompt, letter: DeadLetter) -> Prompt | None:
        """Another prompt for a dead one; a step that loses too many does with fewer."""
        self.progress.dead.append(prompt.dispatch_index)
        reason = f"{letter.reason}: {letter.detail.splitlines()[-1] if letter.detail else ''}"
        self.events.write("dead", task_id=prompt.task_id, prompt_id=prompt.prompt_id, reason=reason)
        if self._replaced >= REPLACEMENTS_PER_PLACE * self.recipe.train.prompts_per_step:
            return None
        self._replaced += 1
        return self._next_prompt()

    def _advance(self, batch: Batch) -> None:
        self.ledger = self.ledger.model_copy(
            update={
                "version": PolicyVersion(incarnation=self.version.incarnation, step=self.version.step + 1),
                "next_dispatch_index": self.progress.next_dispatch_index,
                "consumed": (*self.ledger.consumed, _indices(answer for answer, _ in batch.kept)),
                "filtered": (*self.ledger.filtered, *_indices(batch.dropped)),
                "dead": tuple(self.progress.dead),
            }
        )
        self._unacknowledged.extend(answer for answer, _ in batch.kept)
        self.progress.version = self.version

    def _publish(self) -> WeightManifest:
        return self.publisher.publish(self.learner.model, self.version)

    def _checkpoint(self) -> None:
        self.checkpoints.save(
            Checkpoint(ledger=self.ledger, model=self.learner.model_tensors(), optimizer=self.learner.optimizer_tensors())
        )

    def _report(
        self, metrics: dict[str, float], seconds: dict[str, float], window: tuple[float, float], answers: Sequence[Answer]
    ) -> None:
        self.progress.metrics = metrics
        for answer in answers:
            group = answer.scored.group
            self.progress.served[group.replica] = str(group.policy_version)
        self.events.write(
            "step", step=self.version.step, steps=self.recipe.train.steps, metrics=metrics, seconds=seconds, window=window
        )

    async def _evaluate(self) -> None:
        """Evaluate this step's policy, if the run's events don't have that yet."""
        if all(event["step"] != self.version.step for event in read_events(self.events.path, "evaluation")):
            answers = await self._ask_held_out("evaluation")
            self.samples.evaluation(self.version.step, [answer.scored for answer in answers])

    async def _ask_held_out(self, kind: EvaluationKind) -> list[Answer]:
        """Evaluate the policy; the event is of that kind, and the results of all samples are kept in a file of their own."""
        self.progress.state = "evaluating"

        def on_dead(reason: str) -> None:
            self.events.write("dead", reason=reason)

        began = time.time()
        results, answers = await evaluate(self.evaluation, self.prompts, self.data.held_out, self.version, on_dead)
        file, asked = results_name(kind, self.version.step), {name: len(samples) for name, samples in self.data.held_out.items()}
        write_results(self.evaluations / file, results)
        entry = {"step": self.version.step, **summarise_by_dataset(results), "asked": asked, "results": file}
        entry["seconds"] = time.time() - began
        self.events.write(kind, **entry)
        self.progress.evaluations.append(entry)
        return answers


def _indices(answers: Iterable[Answer]) -> tuple[int, ...]:
    return tuple(answer.scored.group.prompt.dispatch_index for answer in answers)


def _intervals(
    answers: Sequence[Answer], training: tuple[float, float], push: tuple[float, float]
) -> dict[str, list[tuple[float, float]]]:
    generation, reward, pulls = [], [], [push]
    for answer in answers:
        group, scored = answer.scored.group, answer.scored
        generation.append((group.started_at, group.started_at + group.generation_s))
        reward.append((scored.scoring_started_at, scored.scoring_started_at + scored.reward_s))
        pulls.append((group.started_at - group.pull_s, group.started_at))
    return {"training": [training], "weight_push": pulls, "generation": generation, "reward": reward}
