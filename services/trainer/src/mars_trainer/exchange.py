"""The trainer's end of the queue: asks prompts, receives scored groups, misses nothing.

What was asked and not yet answered is remembered here and not in Redis: whatever Redis loses
is noticed by comparing both and asked again; a late second answer is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex

from pydantic import ValidationError

from mars_shared.contracts import Prompt, Purpose, RolloutGroup, ScoredGroup
from mars_shared.errors import InputError, QueueUnavailableError
from mars_shared.faults import fault
from mars_shared.letters import FaultyRow
from mars_shared.logs import group_named_in, logged_group
from mars_shared.patience import patiently
from mars_shared.queue import Claim, DeadLetter, PutResult, Queue, Streams

logger = logging.getLogger(__name__)

CONSUMER = "trainer"
RECONCILE_S = 10.0
"""Between looks for what Redis lost; a broken connection is one too."""
LOOK_FOR_DEAD_S = 1.0
RECONNECT_S = 1.0


async def nothing() -> None:
    """What an exchange calls where nobody asked for more."""


def as_it_was(prompt: Prompt) -> Prompt:
    """How an exchange asks a lost prompt again where nobody asked for more."""
    return prompt


@dataclass(frozen=True)
class Answer:
    """A scored group and the entry that still holds it in the stream."""

    claim: Claim
    scored: ScoredGroup


@dataclass(frozen=True)
class Death:
    """A prompt that will never be answered, and why."""

    prompt: Prompt
    letter: DeadLetter


@dataclass(frozen=True)
class Retry:
    """A prompt that died before and that somebody wants to be asked again, and the entry that says so."""

    claim: Claim
    prompt: Prompt


@dataclass
class Exchange:
    """Asks for groups of one purpose on behalf of one incarnation of the trainer.

    Args:
        bound: limits the entries of the prompts stream.
        aside: called now and then while answers are awaited, for what else may stand in their way.
        relieve: called when Redis takes no more prompts though none is under way: what the
            trainer holds there fills it.
        renew: makes of a prompt that Redis lost the one that is asked instead.
    """

    queue: Queue
    run: str
    purpose: Purpose
    incarnation: int
    bound: int
    aside: Callable[[], Awaitable[None]] = nothing
    relieve: Callable[[], Awaitable[None]] = nothing
    renew: Callable[[Prompt], Prompt] = as_it_was
    _waiting: deque[Prompt] = field(default_factory=deque)
    _outstanding: dict[str, Prompt] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict)
    """Dedupe key by task id, of what is outstanding."""
    _asked: Counter[str] = field(default_factory=Counter)
    _nonce: str = field(default_factory=lambda: token_hex(4))
    """Keeps the keys of a run that was deleted and begun anew apart from those that Redis remembers."""
    _held: set[str] = field(default_factory=set)
    _retries: deque[Retry] = field(default_factory=deque)
    _last_dead: str = "0"
    _full: bool = False
    _next_dead_look: float = 0.0
    _next_reconcile: float = 0.0

    @property
    def streams(self) -> Streams:
        return Streams(self.run)

    @property
    def outstanding(self) -> int:
        """Prompts asked and not answered."""
        return len(self._waiting) + len(self._outstanding)

    async def start(
        self, dispatched: Sequence[Prompt] = (), *, usable: Callable[[RolloutGroup], bool] = lambda group: True
    ) -> list[Prompt]:
        """Begin where a predecessor ended: remove what it left in the streams, except groups that are still wanted.

        Args:
            dispatched: prompts that it had asked and that are still wanted.
            usable: whether a group made of one of them may be trained on.

        Returns:
            those of `dispatched` of which there is no group; ask them again.
        """
        return await patiently(lambda: self._take_over(dispatched, usable))

    def ask(self, prompts: Iterable[Prompt]) -> None:
        """Queue prompts to be put into Redis; `receive` does it."""
        self._waiting.extend(prompts)

    async def receive(self) -> tuple[list[Answer], list[Death]]:
        """Put what waits, then wait a moment for answers and deaths; empty lists while there are none."""
        answers: list[Answer] = []
        deaths: list[Death] = []
        try:
            await self._ask()
            await self._receive(answers, wait_s=0.2)
            now = time.monotonic()
            if now >= self._next_dead_look:
                deaths = await self._bury()
                self._next_dead_look = now + LOOK_FOR_DEAD_S
            if now >= self._next_reconcile:
                await self._take_up(answers)
                await self._find_lost()
                await self._look_for_retries()
                self._next_reconcile = now + RECONCILE_S
                await self.aside()
        except QueueUnavailableError as error:
            logger.warning("waiting for Redis: %s", error)
            await asyncio.sleep(RECONNECT_S)
            self._next_reconcile = 0.0
        return answers, deaths

    async def gather(
        self,
        prompts: Iterable[Prompt],
        *,
        on_death: Callable[[Death], None] = lambda death: None,
        on_progress: Callable[[int], None] = lambda answered: None,
    ) -> list[Answer]:
        """Ask all prompts and wait until each is answered or dead; answers in dispatch order.

        Args:
            on_progress: told now and then how many are answered.
        """
        self.ask(prompts)
        answers: list[Answer] = []
        while self.outstanding:
            arrived, deaths = await self.receive()
            answers += arrived
            for death in deaths:
                on_death(death)
            on_progress(len(answers))
        return sorted(answers, key=lambda answer: answer.scored.group.prompt.dispatch_index)

    async def report_dead(self, dispatch_index: int, error: InputError) -> None:
        """Note a sample among the dead letters that could not become a prompt."""
        item = FaultyRow(dispatch_index=dispatch_index, purpose=self.purpose.value).model_dump_json().encode()
        key, reason = f"{self.incarnation}/{dispatch_index}", type(error).__name__
        await patiently(lambda: self.queue.report_dead(self.run, item, key=key, reason=reason, detail=str(error)))

    def take_retry(self) -> Retry | None:
        """The next prompt that shall be asked again, if there is one."""
        return self._retries.popleft() if self._retries else None

    async def acknowledge(self, claims: Sequence[Claim]) -> None:
        """Remove entries from their streams for good."""
        await patiently(lambda: self.queue.acknowledge(claims))
        self._held.difference_update(claim.entry_id for claim in claims)

    async def _ask(self) -> None:
        while self._waiting:
            prompt = self._waiting[0]
            fault("trainer.before_ask")
            self._outstanding[prompt.task_id] = prompt
            if await self._put(prompt) is PutResult.FULL:
                del self._outstanding[prompt.task_id]
                self._say_full(len(self._waiting))
                if not self._outstanding:
                    await self.relieve()
                return
            self._full = False
            self._waiting.popleft()
            self._say_asked(prompt)
            fault("trainer.after_ask")

    def _say_asked(self, prompt: Prompt) -> None:
        said = {"prompt_id": prompt.prompt_id, "version": str(prompt.policy_version)}
        with logged_group(prompt.task_id):
            logger.info("asked for the group", extra=said)

    def _say_full(self, waiting: int) -> None:
        if not self._full:
            logger.warning(
                "Redis takes no more prompts at the moment, %d wait: it is at its maxmemory (raise it if this lasts), or full of "
                "groups that wait for a checkpoint",
                waiting,
            )
        self._full = True

    async def _put(self, prompt: Prompt) -> PutResult:
        key = self._keys[prompt.task_id] = f"{self.incarnation}/{prompt.task_id}/{self._nonce}-{self._asked[prompt.task_id]}"
        return await self.queue.put(
            self.streams.prompts,
            prompt.model_dump_json().encode(),
            dedupe_key=key,
            bound=self.bound,
            incarnation=self.incarnation,
        )

    async def _receive(self, answers: list[Answer], *, wait_s: float) -> None:
        claim = await self.queue.claim(self.streams.scored(self.purpose), CONSUMER, wait_s=wait_s)
        if claim is not None:
            await self._accept(claim, answers)

    async def _take_up(self, answers: list[Answer]) -> None:
        """Entries that Redis gave to this consumer while the connection broke, so that it never heard of them."""
        for claim in await self.queue.resume(self.streams.scored(self.purpose), CONSUMER, besides=self._held):
            await self._accept(claim, answers)

    async def _accept(self, claim: Claim, answers: list[Answer]) -> None:
        """Append the claim as an answer; drop a second one, or one to a prompt of another incarnation."""
        with logged_group(group_named_in(claim.payload)):
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
            self._forget(group.group_id)
            self._held.add(claim.entry_id)
            answers.append(Answer(claim, scored))
            logger.info("received the scored group", extra={"replica": group.replica})
        fault("trainer.after_take")

    def _forget(self, task_id: str) -> Prompt | None:
        self._keys.pop(task_id, None)
        self._asked.pop(task_id, None)
        return self._outstanding.pop(task_id, None)

    async def _bury(self) -> list[Death]:
        deaths = []
        task_by_key = {key: task_id for task_id, key in self._keys.items()}
        for letter in await self.queue.dead_after(self.run, self._last_dead):
            self._last_dead = letter.entry_id
            prompt = self._forget(task_by_key.get(letter.key, ""))
            if prompt is not None:
                with logged_group(prompt.task_id):
                    logger.error("prompt %s (%s) is dead: %s", prompt.task_id, prompt.prompt_id, letter.reason)
                deaths.append(Death(prompt, letter))
        return deaths

    async def _find_lost(self) -> None:
        """Let outstanding prompts that are in no stream wait to be asked again. Streams are read in the direction of the flow."""
        present: set[str] = set()
        for stream in (self.streams.prompts, self.streams.rollouts, self.streams.scored(self.purpose), self.streams.dead):
            present.update((await self.queue.outstanding(stream)).values())
        for task_id, prompt in list(self._outstanding.items()):
            if self._keys[task_id] not in present:
                with logged_group(task_id):
                    logger.warning("prompt %s is in no stream; it is asked again", task_id)
                self._asked[task_id] += 1
                del self._outstanding[task_id]
                self._waiting.append(self.renew(prompt))

    async def _look_for_retries(self) -> None:
        if self.purpose is not Purpose.TRAIN:
            return
        while claim := await self.queue.claim(self.streams.retries, CONSUMER, wait_s=0):
            self._retries.append(Retry(claim, Prompt.model_validate_json(claim.payload)))

    async def _take_over(self, dispatched: Sequence[Prompt], usable: Callable[[RolloutGroup], bool]) -> list[Prompt]:
        await self.queue.ping()
        self._outstanding.clear()
        self._keys.clear()
        newest = await self.queue.dead(self.run, limit=1)
        self._last_dead = newest[0].entry_id if newest else "0"
        if self.purpose is not Purpose.TRAIN:
            await self.queue.purge(self.streams.scored(self.purpose))
            return []
        await self.queue.purge(self.streams.prompts)
        held = await self.queue.resume(self.streams.retries, CONSUMER)
        self._retries = deque(Retry(claim, Prompt.model_validate_json(claim.payload)) for claim in held)
        wanted = {prompt.task_id: prompt for prompt in dispatched}
        for stream, group_in in ((self.streams.rollouts, _rollout), (self.streams.scored(self.purpose), _scored)):
            await self._keep_wanted(stream, group_in, wanted, usable)
        return [prompt for prompt in dispatched if prompt.task_id not in self._outstanding]

    async def _keep_wanted(
        self,
        stream: str,
        group_in: Callable[[bytes], RolloutGroup | None],
        wanted: Mapping[str, Prompt],
        usable: Callable[[RolloutGroup], bool],
    ) -> None:
        left = []
        for entry in await self.queue.entries(stream):
            group = group_in(entry.payload)
            if group is not None and wanted.get(group.group_id) == group.prompt and usable(group):
                self._outstanding[group.group_id], self._keys[group.group_id] = group.prompt, entry.key
            else:
                left.append(entry.entry_id)
        await self.queue.remove(stream, left)


def _rollout(payload: bytes) -> RolloutGroup | None:
    try:
        return RolloutGroup.model_validate_json(payload)
    except ValidationError:
        return None


def _scored(payload: bytes) -> RolloutGroup | None:
    try:
        return ScoredGroup.model_validate_json(payload).group
    except ValidationError:
        return None


def trainer_queue(url: str) -> Queue:
    """The trainer is the sole consumer of scored groups and holds them until its checkpoint: no lease ends."""
    return Queue(url, lease_s=math.inf)
