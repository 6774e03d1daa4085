"""The weights store on a shared volume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from mars_shared.contracts import WeightFile, WeightIdentity, WeightManifest
from mars_shared.errors import WeightsMissingError, WeightsUnavailableError
from mars_shared.weights.partial import Partial, add_ranges, fetch_file, in_thread
from mars_shared.weights.store import WeightsStore

T = TypeVar("T")


class VolumeSource:
    """Reads a WeightsStore's folder; a `WeightSource`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def head(self) -> WeightManifest | None:
        return await self._ask(lambda store: store.head())

    async def manifests(self) -> list[WeightManifest]:
        return await self._ask(lambda store: store.manifests())

    async def fetch(self, manifest: WeightManifest, file: WeightFile, target: Path) -> None:
        path = self._root / manifest.folder_name / file.name

        async def add(partial: Partial) -> None:
            with self._reading():
                descriptor = os.open(path, os.O_RDONLY)
            try:
                await add_ranges(partial, os.fstat(descriptor).st_size, lambda start, end: self._read(descriptor, start, end))
            finally:
                os.close(descriptor)

        await fetch_file(manifest, file, target, add)

    async def complain(self, identity: WeightIdentity) -> None:
        await self._ask(lambda store: store.complain(identity))

    async def register(self, reader: str, weights_id: str | None) -> None:
        await self._ask(lambda store: store.register(reader, weights_id))

    async def aclose(self) -> None:
        pass

    async def _ask(self, question: Callable[[WeightsStore], T]) -> T:
        def ask() -> T:
            with self._reading():
                return question(WeightsStore(self._root))

        return await in_thread(ask)

    def _read(self, descriptor: int, start: int, end: int) -> bytes:
        with self._reading():
            return os.pread(descriptor, end - start, start)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Errors of the volume, not of where its files are copied to."""
        try:
            yield
        except FileNotFoundError as error:
            raise WeightsMissingError(f"{error.filename or self._root} is not in the weights store") from error
        except OSError as error:
            raise WeightsUnavailableError(
                f"the weights store {self._root} cannot be used ({error}); is the volume there?"
            ) from error
