"""The queue: typed streams of work over Redis Streams, with leases.

Work moves prompts -> rollouts -> scored, one atomic step at a time. An entry stays in its stream,
and is counted by `depth`, until it is completed, acknowledged or dead-lettered. A consumer that
claims an entry holds a lease on it and keeps it by heartbeats; when the heartbeats end, another
consumer's `claim` takes the entry over as its next attempt, and whatever the first one still says
about it is refused with `LeaseLostError`. Redis's clock alone measures idleness.

    async with queue.keep(claim):
        result = await work(claim.payload)
    await queue.complete(claim, forward=streams.rollouts, payload=result)

Redis may be flushed or restarted at any time: streams and groups are created as they are needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from redis import exceptions

from mars_shared import lua
from mars_shared.errors import ConfigError, FencedError, InputError, LeaseLostError, QueueError, QueueUnavailableError
from mars_shared.redis_client import address_of, connect, redis_errors

logger = logging.getLogger(__name__)

POLL_S = 0.02
"""Pause between looks at an empty stream: a Lua script can't block."""
DEDUPE_S = 7 * 24 * 3600
"""How long a put is remembered."""
LONGEST_LEASE_S = 1e9
"""Longer leases, math.inf too, are cut to this: no entry but a returned one is ever idle that long."""


@dataclass(frozen=True)
class Streams:
    """Names of a run's streams, e.g. Streams("demo").prompts == "mars:demo:prompts"."""

    run: str

    @property
    def prompts(self) -> str:
        return f"mars:{self.run}:prompts"

    @property
    def rollouts(self) -> str:
        return f"mars:{self.run}:rollouts"

    def scored(self, purpose: str) -> str:
        """One stream a purpose, e.g. "mars:demo:scored:train"."""
        return f"mars:{self.run}:scored:{purpose}"

    @property
    def dead(self) -> str:
        return f"mars:{self.run}:dead"

    @property
    def retries(self) -> str:
        """Training prompts that died and shall be asked again."""
        return f"mars:{self.run}:retries"

    @property
    def incarnation(self) -> str:
        """The key, no stream, that records the newest incarnation of the run's trainer."""
        return f"mars:{self.run}:incarnation"

    @classmethod
    def of(cls, stream: str) -> Streams:
        """The run's streams, given any one of them."""
        prefix, _, rest = stream.partition(":")
        run, _, name = rest.partition(":")
        if prefix != "mars" or not run or not name:
            raise QueueError(f"stream {stream!r}: expected a name of the form mars:<run>:<name>")
        return cls(run)


@dataclass(frozen=True)
class Claim:
    """An entry this consumer holds. `attempt` counts deliveries from 1 and fences the claim.

    `errors` counts what consumers reported through `retry`, `handed_back` what they gave back
    unfinished; `deaths` are the earlier attempts that ended without a word (a killed consumer, a
    lost lease), `lone_deaths` those of them that had `begin_alone`.
    """

    stream: str
    entry_id: str
    consumer: str
    attempt: int
    payload: bytes = field(repr=False)
    errors: int = 0
    handed_back: int = 0
    lone_deaths: int = 0

    @property
    def deaths(self) -> int:
        return self.attempt - 1 - self.errors - self.handed_back

    def __str__(self) -> str:
        return f"{self.stream} entry {self.entry_id}"


@dataclass(frozen=True)
class Entry:
    """What stands in a stream, under the dedupe key it was first put with."""

    entry_id: str
    key: str
    payload: bytes = field(repr=False)


class PutResult(StrEnum):
    """What became of a put."""

    PUT = "put"
    DUPLICATE = "duplicate"
    """The dedupe key was put before."""
    FULL = "full"
    """The stream holds `bound` entries, or the server is at its memory limit: try again later."""


@dataclass(frozen=True)
class DeadLetter:
    """An entry that was given up, and why. `time_s` is Redis's clock in seconds since 1970."""

    entry_id: str
    payload: bytes = field(repr=False)
    key: str
    reason: str
    detail: str
    stream: str
    attempt: int
    time_s: float


