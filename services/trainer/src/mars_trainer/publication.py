"""Publishing beside the training: while one version is encoded, written and announced, the next batch is made."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable

from torch import nn

from mars_shared.contracts import PolicyVersion
from mars_shared.errors import WeightsUnavailableError
from mars_trainer.publish import Publisher

logger = logging.getLogger(__name__)

UPLOAD_AGAIN_S = 2.0
OnDisk = Callable[[Callable[[], object]], Awaitable[None]]


class Publications:
    """One publication at a time, in a task of its own.

    Args:
        on_disk: does what writes to the disk, again when that was full.
    """

    def __init__(self, publisher: Publisher, on_disk: OnDisk) -> None:
        self._publisher = publisher
        self._on_disk = on_disk
        self._encoded = threading.Event()
        self._encoded.set()
        self._task: asyncio.Task[tuple[float, float]] | None = None

    async def begin(self, model: nn.Module, version: PolicyVersion) -> None:
        """Begin to publish; the one before is finished first."""
        await self.finished()
        self._encoded.clear()
        self._task = asyncio.create_task(self._publish(model, version), name=f"publish {version}")

    def until_encoded(self) -> None:
        """Return when the parameters may change again; called in the thread that changes them."""
        self._encoded.wait()

    async def finished(self) -> tuple[float, float] | None:
        """Wait for the publication under way; returns when it began and ended, None if there was none.

        Raises:
            FencedError: another trainer has taken over.
        """
        task, self._task = self._task, None
        return None if task is None else await task

    def check(self) -> None:
        """Raise what a publication failed with; nobody need wait for a version that will never be announced."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def mend(self) -> bool:
        """Publish a snapshot if a reader found that nothing leads to the announced version; whether that was so.

        What is damaged at the recipe's URL alone is uploaded again.
        """
        self.check()
        if self._task is not None and not self._task.done():
            return False
        mended = await asyncio.to_thread(self._publisher.needs_snapshot)
        if mended:
            await self._on_disk(self._publisher.mend)
        if mended or self._publisher.needs_upload():
            await self._upload()
        return mended

    async def _publish(self, model: nn.Module, version: PolicyVersion) -> tuple[float, float]:
        began = time.time()
        try:
            await asyncio.to_thread(self._publisher.encode, model, version)
        finally:
            self._encoded.set()
        await self._on_disk(self._publisher.announce)
        await self._upload()
        return began, time.time()

    async def _upload(self) -> None:
        while True:
            try:
                return await asyncio.to_thread(self._publisher.upload)
            except WeightsUnavailableError as error:
                logger.warning("%s; trying again", error)
                await asyncio.sleep(UPLOAD_AGAIN_S)
