"""The queue worker: takes a whole group, scores every completion, sends the group on."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from statistics import fmean

from pydantic import ValidationError

from mars_reward.metrics import GROUPS, ITEMS, SECONDS
from mars_reward.registry import check_recipe, score
from mars_reward.rewards.released_eval import released_eval
from mars_shared.contracts import Completion, Purpose, RolloutGroup, Score, ScoredGroup, ScoreItem
from mars_shared.errors import InputError, LeaseLostError, QueueError, RewardCpuTimeoutError, RewardError
from mars_shared.faults import fault
from mars_shared.http import explain_validation
from mars_shared.logs import group_named_in, logged_group
from mars_shared.patience import FIRST_PAUSE_S, longer
from mars_shared.queue import Claim, Queue, Streams

logger = logging.getLogger(__name__)

MAX_ERRORS = 3
"""Errors after which a group is given up."""
MAX_ERRORS_CPU = 2
"""The same if the last one was too much CPU time. CPU seconds hardly depend on how busy the machine is, so that another try
will mostly end alike; one is for a process with work of its own to do, such as a first use. Wall time depends on all."""
RETRY_PAUSES_S = (1.0, 10.0)
"""Pauses before an error is tried again: what a custom reward asks over a network may come back."""
MAX_DEATHS = 10
"""Attempts that ended without a word (a killed worker, a lost lease) after which a group is given up."""
EVALUATION_RECIPE = "paper"
"""Evaluations average plain IoU and accuracy, whatever reward a run trains with."""
FINISH_S = 10.0
"""How long the group in hand may take to finish after a stop; then it is handed back."""
HAND_BACK_S = 2.0
"""How long handing one group back may take; then its lease lapses."""
LOOK_S = 0.5
"""Longest wait for a new entry, and so for noticing a stop."""


def score_group(group: RolloutGroup, recipe: str) -> ScoredGroup:
    """Score every completion, each with the box frame of the view it saw.

    Evaluation groups are scored by EVALUATION_RECIPE, and as the released evaluation script does, beside it.

    Raises:
        ConfigError: unknown recipe.
        InputError: no ground truth, or a completion that cannot be scored; the message names it.
        RewardError: a completion whose reward fails; the message names it.
    """
    started_at, start_s = time.time(), time.perf_counter()
    truth, evaluates = group.prompt.truth, group.prompt.purpose is Purpose.EVAL
    recipe = EVALUATION_RECIPE if evaluates else recipe
    if truth is None:
        raise InputError(f"group {group.group_id}: prompt {group.prompt.prompt_id!r} has no truth; expected boxes or a text")
    scores = tuple(_score(completion, group, recipe) for completion in group.completions)
    released = tuple(released_eval(completion.text, truth) for completion in group.completions) if evaluates else None
    reward_s = time.perf_counter() - start_s
    return ScoredGroup(
        group=group, scores=scores, released=released, recipe=recipe, scoring_started_at=started_at, reward_s=reward_s
    )


def _score(completion: Completion, group: RolloutGroup, recipe: str) -> Score:
    assert group.prompt.truth is not None
    item = ScoreItem(
        completion=completion.text,
        truth=group.prompt.truth,
        frame=group.view_of(completion.source).frame,
        question=group.prompt.question,
    )
    return score(item, recipe, what=name_of(completion))


def name_of(completion: Completion) -> str:
    """E.g. "group t1, mono completion 0 of source 'infrared'"."""
    source = "" if completion.source is None else f" of source {completion.source!r}"
    return f"group {completion.group_id}, {completion.kind} completion {completion.index}{source}"


def read_group(payload: bytes) -> RolloutGroup:
    """A stream entry's group.

    Raises:
        InputError: the entry is no RolloutGroup.
    """
    try:
        return RolloutGroup.model_validate_json(payload)
    except ValidationError as error:
        problems = explain_validation(error.errors(include_url=False)[:5])
        raise InputError(f"entry of {len(payload)} bytes is no RolloutGroup: {problems}") from error


class RewardWorker:
    """Scores groups one at a time until told to stop; Redis may come and go meanwhile.

    A group whose reward failed waits aside before it is handed back; the groups behind it don't.

    Args:
        consumer: names this worker; unique among those alive and the same after a restart, so
            that a restarted worker takes up at once what it held.
        finish_s: how long the group in hand may take to finish after a stop.

    Raises:
        ConfigError: unknown recipe.
    """

    def __init__(self, queue: Queue, streams: Streams, consumer: str, *, recipe: str, finish_s: float = FINISH_S) -> None:
        self._queue = queue
        self._streams = streams
        self._consumer = consumer
        self._recipe = check_recipe(recipe)
        self._finish_s = finish_s
        self._held: list[Claim] | None = None
        """What a predecessor of this name held; None: to be asked."""
        self.in_hand = 0
        """Groups that it scores."""
        self.problem: str | None = None
        """Why no work can be taken at the moment; None when it can."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; the group in hand is finished first, or handed back after `finish_s`.

        At the start, and whenever Redis comes back, entries still held under this name come first.
        """
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(self._work(stop))
            await stop.wait()
            await asyncio.wait({working}, timeout=self._finish_s)
            working.cancel()
        await asyncio.gather(*(self._hand_back(claim) for claim in self._held or ()))

    async def _work(self, stop: asyncio.Event) -> None:
        pause_s = FIRST_PAUSE_S
        ended = asyncio.Event()  # not `stop`: what is handed back before the last claim may be in it, without its pause
        async with asyncio.TaskGroup() as waiting:
            while not stop.is_set():
                try:
                    if self._held is None:
                        self._held = await self._queue.resume(self._streams.rollouts, self._consumer)
                    claim = self._held.pop(0) if self._held else await self._next()
                    problem = await self._handle(claim) if claim is not None else None
                    if claim is not None and problem is not None:
                        waiting.create_task(self._retry_later(claim, problem, ended))
                    self.problem, pause_s = None, FIRST_PAUSE_S
                except QueueError as error:
                    self.problem, self._held = str(error), None
                    logger.warning("waiting %.1f s: %s", pause_s, error)
                    await _wait(stop, pause_s)
                    pause_s = longer(pause_s)
            ended.set()

    async def _next(self) -> Claim | None:
        return await self._queue.claim(self._streams.rollouts, self._consumer, wait_s=LOOK_S)

    async def _handle(self, claim: Claim) -> str | None:
        """Score the entry and end the claim; returns what went wrong if the claim is to be handed back instead."""
        self.in_hand = 1
        with logged_group(group_named_in(claim.payload)):
            try:
                async with self._queue.keep(claim):
                    return await self._score(claim)
            except LeaseLostError as error:
                _lost(error)
                return None
            except asyncio.CancelledError:
                await self._hand_back(claim)
                raise
            finally:
                self.in_hand = 0

    async def _hand_back(self, claim: Claim) -> None:
        with logged_group(group_named_in(claim.payload)):
            try:
                async with asyncio.timeout(HAND_BACK_S):
                    await self._queue.hand_back(claim)
            except (QueueError, TimeoutError) as error:
                logger.warning("%s is not handed back, so its lease lapses: %s", claim, error)
            else:
                GROUPS.labels(outcome="handed_back").inc()

    async def _score(self, claim: Claim) -> str | None:
        fault("reward.after_claim")
        if claim.deaths >= MAX_DEATHS:
            await self._give_up(claim, "worker died", f"{claim.deaths} attempts to score it ended without a word")
            return None
        try:
            scored, payload = await asyncio.to_thread(self._judge, claim.payload)
        except InputError as error:
            await self._give_up(claim, "bad input", str(error))
            return None
        except Exception as error:  # noqa: BLE001  The worker's edge: one group's surprise must not end the others' work.
            reason, detail = _explain(error)
            if claim.errors + 1 < _errors_allowed(error):
                return detail
            await self._give_up(claim, reason, detail)
            return None
        fault("reward.before_complete")
        await self._queue.complete(claim, forward=self._streams.scored(scored.group.prompt.purpose), payload=payload)
        fault("reward.after_complete")
        GROUPS.labels(outcome="scored").inc()
        _log_scored(scored)
        _count(scored)
        return None

    def _judge(self, payload: bytes) -> tuple[ScoredGroup, bytes]:
        scored = score_group(read_group(payload), self._recipe)
        return scored, scored.model_dump_json().encode()

    async def _give_up(self, claim: Claim, reason: str, detail: str) -> None:
        await self._queue.dead_letter(claim, reason, detail)
        GROUPS.labels(outcome="dead_letter").inc()

    async def _retry_later(self, claim: Claim, problem: str, ended: asyncio.Event) -> None:
        """Keep the lease for a pause, which the worker's end cuts short, then report the error."""
        with logged_group(group_named_in(claim.payload)):
            try:
                async with self._queue.keep(claim):
                    await _wait(ended, RETRY_PAUSES_S[claim.errors])
                    await self._queue.retry(claim, problem)
                GROUPS.labels(outcome="retry").inc()
            except LeaseLostError as error:
                _lost(error)
            except asyncio.CancelledError:
                await self._hand_back(claim)
                raise
            except QueueError as error:
                logger.warning("%s is not handed back and will be taken up when its lease ends: %s", claim, error)


def _explain(error: Exception) -> tuple[str, str]:
    """Reason and detail for a dead letter."""
    if isinstance(error, RewardError):
        return error.reason, error.detail
    return RewardError.reason, "".join(traceback.format_exception(error))


def _errors_allowed(error: Exception) -> int:
    return MAX_ERRORS_CPU if isinstance(error, RewardCpuTimeoutError) else MAX_ERRORS


def _lost(error: LeaseLostError) -> None:
    logger.warning("%s", error)
    GROUPS.labels(outcome="lease_lost").inc()


def _log_scored(scored: ScoredGroup) -> None:
    rewards = [score.reward for score in scored.scores]
    said = {"seconds": round(scored.reward_s, 4), "completions": len(rewards), "mean_reward": round(fmean(rewards), 4)}
    logger.info("scored the group", extra={**said, "replica": scored.group.replica})


def _count(scored: ScoredGroup) -> None:
    SECONDS.labels(via="queue").observe(scored.reward_s)
    if scored.group.prompt.truth is not None:
        ITEMS.labels(via="queue", truth=scored.group.prompt.truth.kind).inc(len(scored.scores))


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