class Queue:
    """One connection pool to Redis 6.2 or newer, or Valkey.

    Args:
        url: e.g. "redis://:password@127.0.0.1:6379/0".
        lease_s: seconds without heartbeat after which `claim` takes an entry over, even from its
            own consumer; math.inf for a sole consumer that holds entries without heartbeats.

    Every method raises `QueueUnavailableError` when Redis does not answer, and `QueueError`
    when it refuses a command.
    """

    def __init__(self, url: str, *, lease_s: float = 15.0) -> None:
        if not lease_s > 0:
            raise ConfigError(f"lease_s is {lease_s}; expected seconds above 0")
        self.lease_s = min(lease_s, LONGEST_LEASE_S)
        self._redis: Any = connect(url)
        self._where = address_of(self._redis)
        self._beats: dict[Claim, asyncio.Task[None]] = {}
        script = self._redis.register_script
        self._put, self._claim, self._resume = script(lua.PUT), script(lua.CLAIM), script(lua.RESUME)
        self._heartbeat, self._complete, self._retry = script(lua.HEARTBEAT), script(lua.COMPLETE), script(lua.RETRY)
        self._begin_incarnation = script(lua.BEGIN_INCARNATION)
        self._hand_back, self._begin_alone = script(lua.HAND_BACK), script(lua.BEGIN_ALONE)
        self._dead_letter, self._remove, self._outstanding = script(lua.DEAD_LETTER), script(lua.REMOVE), script(lua.OUTSTANDING)
        self._report_dead, self._revive = script(lua.REPORT_DEAD), script(lua.REVIVE)

    async def ping(self) -> None:
        """Return if Redis answers."""
        with self._errors():
            await self._redis.ping()

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def newest_incarnation(self, run: str) -> int:
        """The newest incarnation of the run's trainer on record, 0 if none is: a flushed Redis knows of none."""
        with self._errors():
            return int(await self._redis.get(Streams(run).incarnation) or 0)

    async def begin_incarnation(self, run: str, incarnation: int) -> None:
        """Record that this incarnation of the run's trainer lives; from here on puts of older ones are refused.

        Raises:
            FencedError: a newer one is recorded.
        """
        with self._errors():
            newest = int(await self._begin_incarnation([Streams(run).incarnation], [incarnation]))
        if newest > incarnation:
            raise _fenced_off(run, incarnation, newest)

    async def put(self, stream: str, payload: bytes, *, dedupe_key: str, bound: int, incarnation: int | None = None) -> PutResult:
        """Append, unless `dedupe_key` was put within the last 7 days or `bound` entries are outstanding.

        Args:
            incarnation: of the trainer that puts; None for what no trainer's incarnation asks.

        Raises:
            FencedError: a newer incarnation is recorded.
        """
        keys = [stream, f"{stream}:put:{dedupe_key}"]
        arguments: list[bytes | str | int] = [payload, dedupe_key, bound, DEDUPE_S]
        if incarnation is not None:
            keys.append(Streams.of(stream).incarnation)
            arguments.append(incarnation)
        result = await self._put_unless_full(stream, keys, arguments)
        if isinstance(result, PutResult):
            return result
        assert incarnation is not None
        raise _fenced_off(Streams.of(stream).run, incarnation, result)

    async def _put_unless_full(self, stream: str, keys: list[str], arguments: list[bytes | str | int]) -> PutResult | int:
        """What became of the put, or the newer incarnation that fences it off."""
        with self._errors():
            try:
                answer = await self._put(keys, arguments)
            except exceptions.ResponseError as error:
                # Redis 6.2 wraps a script's error in a general one, so the class alone doesn't tell.
                if "command not allowed when used memory > 'maxmemory'" not in str(error):
                    raise
                logger.debug("Redis at %s is at its maxmemory; %s is treated as full", self._where, stream)
                return PutResult.FULL
        return answer if isinstance(answer, int) else PutResult(answer.decode())

    async def claim(self, stream: str, consumer: str, *, wait_s: float) -> Claim | None:
        """Take over the oldest entry idle for `lease_s`, else take the next new one.

        Returns None when there was neither within `wait_s` seconds; 0 looks once.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        while True:
            with self._errors():
                found = await self._claim([stream, _errors_of(stream)], [consumer, int(self.lease_s * 1000)])
            _heed_cancellation()
            if found:
                return _claim(stream, consumer, found)
            if clock() >= deadline:
                return None
            await asyncio.sleep(POLL_S)

    async def resume(self, stream: str, consumer: str, *, besides: Iterable[str] = ()) -> list[Claim]:
        """Claim again, oldest first, all entries that a consumer of this name held before it restarted.

        Entries of the ids in `besides`, which it holds now, stay as they are. Each begins its next attempt, so that a predecessor that still runs is fenced off.
        """
        with self._errors():
            found = await self._resume([stream, _errors_of(stream)], [consumer, *besides])
        return [_claim(stream, consumer, entry) for entry in found]

    async def heartbeat(self, claim: Claim) -> None:
        """Renew the lease. Raises LeaseLostError if it is no longer ours."""
        await self._fenced(self._heartbeat, claim, [claim.stream])

    @asynccontextmanager
    async def keep(self, claim: Claim) -> AsyncIterator[None]:
        """Renew the lease every lease_s / 3 while the body runs.

        When the lease is lost the body is cancelled and LeaseLostError raised in its place. While
        Redis does not answer the body goes on: fencing decides later whether its result counts.
        The body may end the claim itself (complete, retry, hand_back, dead_letter).
        """
        failures: list[QueueError] = []
        try:
            async with asyncio.timeout(None) as alarm:
                self._beats[claim] = asyncio.create_task(self._beat(claim, alarm, failures))
                try:
                    yield
                finally:
                    self._stop_beats(claim)
        except TimeoutError:
            if not failures:
                raise
            raise failures[0] from None

    async def _beat(self, claim: Claim, alarm: asyncio.Timeout, failures: list[QueueError]) -> None:
        while True:
            await asyncio.sleep(self.lease_s / 3)
            try:
                await self.heartbeat(claim)
                _heed_cancellation()
            except QueueUnavailableError as error:
                logger.warning("no heartbeat for %s: %s", claim, error)
                _heed_cancellation()
            except QueueError as error:
                failures.append(error)
                alarm.reschedule(asyncio.get_running_loop().time())
                return

    def _stop_beats(self, claim: Claim) -> None:
        if beats := self._beats.pop(claim, None):
            beats.cancel()

    async def complete(self, claim: Claim, *, forward: str | None = None, payload: bytes | None = None) -> None:
        """Remove the entry and, in the same atomic step, append `payload` to the stream `forward`.

        Raises LeaseLostError, and changes nothing, if the claim is no longer ours: then its next
        holder delivers the result, or an earlier call, whose answer was lost, already did.
        """
        if (forward is None) != (payload is None):
            raise ValueError(f"{claim}: forward is {forward!r} and payload is {type(payload).__name__}; expected both or none")
        self._stop_beats(claim)
        keys = [claim.stream, _errors_of(claim.stream)]
        if forward is None:
            await self._fenced(self._complete, claim, keys)
        else:
            await self._fenced(self._complete, claim, [*keys, forward], payload)

    async def acknowledge(self, claims: Iterable[Claim]) -> int:
        """Remove the entries, whoever holds them by now; returns how many were still there.

        Unfenced on purpose: what a durable checkpoint contains must not be done again.
        """
        ids_by_stream: dict[str, list[str]] = defaultdict(list)
        for claim in claims:
            self._stop_beats(claim)
            ids_by_stream[claim.stream].append(claim.entry_id)
        return sum([await self.remove(stream, ids) for stream, ids in ids_by_stream.items()])

    async def retry(self, claim: Claim, error: str) -> int:
        """Hand the entry back, claimable by anyone at once; returns how many errors it has had so far.

        The claim ends with this: a consumer that wants to give up after n errors compares
        claim.errors + 1 with n first and calls `dead_letter` instead.
        """
        self._stop_beats(claim)
        errors = await self._fenced(self._retry, claim, [claim.stream, _errors_of(claim.stream)])
        logger.warning("%s, attempt %d, error %d: %s", claim, claim.attempt, errors, error)
        return errors

    async def hand_back(self, claim: Claim) -> None:
        """End the claim unfinished, through no fault of the entry's: claimable by anyone at once, neither error nor death."""
        self._stop_beats(claim)
        times = await self._fenced(self._hand_back, claim, [claim.stream, _errors_of(claim.stream)])
        logger.info("%s, attempt %d, handed back for the %d. time", claim, claim.attempt, times)

    async def begin_alone(self, claim: Claim) -> None:
        """Record that the consumer begins this attempt with nothing else in its hands.

        If it ends without a word, later claims count it in `lone_deaths`: only then is the entry the suspect.
        """
        await self._fenced(self._begin_alone, claim, [claim.stream, _errors_of(claim.stream)])

    async def dead_letter(self, claim: Claim, reason: str, detail: str) -> None:
        """Move the entry to the run's dead stream, with a short reason and its detail."""
        self._stop_beats(claim)
        keys = [claim.stream, _errors_of(claim.stream), Streams.of(claim.stream).dead]
        await self._fenced(self._dead_letter, claim, keys, reason, detail)
        logger.error("%s, attempt %d, given up: %s: %s", claim, claim.attempt, reason, detail)

    async def report_dead(self, run: str, payload: bytes, *, key: str, reason: str, detail: str) -> None:
        """Add a dead letter about an item that never came into a stream."""
        with self._errors():
            await self._report_dead([Streams(run).dead], [payload, key, reason, detail])

    async def dead(self, run: str, limit: int | None = 100) -> list[DeadLetter]:
        """The run's last dead letters (None: all), latest first; depth(Streams(run).dead) counts all."""
        with self._errors():
            entries = await self._redis.xrevrange(Streams(run).dead, count=limit)
        return [_dead_letter(entry_id, fields) for entry_id, fields in entries]

    async def dead_after(self, run: str, entry_id: str, limit: int = 100) -> list[DeadLetter]:
        """Up to `limit` dead letters that came after the one of that id ("0": from the first), oldest first."""
        with self._errors():
            entries = await self._redis.xrange(Streams(run).dead, min=f"({entry_id}", count=limit)
        return [_dead_letter(found, fields) for found, fields in entries]

    async def depth(self, stream: str) -> int:
        """Outstanding entries: waiting and claimed ones together."""
        with self._errors():
            return int(await self._redis.xlen(stream))

    async def outstanding(self, stream: str) -> dict[str, str]:
        """Dedupe keys of all outstanding entries by entry id, oldest first."""
        with self._errors():
            found = await self._outstanding([stream])
        return {entry_id.decode(): key.decode() for entry_id, key in found}

    async def entries(self, stream: str) -> list[Entry]:
        """All outstanding entries, oldest first, claimed or not; claims stay as they are."""
        with self._errors():
            found = await self._redis.xrange(stream)
        return [Entry(entry_id.decode(), fields[b"key"].decode(), fields[b"payload"]) for entry_id, fields in found]

    async def remove(self, stream: str, entry_ids: Iterable[str]) -> int:
        """Remove entries, claimed or not; claims on them are lost. Returns how many were there."""
        with self._errors():
            return int(await self._remove([stream, _errors_of(stream)], list(entry_ids)))

    async def purge(self, stream: str) -> None:
        """Remove all entries, claimed or not. Their dedupe keys stay: put again under others."""
        with self._errors():
            await self._redis.delete(stream, _errors_of(stream))

    async def letters(self, run: str, entry_ids: Iterable[str]) -> list[DeadLetter]:
        """The dead letters of these ids, in that order.

        Raises:
            InputError: there is none of an id.
        """
        stream, found = Streams(run).dead, []
        for entry_id in entry_ids:
            with self._errors():
                entries = await self._redis.xrange(stream, min=entry_id, max=entry_id)
            if not entries:
                raise InputError(_no_letter(entry_id, stream))
            found.append(_dead_letter(*entries[0]))
        return found

    async def revive(self, run: str, payloads: Mapping[str, bytes]) -> None:
        """Move dead letters to the run's stream of retries, in one atomic step.

        Args:
            payloads: what to put there, by the letter's entry id.

        Raises:
            InputError: one of the letters is gone; nothing was changed.
        """
        streams = Streams(run)
        arguments = [part for pair in payloads.items() for part in pair]
        with self._errors():
            missing = await self._revive([streams.dead, streams.retries], arguments)
        if missing:
            raise InputError(_no_letter(missing.decode(), streams.dead))

    async def _fenced(self, script: Any, claim: Claim, keys: list[str], *arguments: bytes | str | None) -> int:
        with self._errors():
            done = await script(keys, [claim.entry_id, claim.consumer, claim.attempt, *arguments])
        if not done:
            raise LeaseLostError(
                f"{claim}: {claim.consumer} no longer holds it as attempt {claim.attempt}; "
                "drop the result: it was completed, removed, or belongs to a later attempt"
            )
        return int(done)

    def _errors(self) -> AbstractContextManager[None]:
        return redis_errors(self._where)


