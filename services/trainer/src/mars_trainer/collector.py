"""Keeps groups under way and hands them to the loop a step at a time.

What may be asked, and which step trains on what, is the window's decision (window.py); asking and
receiving is the exchange's business (exchange.py). Here the one is done as the other decides.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mars_shared.contracts import PolicyVersion, Prompt, RolloutGroup
from mars_shared.errors import InputError
from mars_shared.queue import Claim
from mars_shared.settings import Recipe
from mars_shared.telemetry import EventLog
from mars_trainer.batch import Batch, Judged
from mars_trainer.checkpoint import Ledger
from mars_trainer.credit import credit
from mars_trainer.datasets import Sample
from mars_trainer.dispatch import PromptMaker, place_of
from mars_trainer.exchange import Answer, Death, Exchange, Retry
from mars_trainer.exposition import count_dead
from mars_trainer.window import Window

logger = logging.getLogger(__name__)


class Collector:
    """The groups of a run between dispatch and training.

    Args:
        ledger: where the run stands.
        dead: dispatch indices that died; this adds to it.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: Sequence[Sample],
        prompts: PromptMaker,
        exchange: Exchange,
        events: EventLog,
        ledger: Ledger,
        dead: list[int],
    ) -> None:
        train = recipe.train
        filters = train.dynamic_sampling != "none"
        self.samples = samples
        self.version = ledger.version
        """The policy that groups are asked of."""
        self._recipe = recipe
        self._prompts = prompts
        self._exchange = exchange
        self._events = events
        self._dead = dead
        self._retried = list(ledger.retried)
        """Dispatch indices of the dead whose prompts were asked again, as others."""
        self._arrived: list[Answer] = []
        """Since they were last taken."""
        self._retries: list[Claim] = []
        """Entries of retries that were looked at since the last step."""
        self._unusable: list[tuple[int, InputError]] = []
        self._dispatched = {prompt.dispatch_index: prompt for prompt in ledger.dispatched}
        """From dispatch until a step has trained on their groups or done without."""
        self._window: Window[Judged] = Window(
            batch=train.prompts_per_step,
            steps=train.steps,
            max_staleness=train.max_staleness,
            rounds=train.max_generation_batches if filters else 1,
            keep=lambda judged: judged.credit.signal or not filters,
            step=ledger.version.step,
            next_index=ledger.next_dispatch_index,
            dispatched=self._dispatched,
        )
        exchange.renew = self._renewed

    async def begin(self, restored_from: PolicyVersion | None) -> None:
        """Take up what a predecessor had asked: groups that are there are waited for, the rest is asked again.

        Args:
            restored_from: version of the checkpoint that the run goes on from, if it does.
        """
        lost = await self._exchange.start(
            tuple(self._dispatched.values()), usable=lambda group: is_of_lineage(group, restored_from)
        )
        self._exchange.ask([self._renewed(prompt) for prompt in lost])

    async def collect(self, on_disk: Callable[[Callable[[], object]], Awaitable[None]]) -> Batch:
        """Keep the window's places filled until a step's groups are there.

        Args:
            on_disk: does what writes to the disk, images of prompts here.

        Raises:
            InputError: every group of the step died, and those that were asked in their place.
        """
        settled = False
        while not settled:
            # Even where all is there already: the places that the step before gave free are replicas' work meanwhile.
            await on_disk(self._dispatch)
            await self._report_unusable()
            answers, deaths = await self._exchange.receive()
            self._arrived += answers
            for answer in answers:
                self._window.arrive(answer.scored.group.prompt.dispatch_index, self._judged(answer))
            for death in deaths:
                self._bury(death)
            settled = self._window.settle()
        kept, dropped = tuple(self._window.kept), tuple(self._window.dropped)
        if not (kept or dropped):
            raise InputError(
                f"step {self.version.step + 1}: every prompt died, {self._window.died} replacements too; see the events"
            )
        return Batch(wanted=self._window.batch, kept=kept, dropped=dropped)

    def take_arrived(self) -> list[Answer]:
        """What arrived since the last call, whichever step will train on it."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def advance(self, version: PolicyVersion) -> list[Claim]:
        """The step is in the weights of `version`; returns the entries of retries that are dealt with."""
        self.version = version
        self._window.advance()
        self._dispatched = {index: self._dispatched[index] for index in self._window.outstanding}
        retries, self._retries = self._retries, []
        return retries

    def ledger_fields(self) -> dict[str, Any]:
        """What a checkpoint must know of it: fields of Ledger."""
        return {
            "next_dispatch_index": self._window.next_index,
            "dead": tuple(self._dead),
            "retried": tuple(self._retried),
            "dispatched": tuple(self._dispatched.values()),
        }

    def _judged(self, answer: Answer) -> Judged:
        return Judged(answer, credit(answer.scored, self._recipe.train, self._recipe.rollout.max_completion_length))

    def _dispatch(self) -> None:
        """Ask for as many groups as there are places."""
        while self._window.may_dispatch:
            prompt = self._next_prompt()
            self._dispatched[self._window.dispatch()] = prompt
            self._exchange.ask([prompt])

    def _renewed(self, prompt: Prompt) -> Prompt:
        """A lost prompt, for the policy as it is: replicas make no group for an incarnation that has ended."""
        renewed = self._dispatched[prompt.dispatch_index] = prompt.model_copy(update={"policy_version": self.version})
        return renewed

    def _next_prompt(self) -> Prompt:
        """The prompt of the next dispatch index; a sample that cannot be opened is passed over, and said.

        Raises:
            InputError: not one sample of the training set can be opened.
        """
        if retry := self._next_retry():
            return self._prompts.again(retry.prompt, dispatch_index=self._window.next_index, version=self.version)
        rows = len(self.samples)
        for _ in range(rows):
            index = self._window.next_index
            place = place_of(index, rows=rows, seed=self._recipe.run.seed)
            try:
                sample = self.samples[place.row]
                return self._prompts.training(sample, epoch=place.epoch, dispatch_index=index, version=self.version)
            except InputError as error:
                self._window.skip()
                self._dead.append(index)
                self._unusable.append((index, error))
                count_dead(self._recipe.run.name)
                self._events.write("dead", reason=str(error))
        raise InputError(f"none of the {rows} training samples can be opened; see the events, or run `mars data check`")

    def _next_retry(self) -> Retry | None:
        """A prompt that died and was not asked again since: this lineage has no other group of it."""
        while retry := self._exchange.take_retry():
            index = retry.prompt.dispatch_index
            self._retries.append(retry.claim)
            if index in self._dead and index not in self._retried:
                self._retried.append(index)
                return retry
            logger.warning("prompt %s is not tried again: it is not dead, or was tried again before", retry.prompt.task_id)
        return None

    async def _report_unusable(self) -> None:
        """Samples that never became prompts stand among the dead letters too."""
        for index, error in self._unusable:
            await self._exchange.report_dead(index, error)
        self._unusable.clear()

    def _bury(self, death: Death) -> None:
        """Say that a prompt is dead and give its place back."""
        prompt, letter = death.prompt, death.letter
        self._window.bury(prompt.dispatch_index)
        self._dead.append(prompt.dispatch_index)
        count_dead(self._recipe.run.name)
        reason = f"{letter.reason}: {letter.detail.splitlines()[-1] if letter.detail else ''}"
        self._events.write("dead", task_id=prompt.task_id, prompt_id=prompt.prompt_id, reason=reason)


def is_of_lineage(group: RolloutGroup, restored_from: PolicyVersion | None) -> bool:
    """Whether only ancestors of the policy made a group: a dead incarnation may have gone further than its last checkpoint."""
    spans = [span.version for completion in group.completions for span in completion.spans]
    return restored_from is not None and max([group.policy_version, *spans]) <= restored_from
