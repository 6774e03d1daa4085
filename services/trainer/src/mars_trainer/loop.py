"""The training loop: ask for groups, learn from a batch of them, publish, checkpoint, repeat.

Reading order: `TrainingRun.run`, then `_step`; which groups may be asked for is the window's
business (window.py). With max_staleness = 0 every group is made by the very policy that it trains.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mars_shared.contracts import PolicyVersion, Prompt, RolloutGroup, WeightManifest
from mars_shared.errors import InputError
from mars_shared.faults import fault
from mars_shared.files import disk_is_full
from mars_shared.queue import Claim
from mars_shared.settings import Recipe
from mars_shared.telemetry import EventLog, read_events
from mars_trainer.batch import Batch, Judged
from mars_trainer.checkpoint import Checkpoint, CheckpointStore, Ledger
from mars_trainer.credit import credit
from mars_trainer.datasets import RunData
from mars_trainer.dispatch import PromptMaker, place_of
from mars_trainer.evaluate import EvaluationKind, evaluate, results_name, summarise_by_dataset, write_results
from mars_trainer.exchange import Answer, Death, Exchange, Retry
from mars_trainer.learner import Learner
from mars_trainer.metrics import finite, rollout_metrics, staleness_metrics
from mars_trainer.publish import Publisher
from mars_trainer.samples import SampleLog
from mars_trainer.selftest import SelfTest
from mars_trainer.timeline import stage_seconds
from mars_trainer.window import Window

logger = logging.getLogger(__name__)

DISK_PAUSE_S = 5.0
"""Between attempts to write to a disk that is full."""


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
    restored_from: PolicyVersion | None = None
    """The version of the checkpoint that the run goes on from."""
    _unacknowledged: list[Claim] = field(default_factory=list)
    """Entries of what is in the weights and in no checkpoint."""
    _retries: list[Claim] = field(default_factory=list)
    """Entries of retries that were looked at since the last step."""
    _retried: list[int] = field(default_factory=list)
    """Dispatch indices of the dead whose prompts were asked again, as others."""
    _unusable: list[tuple[int, InputError]] = field(default_factory=list)
    _dispatched: dict[int, Prompt] = field(default_factory=dict)
    """Prompts by dispatch index, from dispatch until a step has trained on their groups or done without."""
    window: Window[Judged] = field(init=False)

    def __post_init__(self) -> None:
        train, ledger = self.recipe.train, self.ledger
        self._retried = list(ledger.retried)
        self._dispatched = {prompt.dispatch_index: prompt for prompt in ledger.dispatched}
        self.window = Window(
            batch=train.prompts_per_step,
            steps=train.steps,
            max_staleness=train.max_staleness,
            rounds=train.max_generation_batches if self._filters else 1,
            keep=lambda judged: judged.credit.signal or not self._filters,
            step=ledger.version.step,
            next_index=ledger.next_dispatch_index,
            dispatched=self._dispatched,
        )
        self.training.renew = self._renewed
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
        self.progress.state = "finished"
        self.events.write("finished", step=self.version.step, weights=self.learner.weights_hash())

    async def _begin(self) -> None:
        """Publish, and take up what a predecessor had asked: groups that are there are waited for, the rest is asked again."""
        if self.restored_from is not None:
            self.events.write("resumed", step=self.version.step, incarnation=self.version.incarnation)
        lost = await self.training.start(self.ledger.dispatched, usable=self._is_of_this_lineage)
        await self.evaluation.start()
        await self._despite_full_disk(self._publish)
        self.training.ask([self._renewed(prompt) for prompt in lost])

    def _renewed(self, prompt: Prompt) -> Prompt:
        """A lost prompt, for the policy as it is: replicas make no group for an incarnation that has ended."""
        renewed = self._dispatched[prompt.dispatch_index] = prompt.model_copy(update={"policy_version": self.version})
        return renewed

    def _is_of_this_lineage(self, group: RolloutGroup) -> bool:
        """Whether the policy that made a group is an ancestor of this one: a dead incarnation may have gone further."""
        spans = [span.version for completion in group.completions for span in completion.spans]
        return self.restored_from is not None and max([group.policy_version, *spans]) <= self.restored_from

    async def evaluate_newest(self) -> None:
        """Evaluate the newest checkpoint's policy, or the base model where there is none; the run itself stays as it was."""
        await self.evaluation.start()
        await self._despite_full_disk(self._publish)
        self.progress.state = "published"
        await self._ask_held_out("evaluated")
        self.progress.state = "finished"

    @property
    def version(self) -> PolicyVersion:
        """The policy being trained and served."""
        return self.ledger.version

    @property
    def _filters(self) -> bool:
        return self.recipe.train.dynamic_sampling != "none"

    async def _step(self) -> None:
        began = time.time()
        self.progress.state = "collecting"
        batch = await self._collect()
        self.progress.state = "training"
        trained_from = time.time()
        fault("trainer.before_step")
        learned = await asyncio.to_thread(self._learn, batch)
        fault("trainer.after_step")
        trained_to = time.time()
        staleness = staleness_metrics([judged.answer.scored for judged in batch.kept], self.version.step)
        self._advance(batch)
        await self._despite_full_disk(self._publish)
        pushed = time.time()
        fault("trainer.after_publish")
        # Nothing of these groups is in the weights, so no checkpoint waits for them.
        await self.training.acknowledge([judged.answer.claim for judged in batch.dropped])
        self._say_what_is_missing(batch)
        metrics = finite(rollout_metrics(batch.scored, batch.credits) | batch.metrics | staleness | learned)
        window = (began, pushed)
        seconds = stage_seconds(window, _intervals(batch.answers, (trained_from, trained_to), (trained_to, pushed)))
        self._report(metrics, seconds, window, batch.answers)
        self.samples.step(self.version.step, batch.scored, [credit.advantages for credit in batch.credits])
        last = self.version.step == self.recipe.train.steps
        if last or self.version.step % self.recipe.train.checkpoint_every == 0:
            await self._commit()
        if not last and self.recipe.eval.every and self.version.step % self.recipe.eval.every == 0:
            await self._evaluate()

    async def _collect(self) -> Batch:
        """Keep the window's places filled until a step's groups are there.

        Raises:
            InputError: every group of the step died, and those that were asked in their place.
        """
        settled = False
        while not settled:
            # Even where all is there already: the places that the step before gave free are replicas' work meanwhile.
            await self._despite_full_disk(self._dispatch)
            await self._report_unusable()
            answers, deaths = await self.training.receive()
            for answer in answers:
                judged = Judged(answer, credit(answer.scored, self.recipe.train, self.recipe.rollout.max_completion_length))
                self.window.arrive(answer.scored.group.prompt.dispatch_index, judged)
            for death in deaths:
                self._bury(death)
            settled = self.window.settle()
        if not (self.window.kept or self.window.dropped):
            raise InputError(
                f"step {self.version.step + 1}: every prompt died, {self.window.died} replacements too; see the events"
            )
        return Batch(wanted=self.window.batch, kept=tuple(self.window.kept), dropped=tuple(self.window.dropped))

    def _dispatch(self) -> None:
        """Ask for as many groups as there are places."""
        while self.window.may_dispatch:
            prompt = self._next_prompt()
            self._dispatched[self.window.dispatch()] = prompt
            self.training.ask([prompt])

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

    def _next_prompt(self) -> Prompt:
        """The prompt of the next dispatch index; a sample that cannot be opened is passed over, and said.

        Raises:
            InputError: not one sample of the training set can be opened.
        """
        if retry := self._next_retry():
            return self.prompts.again(retry.prompt, dispatch_index=self.window.next_index, version=self.version)
        rows = len(self.data.train)
        for _ in range(rows):
            index = self.window.next_index
            place = place_of(index, rows=rows, seed=self.recipe.run.seed)
            try:
                sample = self.data.train[place.row]
                return self.prompts.training(sample, epoch=place.epoch, dispatch_index=index, version=self.version)
            except InputError as error:
                self.window.skip()
                self.progress.dead.append(index)
                self._unusable.append((index, error))
                self.events.write("dead", reason=str(error))
        raise InputError(f"none of the {rows} training samples can be opened; see the events, or run `mars data check`")

    def _next_retry(self) -> Retry | None:
        """A prompt that died and was not asked again since: this lineage has no other group of it."""
        while retry := self.training.take_retry():
            index = retry.prompt.dispatch_index
            self._retries.append(retry.claim)
            if index in self.progress.dead and index not in self._retried:
                self._retried.append(index)
                return retry
            logger.warning("prompt %s is not tried again: it is not dead, or was tried again before", retry.prompt.task_id)
        return None

    async def _report_unusable(self) -> None:
        """Samples that never became prompts stand among the dead letters too."""
        for index, error in self._unusable:
            await self.training.report_dead(index, error)
        self._unusable.clear()

    def _bury(self, death: Death) -> None:
        """Say that a prompt is dead and give its place back."""
        prompt, letter = death.prompt, death.letter
        self.window.bury(prompt.dispatch_index)
        self.progress.dead.append(prompt.dispatch_index)
        reason = f"{letter.reason}: {letter.detail.splitlines()[-1] if letter.detail else ''}"
        self.events.write("dead", task_id=prompt.task_id, prompt_id=prompt.prompt_id, reason=reason)

    def _advance(self, batch: Batch) -> None:
        """The step is in the weights: write down what it consumed and what is still dispatched."""
        self.window.advance()
        outstanding = self.window.outstanding
        self._dispatched = {index: self._dispatched[index] for index in outstanding}
        self.ledger = self.ledger.model_copy(
            update={
                "version": PolicyVersion(incarnation=self.version.incarnation, step=self.version.step + 1),
                "next_dispatch_index": self.window.next_index,
                "consumed": (*self.ledger.consumed, _indices(batch.kept)),
                "filtered": (*self.ledger.filtered, *_indices(batch.dropped)),
                "dead": tuple(self.progress.dead),
                "retried": tuple(self._retried),
                "dispatched": tuple(self._dispatched.values()),
            }
        )
        self._unacknowledged += [*(judged.answer.claim for judged in batch.kept), *self._retries]
        self._retries.clear()
        self.progress.version = self.version
        self.progress.next_dispatch_index = self.window.next_index

    async def _commit(self) -> None:
        """Make the run's state durable, then let Redis forget what is in it: never the other way round."""
        began = time.monotonic()
        claims = list(self._unacknowledged)
        await self._despite_full_disk(self._checkpoint)
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
        """Write the served snapshot again if a replica has found it damaged."""
        if self.publisher.is_damaged():
            logger.error("the snapshot of version %s is damaged on disk; it is written again", self.version)
            self.events.write("snapshot_mended", step=self.version.step)
            await self._despite_full_disk(self._publish)

    async def _despite_full_disk(self, write: Callable[[], object]) -> None:
        """Do it in a thread; while the disk is full, say so and try again: the run pauses and nothing is lost."""
        while True:
            try:
                await asyncio.to_thread(write)
            except OSError as error:
                if not disk_is_full(error):
                    raise
                self.progress.state = "waiting for disk space"
                logger.error("the disk is full (%s); free some space, the run goes on then", error)
                await asyncio.sleep(DISK_PAUSE_S)
            else:
                return

    def _publish(self) -> WeightManifest:
        return self.publisher.publish(self.learner.model, self.version)

    def _checkpoint(self) -> None:
        fault("trainer.before_checkpoint")
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
        await self._despite_full_disk(lambda: write_results(self.evaluations / file, results))
        entry = {"step": self.version.step, **summarise_by_dataset(results), "asked": asked, "results": file}
        entry["seconds"] = time.time() - began
        self.events.write(kind, **entry)
        self.progress.evaluations.append(entry)
        return answers


def _indices(groups: Iterable[Judged]) -> tuple[int, ...]:
    return tuple(judged.answer.scored.group.prompt.dispatch_index for judged in groups)


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
