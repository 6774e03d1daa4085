"""A weight file on its way: hashed while it is written, resumed where it ended, in its place only when it is whole."""

from __future__ import annotations

import asyncio
import glob
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import NoReturn, TypeVar

from blake3 import blake3

from mars_shared.contracts import WeightFile, WeightManifest
from mars_shared.errors import IntegrityError, WeightsUnavailableError
from mars_shared.patience import FIRST_PAUSE_S, longer

logger = logging.getLogger(__name__)

TRIES = 5
"""Attempts in a row that come no further than earlier ones, after which a source counts as unreachable."""
CHUNK_BYTES = 4 * 2**20

T = TypeVar("T")


class Partial:
    """What has come of a file so far, in a neighbour of its target that has the expected hash in its name.

        with closing(Partial(manifest, file, target)) as partial:
            while not partial.is_whole:
                partial.write(read_from(partial.size_bytes))
            partial.keep()

    Closed before `keep`, it stays for the next one to go on with. One at a time per target; neither file is fsynced.
    """

    def __init__(self, manifest: WeightManifest, file: WeightFile, target: Path) -> None:
        self._what = f"weights {manifest.version}: {manifest.folder_name}/{file.name}"
        self._file = file
        self._target = target
        self.path = target.with_name(f".{target.name}.{file.blake3[:16]}.partial")
        for other in self.path.parent.glob(f".{glob.escape(self._target.name)}.*.partial"):
            if other != self.path:
                other.unlink()  # of earlier weights that were meant for the same place
        self._hasher = blake3()
        self._out = self.path.open("ab")
        self.size_bytes = self._out.tell()
        if self.size_bytes > self._file.size_bytes:
            self.restart()
        elif self.size_bytes:
            self._hasher.update_mmap(self.path)

    def close(self) -> None:
        self._out.close()

    @property
    def is_whole(self) -> bool:
        """Whether as many bytes have come as are expected; `keep` looks at their hash."""
        return self.size_bytes == self._file.size_bytes

    @property
    def missing_bytes(self) -> int:
        return self._file.size_bytes - self.size_bytes

    def write(self, data: bytes | bytearray) -> None:
        """Add bytes at the end.

        Raises:
            IntegrityError: more came than are expected; nothing is kept of them.
        """
        if len(data) > self.missing_bytes:
            self.refuse(f"has more than {self.size_bytes + self.missing_bytes} bytes")
        self._out.write(data)
        self._hasher.update(data)
        self.size_bytes += len(data)

    def restart(self) -> None:
        """Forget what has come."""
        self._out.truncate(0)
        self._hasher.reset()
        self.size_bytes = 0

    def expect_size(self, size_bytes: int) -> None:
        """Compare the size that the source says.

        Raises:
            IntegrityError: it is another than the manifest's; what has come is removed.
        """
        if size_bytes != self._file.size_bytes:
            self.refuse(f"has {size_bytes} bytes")

    def keep(self) -> None:
        """Rename the whole file to its target.

        Raises:
            IntegrityError: its hash is not the expected one; what has come is removed.
        """
        actual = self._hasher.hexdigest()
        if not self.is_whole or actual != self._file.blake3:
            self.refuse(f"has {self.size_bytes} bytes and hash {actual}")
        self._out.close()
        os.replace(self.path, self._target)

    def refuse(self, came: str) -> NoReturn:
        """Remove what has come and say why."""
        self._out.close()
        self.path.unlink()
        raise IntegrityError(f"{self._what} {came}; expected {self._file.size_bytes} bytes with hash {self._file.blake3}")


async def in_thread(call: Callable[..., T], *arguments: object) -> T:
    """`asyncio.to_thread`, but a cancellation waits for the call's end, so that nothing is written behind the caller's back."""
    task = asyncio.create_task(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def fetch_file(manifest: WeightManifest, file: WeightFile, target: Path, add: Callable[[Partial], Awaitable[None]]) -> None:
    """Bring a file to `target`, verified.

    Args:
        add: asks the source for what comes after the partial's end and writes it; asked again, after a pause that
            grows, when it raises WeightsUnavailableError or the answer ends early.

    Raises:
        IntegrityError: size or hash differ, or (WeightsMissingError) the file is not in the store.
        WeightsUnavailableError: TRIES attempts in a row came no further; what came before stays for the next call.
    """
    with closing(await in_thread(Partial, manifest, file, target)) as partial:
        pause_s, fruitless, most_bytes = FIRST_PAUSE_S, 0, partial.size_bytes
        while not partial.is_whole:
            try:
                await add(partial)
                if not partial.is_whole:
                    raise WeightsUnavailableError(f"{target.name}: the answer ended after {partial.size_bytes} bytes")
            except WeightsUnavailableError as error:
                fruitless, pause_s = (0, FIRST_PAUSE_S) if partial.size_bytes > most_bytes else (fruitless + 1, longer(pause_s))
                most_bytes = max(most_bytes, partial.size_bytes)
                if fruitless == TRIES:
                    raise
                logger.warning("%s has come to %d of %d bytes: %s", target.name, partial.size_bytes, file.size_bytes, error)
                await asyncio.sleep(pause_s)
        await in_thread(partial.keep)


async def add_ranges(partial: Partial, size_bytes: int, read: Callable[[int, int], bytes]) -> None:
    """Write what is missing from a source that is read by ranges, in threads.

    Args:
        size_bytes: of the source's file.
        read: bytes from (start, end).
    """
    partial.expect_size(size_bytes)

    def add_one() -> None:
        data = read(partial.size_bytes, partial.size_bytes + min(CHUNK_BYTES, partial.missing_bytes))
        if not data:
            partial.refuse(f"ends after {partial.size_bytes} bytes")
        partial.write(data)

    while not partial.is_whole:
        await in_thread(add_one)
