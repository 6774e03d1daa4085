"""Claims prompts from the queue and sends whole groups on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from pydantic import ValidationError

from mars_rollout.admission import SupersededError
from mars_rollout.group import GroupMaker
from mars_rollout.metrics import GROUPS, UNREAD, count_group
from mars_rollout.policy import Policy
from mars_shared.contracts import Prompt, RolloutGroup
from mars_shared.errors import InputError, LeaseLostError, MarsError
from mars_shared.faults import fault
from mars_shared.http import explain_validation
from mars_shared.logs import group_named_in, logged_group
from mars_shared.patience import patiently
from mars_shared.queue import Claim, Queue, Streams

logger = logging.getLogger(__name__)

MAX_ERRORS = 3
"""Reported errors after which a prompt is given up."""
SUSPECT_DEATHS = 2
"""Attempts that ended without a word after which a prompt is made alone, so that a further death tells something."""
MAX_LONE_DEATHS = 3
"""Such attempts, with nothing else in the replica's hands, after which a prompt is given up."""
MAX_DEATHS = 20
"""Attempts that ended without a word, in whatever company, after which a prompt is given up; replicas die of other things too."""
LOOK_S = 0.5
"""Longest wait for a new entry, and so for noticing a stop."""
HAND_BACK_S = 2.0
"""How long handing one prompt back may take; then its lease lapses."""