def _fenced_off(run: str, incarnation: int, newest: int) -> FencedError:
    return FencedError(
        f"run {run!r}: incarnation {incarnation} of the trainer is refused, since incarnation {newest} is recorded: "
        "another trainer has taken over; end this one. If instead the run's folder was deleted and the run begun anew, "
        f"delete the key {Streams(run).incarnation} from Redis"
    )


def _errors_of(stream: str) -> str:
    return f"{stream}:errors"


def _heed_cancellation() -> None:
    """Be cancelled if this task was: the client waits with asyncio.wait_for, which in Python 3.11 can swallow it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _claim(stream: str, consumer: str, found: list[Any]) -> Claim:
    entry_id, payload, attempt, errors, handed_back, lone_deaths = found
    return Claim(stream, entry_id.decode(), consumer, attempt, payload, errors, handed_back, lone_deaths)


def _no_letter(entry_id: str, stream: str) -> str:
    return f"no dead letter {entry_id} in {stream}; `mars dead list` shows those that are there"


def _dead_letter(entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    text = {name.decode(): value.decode() for name, value in fields.items() if name != b"payload"}
    time_s, attempt = float(text.pop("time")), int(text.pop("attempt"))
    return DeadLetter(entry_id=entry_id.decode(), payload=fields[b"payload"], attempt=attempt, time_s=time_s, **text)
