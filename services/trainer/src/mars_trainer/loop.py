"""The training loop: ask for groups, learn from a batch of them, publish, checkpoint, repeat.

Reading order: `TrainingRun.run`, then `_step`; a step's groups come from collector.py. With max_staleness = 0 every group is made by the very policy that it trains.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mars_shared.contracts import PolicyVersion
from mars_shared.faults import fault
from mars_shared.queue import Claim
from mars_shared.settings import Recipe
from mars_shared.telemetry import EventLog, read_events
from mars_trainer.batch import Batch, Judged
from mars_trainer.checkpoint import Checkpoint, CheckpointStore, Ledger
from mars_trainer.collector import Collector
from mars_trainer.datasets import RunData
from mars_trainer.disk import despite_full_disk
from mars_trainer.dispatch import PromptMaker
from mars_trainer.evaluate import EvaluationKind, evaluate, progress_events, results_name, summarise_by_dataset, write_results
from mars_trainer.exchange import Answer, Exchange
from mars_trainer.exposition import begin_counting, count_step
from mars_trainer.group_log import GroupLog
from mars_trainer.learner import Learner
from mars_trainer.metrics import finite, rollout_metrics, staleness_metrics
from mars_trainer.origin import run_start
from mars_trainer.progress import Progress
from mars_trainer.publication import Publications
from mars_trainer.publish import Publisher
from mars_trainer.selftest import SelfTest
from mars_trainer.timeline import Efficiency, Interval, stage_seconds

logger = logging.getLogger(__name__)


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
    groups: GroupLog
    evaluations: Path
    """Folder of the results of every sample, one file an evaluation."""
    ledger: Ledger
    progress: Progress
    self_test: SelfTest | None = None
    restored_from: PolicyVersion | None = None
    """The version of the checkpoint that the run goes on from."""
    collector: Collector = field(init=False)
    publications: Publications = field(init=False)
    _unacknowledged: list[Claim] = field(default_factory=list)
    """Entries of what is in the weights and in no checkpoint."""
    _evaluated: set[int] = field(default_factory=set)
    """Steps whose policy the run's events have an evaluation of."""
    _efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        self.collector = Collector(
            self.recipe, self.data.train, self.prompts, self.training, self.events, self.ledger, self.progress.dead
        )
        self.publications = Publications(self.publisher, self._on_disk)
        self.learner.before_update = self.publications.until_encoded
        begin_counting(self.recipe.run.name)
        probing = [self.self_test.exchange] if self.self_test else []
        for exchange in (self.training, self.evaluation, *probing):
            exchange.aside, exchange.relieve = self._mend_snapshot, self._make_room

    async def run(self) -> None:
        """Train to the recipe's last step; evaluates at the start, at intervals and at the end."""
        await self._begin()
        self.progress.state = "published"
        if self.self_test:
            await self.self_test.run(self.version)
        if self.version.step == 0:
            await self._evaluate()
            await self._commit()
        while self.version.step < self.recipe.train.steps:
            await self._step()
        await self._evaluate()
        await self.publications.finished()
        self.progress.state = "finished"
        self.events.write("finished", step=self.version.step, weights=self.learner.weights_hash())

    async def _begin(self) -> None:
        """Publish, and take up what a predecessor had asked: groups that are there are waited for, the rest is asked again."""
        self._evaluated = await asyncio.to_thread(_evaluated_steps, self.events.path)
        start = run_start(self.recipe, incarnation=self.version.incarnation, model=self.ledger.model)
        self.events.write("started", **start.model_dump(mode="json"))
        if self.restored_from is not None:
            self.events.write("resumed", step=self.version.step, incarnation=self.version.incarnation)
        await self.collector.begin(self.restored_from)
        await self.evaluation.start()
        await self._publish()

    async def evaluate_newest(self) -> None:
        """Evaluate the newest checkpoint's policy, or the base model where there is none; the run itself stays as it was."""
        await self.evaluation.start()
        await self._publish()
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
        batch = await self.collector.collect(self._on_disk)
        self.progress.state = "training"
        trained_from = time.time()
        fault("trainer.before_step")
        learned = await asyncio.to_thread(self._learn, batch)
        fault("trainer.after_step")
        trained_to = time.time()
        staleness = staleness_metrics([judged.answer.scored for judged in batch.kept], self.version.step)
        self._advance(batch)
        push = await self._begin_publication()
        ended = time.time()
        fault("trainer.after_publish")
        # Nothing of these groups is in the weights, so no checkpoint waits for them.
        await self.training.acknowledge([judged.answer.claim for judged in batch.dropped])
        self._say_what_is_missing(batch)
        window, training = (began, ended), (trained_from, trained_to)
        arrived = self.collector.take_arrived()
        efficiency = {"efficiency": self._efficiency.share(window, {"trainer": [training], **_generation(arrived)})}
        metrics = finite(rollout_metrics(batch.scored, batch.credits) | batch.metrics | staleness | learned | efficiency)
        seconds = stage_seconds(window, _intervals(arrived, training, push))
        self.groups.step(self.version.step, batch)  # before the event, whose readers look for them
        self._report(metrics, seconds, window, batch)
        last = self.version.step == self.recipe.train.steps
        if last or self.version.step % self.recipe.train.checkpoint_every == 0:
            await self._commit()
        if not last and self.recipe.eval.every and self.version.step % self.recipe.eval.every == 0:
            await self._evaluate()

    def _learn(self, batch: Batch) -> dict[str, float]:
        if not batch.kept:
            self.learner.skip()
            return {}
        return self.learner.step([judged.answer.scored for judged in batch.kept], [judged.credit for judged in batch.kept])

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
            )

    def _advance(self, batch: Batch) -> None:
        """The step is in the weights: write down what it consumed and what is still dispatched."""
        version = PolicyVersion(incarnation=self.version.incarnation, step=self.version.step + 1)
        looked_at = self.collector.advance(version)
        self.ledger = self.ledger.model_copy(
            update={
                "version": version,
                "consumed": (*self.ledger.consumed, _indices(batch.kept)),
                "filtered": (*self.ledger.filtered, *_indices(batch.dropped)),
                **self.collector.ledger_fields(),
            }
        )
        self._unacknowledged += [*(judged.answer.claim for judged in batch.kept), *looked_at]
        self.progress.version = self.version
        self.progress.next_dispatch_index = self.ledger.next_dispatch_index

    async def _commit(self) -> None:
        """Make the run's state durable, then let Redis forget what is in it: never the other way round."""
        began = time.monotonic()
        claims = list(self._unacknowledged)
        await self._on_disk(self._checkpoint)
        fault("trainer.after_checkpoint")
        await self.training.acknowledge(claims)
        del self._unacknowledged[: len(claims)]
        fault("trainer.after_acknowledge")
        self.events.write("checkpoint", step=self.version.step, seconds=time.monotonic() - began)

    async def _make_room(self) -> None:
        """Redis is full and nothing is under way: what is trained on leaves it before its time."""
        if self._unacknowledged:
            logger.warning("Redis takes no more prompts; a checkpoint lets it forget %d groups", len(self._unacknowledged))
            await self._commit()

    async def _mend_snapshot(self) -> None:
        """Write a snapshot of the announced version if a replica cannot reach it."""
        if await self.publications.mend():
            logger.error("a replica could not reach version %s; a snapshot of it was written", self.version)
            self.events.write("snapshot_mended", step=self.version.step)

    async def _on_disk(self, write: Callable[[], object]) -> None:
        """Do it in a thread; a disk that is full pauses the run, and `progress` says so."""
        state = self.progress.state

        def say_full() -> None:
            self.progress.state = "waiting for disk space"

        await despite_full_disk(write, say_full)
        self.progress.state = state

    async def _publish(self) -> None:
        """Publish this version and wait until it is announced."""
        await self.publications.begin(self.learner.model, self.version)
        await self.publications.finished()

    async def _begin_publication(self) -> tuple[float, float] | None:
        """Publish this version, beside what comes next where replicas need not wait for it; returns when one was published.

        The publication before has ended by then, and it is that one's interval if this one goes on.
        """
        before = await self.publications.finished()
        await self.publications.begin(self.learner.model, self.version)
        return before if self.recipe.train.max_staleness else await self.publications.finished()

    def _checkpoint(self) -> None:
        fault("trainer.before_checkpoint")
        self.checkpoints.save(
            Checkpoint(ledger=self.ledger, model=self.learner.model_tensors(), optimizer=self.learner.optimizer_tensors())
        )

    def _report(self, metrics: dict[str, float], seconds: dict[str, float], window: Interval, batch: Batch) -> None:
        self.progress.metrics, self.progress.last_step_at = metrics, window[1]
        count_step(self.recipe.run.name, self.version.step - 1, batch, seconds, metrics.get("tokens", 0.0))
        for answer in batch.answers:
            group = answer.scored.group
            self.progress.served[group.replica] = str(group.policy_version)
        self.events.write(
            "step", step=self.version.step, steps=self.recipe.train.steps, metrics=metrics, seconds=seconds, window=window
        )

    async def _evaluate(self) -> None:
        """Evaluate this step's policy, if the run's events don't have that yet."""
        if self.version.step not in self._evaluated:
            await self._ask_held_out("evaluation")
            self._evaluated.add(self.version.step)

    async def _ask_held_out(self, kind: EvaluationKind) -> None:
        """Evaluate the policy; the event is of that kind, and the results of all samples are kept in a file of their own."""
        self.progress.state = "evaluating"

        def on_dead(reason: str) -> None:
            self.events.write("dead", reason=reason)

        began = time.time()
        asked = {name: len(samples) for name, samples in self.data.held_out.items()}
        on_progress = progress_events(self.events, self.version.step, sum(asked.values()))
        results, answers = await evaluate(self.evaluation, self.prompts, self.data.held_out, self.version, on_dead, on_progress)
        file = results_name(kind, self.version.step)
        await self._on_disk(lambda: write_results(self.evaluations / file, results))
        entry = {"step": self.version.step, **summarise_by_dataset(results), "asked": asked, "results": file}
        entry["seconds"] = time.time() - began
        if kind == "evaluation":
            self.groups.evaluation(self.version.step, [answer.scored for answer in answers])
        self.events.write(kind, **entry)
        self.progress.evaluations.append(entry)


def _evaluated_steps(events: Path) -> set[int]:
    return {event["step"] for event in read_events(events, "evaluation")}


def _indices(groups: Iterable[Judged]) -> tuple[int, ...]:
    return tuple(judged.answer.scored.group.prompt.dispatch_index for judged in groups)


def _generation(answers: Sequence[Answer]) -> dict[str, list[Interval]]:
    """When groups were made, by replica."""
    found: dict[str, list[Interval]] = {}
    for answer in answers:
        group = answer.scored.group
        found.setdefault(group.replica, []).append((group.started_at, group.started_at + group.generation_s))
    return found


def _intervals(answers: Sequence[Answer], training: Interval, push: Interval | None) -> dict[str, list[Interval]]:
    generation = [interval for intervals in _generation(answers).values() for interval in intervals]
    reward, pulls = [], [push] if push else []
    for answer in answers:
        group, scored = answer.scored.group, answer.scored
        reward.append((scored.scoring_started_at, scored.scoring_started_at + scored.reward_s))
        pulls.append((group.started_at - group.pull_s, group.started_at))
    return {"training": [training], "weight_push": pulls, "generation": generation, "reward": reward}