class RolloutWorker:
    """Makes up to `concurrency` groups at a time until told to stop.

    A prompt whose attempts ended without a word twice is suspicious: it is made alone, since of several
    in the hands of a replica that died nobody knows which one it died of.

    Args:
        consumer: names this replica; the same after a restart, so that it takes up at once what it held.
        healthy: whether the replica can still make groups; when it cannot, its errors end the
            worker and don't count against the prompts in its hands.
    """

    def __init__(
        self,
        queue: Queue,
        streams: Streams,
        maker: GroupMaker,
        policy: Policy,
        *,
        consumer: str,
        concurrency: int,
        healthy: Callable[[], bool],
    ) -> None:
        self._queue = queue
        self._streams = streams
        self._maker = maker
        self._policy = policy
        self._consumer = consumer
        self._concurrency = concurrency
        self._healthy = healthy
        self._waiting: list[Claim] = []
        """Claimed and not begun: what a predecessor of this name held."""
        self._in_hand: set[asyncio.Task[None]] = set()

    @property
    def in_hand(self) -> int:
        """Groups that it works on."""
        return len(self._in_hand)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish what is in hand; cancelled, hand back what is not finished.

        Raises:
            ExceptionGroup: of the MarsError that makes this replica useless.
        """
        async with asyncio.TaskGroup() as tasks:
            try:
                self._waiting = await patiently(lambda: self._queue.resume(self._streams.prompts, self._consumer))
                while await self._free_slot(stop):
                    claim = self._waiting.pop(0) if self._waiting else await patiently(self._next)
                    if claim is not None:
                        await self._begin(claim, tasks)
            finally:
                await self._hand_back_waiting()

    async def _next(self) -> Claim | None:
        return await self._queue.claim(self._streams.prompts, self._consumer, wait_s=LOOK_S)

    async def _free_slot(self, stop: asyncio.Event) -> bool:
        """Wait until fewer than `concurrency` groups are in hand; False if the worker is to stop."""
        while not stop.is_set():
            if len(self._in_hand) < self._concurrency:
                return True
            await asyncio.wait(self._in_hand, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        return False

    async def _begin(self, claim: Claim, tasks: asyncio.TaskGroup) -> None:
        """Make the group beside others; a suspicious one alone: when this returns, it is done."""
        if claim.deaths >= SUSPECT_DEATHS:
            await self._hand_back_waiting()
            await self._handle(claim, alone=True)
        else:
            task = tasks.create_task(self._handle(claim))
            self._in_hand.add(task)
            task.add_done_callback(self._in_hand.discard)

    async def _handle(self, claim: Claim, *, alone: bool = False) -> None:
        """Make the entry's group, `alone` once nothing else is in hand, and end or lose the claim."""
        with logged_group(group_named_in(claim.payload)):
            await self._handle_group(claim, alone=alone)

    async def _handle_group(self, claim: Claim, *, alone: bool) -> None:
        try:
            async with self._queue.keep(claim):
                if alone and self._in_hand:
                    await asyncio.wait(self._in_hand)
                await self._answer(claim, alone=alone)
        except LeaseLostError as error:
            logger.warning("%s", error)
            GROUPS.labels(purpose=UNREAD, outcome="lease_lost").inc()
        except asyncio.CancelledError:
            # Of an engine that died the prompts in hand may be the cause: their leases lapse, which counts.
            if self._healthy():
                await self._hand_back(claim)
            raise

    async def _hand_back_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        await asyncio.gather(*(self._hand_back(claim) for claim in waiting))

    async def _hand_back(self, claim: Claim) -> None:
        with logged_group(group_named_in(claim.payload)):
            try:
                async with asyncio.timeout(HAND_BACK_S):
                    await patiently(lambda: self._queue.hand_back(claim))
            except TimeoutError:
                logger.warning("%s is not handed back, since Redis does not answer; its lease lapses", claim)
            except LeaseLostError as error:
                logger.warning("%s", error)
            else:
                GROUPS.labels(purpose=UNREAD, outcome="handed_back").inc()

    async def _answer(self, claim: Claim, *, alone: bool) -> None:
        """Make the entry's group and end the claim, one way or another."""
        fault("rollout.after_claim")
        prompt = await self._read(claim)
        if prompt is None:
            return
        logger.info("took the prompt up", extra={"attempt": claim.attempt, "prompt_id": prompt.prompt_id})
        try:
            group = await self._make(prompt, alone=claim if alone else None)
        except SupersededError as error:
            logger.info("dropped: %s", error)
            await self._end(prompt, "superseded", lambda: self._queue.complete(claim))
        except InputError as error:
            reason, detail = type(error).__name__, str(error)
            await self._end(prompt, "dead_letter", lambda: self._queue.dead_letter(claim, reason, detail))
        except MarsError as error:
            if not self._healthy():
                raise
            await self._give_back(claim, prompt, error)
        except Exception as error:  # whatever one prompt brings up, the other groups go on
            if not self._healthy():
                raise
            logger.exception("prompt %s failed unexpectedly", prompt.task_id)
            await self._give_back(claim, prompt, error)
        else:
            payload = group.model_dump_json().encode()
            fault("rollout.before_complete")
            await patiently(lambda: self._queue.complete(claim, forward=self._streams.rollouts, payload=payload))
            fault("rollout.after_complete")
            log_made(group)
            count_group(group)

    async def _read(self, claim: Claim) -> Prompt | None:
        """The entry's prompt; None if the entry was given up."""
        try:
            prompt = Prompt.model_validate_json(claim.payload)
        except ValidationError as error:
            problems = explain_validation(error.errors(include_url=False)[:5])
            detail = f"entry of {len(claim.payload)} bytes is no Prompt: {problems}"
            await patiently(lambda: self._queue.dead_letter(claim, "unreadable", detail))
            GROUPS.labels(purpose=UNREAD, outcome="dead_letter").inc()
            return None
        if claim.lone_deaths >= MAX_LONE_DEATHS or claim.deaths >= MAX_DEATHS:
            detail = (
                f"{claim.deaths} attempts to make its group ended without a word, "
                f"{claim.lone_deaths} of them with no other group in the replica's hands"
            )
            await self._end(prompt, "dead_letter", lambda: self._queue.dead_letter(claim, "replica died", detail))
            return None
        return prompt

    async def _make(self, prompt: Prompt, *, alone: Claim | None) -> RolloutGroup:
        """The prompt's group; `alone` is the claim whose lone attempt this is."""
        async with self._policy.hold(prompt) as pull_s:
            if alone is not None:
                await patiently(lambda: self._queue.begin_alone(alone))
            return await self._maker.make(prompt, pull_s=pull_s)

    async def _give_back(self, claim: Claim, prompt: Prompt, error: Exception) -> None:
        reason, detail = type(error).__name__, str(error)
        if claim.errors + 1 >= MAX_ERRORS:
            await self._end(prompt, "dead_letter", lambda: self._queue.dead_letter(claim, reason, detail))
        else:
            await self._end(prompt, "retry", lambda: self._queue.retry(claim, f"{reason}: {detail}"))

    async def _end(self, prompt: Prompt, outcome: str, how: Callable[[], Awaitable[object]]) -> None:
        await patiently(how)
        GROUPS.labels(purpose=prompt.purpose.value, outcome=outcome).inc()


def log_made(group: RolloutGroup) -> None:
    """Say that a group was made, by which policy, and what it took."""
    tokens = sum(len(completion.token_ids) for completion in group.completions)
    said = {"version": str(group.policy_version), "seconds": round(group.generation_s, 3), "tokens": tokens}
    logger.info("made the group", extra=said)
