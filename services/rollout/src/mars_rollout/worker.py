"""Claims prompts from the queue and sends whole groups on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from pydantic import ValidationError

from mars_rollout.group import GroupMaker
from mars_rollout.metrics import GROUPS, count_group
from mars_rollout.policy import Policy, SupersededError
from mars_shared.contracts import Prompt, RolloutGroup
from mars_shared.errors import InputError, LeaseLostError, MarsError
from mars_shared.http import explain_validation
from mars_shared.patience import patiently
from mars_shared.queue import Claim, Queue, Streams

logger = logging.getLogger(__name__)

MAX_ERRORS = 3
"""Reported errors after which a prompt is given up."""
MAX_DEATHS = 20
"""Attempts that ended without a word after which a prompt is given up; replicas die of other things too."""
LOOK_S = 0.5
"""Longest wait for a new entry, and so for noticing a stop."""


class RolloutWorker:
    """Makes up to `concurrency` groups at a time until told to stop.

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

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish what is in hand.

        Raises:
            ExceptionGroup: of the MarsError that makes this replica useless.
        """
        slots = asyncio.Semaphore(self._concurrency)
        held: list[Claim] | None = None
        async with asyncio.TaskGroup() as tasks:
            while await self._free_slot(slots, stop):
                if held is None:
                    held = await patiently(lambda: self._queue.resume(self._streams.prompts, self._consumer))
                claim = held.pop(0) if held else await patiently(self._next)
                if claim is None:
                    slots.release()
                else:
                    tasks.create_task(self._handle(claim, slots))

    async def _next(self) -> Claim | None:
        return await self._queue.claim(self._streams.prompts, self._consumer, wait_s=LOOK_S)

    @staticmethod
    async def _free_slot(slots: asyncio.Semaphore, stop: asyncio.Event) -> bool:
        """Wait for a free slot; False if the worker is to stop."""
        while not stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await slots.acquire()
                    return True
        return False

    async def _handle(self, claim: Claim, slots: asyncio.Semaphore) -> None:
        try:
            async with self._queue.keep(claim):
                await self._answer(claim)
        except LeaseLostError as error:
            logger.warning("%s", error)
            GROUPS.labels(purpose="unknown", outcome="lease_lost").inc()
        finally:
            slots.release()

    async def _answer(self, claim: Claim) -> None:
        """Make the entry's group and end the claim, one way or another."""
        prompt = await self._read(claim)
        if prompt is None:
            return
        try:
            group = await self._make(prompt)
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
            await patiently(lambda: self._queue.complete(claim, forward=self._streams.rollouts, payload=payload))
            count_group(group)

    async def _read(self, claim: Claim) -> Prompt | None:
        """The entry's prompt; None if the entry was given up."""
        try:
            prompt = Prompt.model_validate_json(claim.payload)
        except ValidationError as error:
            problems = explain_validation(error.errors(include_url=False)[:5])
            detail = f"entry of {len(claim.payload)} bytes is no Prompt: {problems}"
            await patiently(lambda: self._queue.dead_letter(claim, "unreadable", detail))
            GROUPS.labels(purpose="unknown", outcome="dead_letter").inc()
            return None
        if claim.deaths >= MAX_DEATHS:
            detail = f"{claim.deaths} attempts to make its group ended without a word"
            await self._end(prompt, "dead_letter", lambda: self._queue.dead_letter(claim, "replica died", detail))
            return None
        return prompt

    async def _make(self, prompt: Prompt) -> RolloutGroup:
        async with self._policy.hold(prompt) as pull_s:
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
