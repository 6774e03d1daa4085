"""The trainer's end of the queue: asks prompts, receives scored groups, misses nothing.

What was asked and not yet answered is remembered here and not in Redis: whatever Redis loses
is noticed by comparing both and asked again; a late second answer is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from secrets import token_hex

from pydantic import ValidationError

from mars_shared.contracts import Prompt, Purpose, ScoredGroup
from mars_shared.errors import QueueUnavailableError
from mars_shared.patience import patiently
from mars_shared.queue import Claim, DeadLetter, PutResult, Queue, Streams

logger = logging.getLogger(__name__)

CONSUMER = "trainer"
RECONCILE_S = 10.0
LOOK_FOR_DEAD_S = 1.0
RECONNECT_S = 1.0


@dataclass(frozen=True)
class Answer:
    """A scored group and the entry that still holds it in the stream."""

    claim: Claim
    scored: ScoredGroup


@dataclass
class Exchange:
    """Asks for groups of one purpose on behalf of one issuer, e.g. a trainer's incarnation.

    `bound` limits the entries of the prompts stream.
    """

    queue: Queue
    run: str
    purpose: Purpose
    issuer: str
    bound: int
    _outstanding: dict[str, Prompt] = field(default_factory=dict)
    _asked: dict[str, int] = field(default_factory=dict)
    _nonce: str = field(default_factory=lambda: token_hex(4))
    """Keeps the keys of a run that was deleted and begun anew apart from those that Redis remembers."""
    _held: set[str] = field(default_factory=set)
    _last_dead: str = "0"

    @property
    def streams(self) -> Streams:
        return Streams(self.run)

    @property
    def outstanding(self) -> int:
        """Prompts asked and not answered."""
        return len(self._outstanding)

    async def start(self) -> None:
        """Clear what a predecessor left of this purpose, and note the dead letters that are old."""
        await patiently(self._clear)

    async def gather(
        self, prompts: Iterable[Prompt], *, replace: Callable[[Prompt, DeadLetter], Prompt | None] = lambda prompt, letter: None
    ) -> list[Answer]:
        """Ask all prompts and wait until each is answered or dead; answers in dispatch order.

        `replace` gets each dead prompt and returns another to ask, or None to do with one fewer.
        """
        waiting = deque(prompts)
        answers: list[Answer] = []
        next_dead_look = next_reconcile = 0.0
        while waiting or self._outstanding:
            try:
                await self._ask(waiting)
                await self._receive(answers, wait_s=0.2)
                now = time.monotonic()
                if now >= next_dead_look:
                    waiting.extend(await self._bury(replace))
                    next_dead_look = now + LOOK_FOR_DEAD_S
                if now >= next_reconcile:
                    await self._take_up(answers)
                    await self._ask_lost_again()
                    next_reconcile = now + RECONCILE_S
            except QueueUnavailableError as error:
                logger.warning("waiting for Redis: %s", error)
                await asyncio.sleep(RECONNECT_S)
                next_reconcile = 0.0
        return sorted(answers, key=lambda answer: answer.scored.group.prompt.dispatch_index)

    async def acknowledge(self, answers: Iterable[Answer]) -> None:
        """Remove answered entries from the stream for good."""
        claims = [answer.claim for answer in answers]
        await patiently(lambda: self.queue.acknowledge(claims))
        self._held.difference_update(claim.entry_id for claim in claims)

    async def _ask(self, waiting: deque[Prompt]) -> None:
        while waiting:
            prompt = waiting[0]
            self._outstanding[prompt.task_id] = prompt
            if await self._put(prompt) is PutResult.FULL:
                del self._outstanding[prompt.task_id]
                return
            waiting.popleft()

    async def _put(self, prompt: Prompt) -> PutResult:
        return await self.queue.put(
            self.streams.prompts, prompt.model_dump_json().encode(), dedupe_key=self._key(prompt), bound=self.bound
        )

    def _key(self, prompt: Prompt) -> str:
        return f"{self.issuer}/{prompt.task_id}/{self._nonce}-{self._asked.get(prompt.task_id, 0)}"

    async def _receive(self, answers: list[Answer], *, wait_s: float) -> None:
        claim = await self.queue.claim(self.streams.scored(self.purpose), CONSUMER, wait_s=wait_s)
        if claim is not None:
            await self._accept(claim, answers)

    async def _take_up(self, answers: list[Answer]) -> None:
        """Entries that Redis gave to this consumer while the connection broke, so that it never heard of them."""
        for claim in await self.queue.resume(self.streams.scored(self.purpose), CONSUMER):
            if claim.entry_id not in self._held:
                await self._accept(claim, answers)

    async def _accept(self, claim: Claim, answers: list[Answer]) -> None:
        """Append the claim as an answer; drop a second one, or one to a prompt of another incarnation."""
        try:
            scored = ScoredGroup.model_validate_json(claim.payload)
        except ValidationError as error:
            await self.queue.dead_letter(claim, "not a scored group of schema 1", str(error))
            return
        group = scored.group
        if self._outstanding.get(group.group_id) != group.prompt:
            logger.info("dropped an answer to %s that nobody waits for", group.group_id)
            await self.queue.acknowledge([claim])
            return
        del self._outstanding[group.group_id]
        self._asked.pop(group.group_id, None)
        self._held.add(claim.entry_id)
        answers.append(Answer(claim, scored))

    async def _bury(self, replace: Callable[[Prompt, DeadLetter], Prompt | None]) -> list[Prompt]:
        replacements = []
        by_key = {self._key(prompt): prompt for prompt in self._outstanding.values()}
        for letter in await self.queue.dead_after(self.run, self._last_dead):
            self._last_dead = letter.entry_id
            prompt = by_key.get(letter.key)
            if prompt is not None and self._outstanding.pop(prompt.task_id, None) is not None:
                logger.error("prompt %s (%s) is dead: %s", prompt.task_id, prompt.prompt_id, letter.reason)
                replacement = replace(prompt, letter)
                replacements += [replacement] if replacement is not None else []
        return replacements

    async def _ask_lost_again(self) -> None:
        """Find outstanding prompts that are in no stream. Streams are read in the direction of the flow."""
        present: set[str] = set()
        for stream in (self.streams.prompts, self.streams.rollouts, self.streams.scored(self.purpose), self.streams.dead):
            present.update((await self.queue.outstanding(stream)).values())
        for task_id, prompt in list(self._outstanding.items()):
            if self._key(prompt) not in present:
                logger.warning("prompt %s is in no stream; it is asked again", task_id)
                self._asked[task_id] = self._asked.get(task_id, 0) + 1
                await self._put(prompt)

    async def _clear(self) -> None:
        streams = self.streams
        await self.queue.ping()
        await self.queue.purge(streams.scored(self.purpose))
        if self.purpose is Purpose.TRAIN:
            await self.queue.purge(streams.prompts)
            await self.queue.purge(streams.rollouts)
        newest = await self.queue.dead(self.run, limit=1)
        self._last_dead = newest[0].entry_id if newest else "0"


def trainer_queue(url: str) -> Queue:
    """The trainer is the sole consumer of scored groups and holds them until its checkpoint: no lease ends."""
    return Queue(url, lease_s=math.inf)
