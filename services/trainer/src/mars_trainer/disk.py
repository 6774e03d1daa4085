"""Waiting for space on a disk that is full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mars_shared.files import disk_is_full

logger = logging.getLogger(__name__)

DISK_PAUSE_S = 5.0
"""Between attempts."""


async def despite_full_disk(write: Callable[[], object], on_full: Callable[[], None]) -> None:
    """Do it in a thread, again and again while the disk is full: the run pauses and nothing is lost."""
    while True:
        try:
            await asyncio.to_thread(write)
        except OSError as error:
            if not disk_is_full(error):
                raise
            on_full()
            logger.error("the disk is full (%s); free some space, the run goes on then", error)
            await asyncio.sleep(DISK_PAUSE_S)
        else:
            return
