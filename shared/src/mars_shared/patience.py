"""Waiting for Redis to come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mars_shared.errors import QueueUnavailableError

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

T = TypeVar("T")


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until Redis answers, with pauses that grow; its result, or its other errors."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except QueueUnavailableError as error:
            logger.warning("waiting %.1f s: %s", pause_s, error)
            await asyncio.sleep(pause_s)
            pause_s = longer(pause_s)


def longer(pause_s: float) -> float:
    """The pause after this one."""
    return min(2 * pause_s, LONGEST_PAUSE_S)
