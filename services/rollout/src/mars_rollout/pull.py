"""Brings the replica's own copy of the weights, its mirror, to an announced version by the fewest bytes."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mars_rollout.metrics import count_fetched, count_refused, count_stages
from mars_shared.contracts import WeightIdentity, WeightManifest
from mars_shared.errors import InputError, IntegrityError, NoRouteError, WeightsUnavailableError
from mars_shared.weights.bits.mirror import Mirror
from mars_shared.weights.route import Hop, HopKind, Route, plan_route
from mars_shared.weights.source import WeightSource

logger = logging.getLogger(__name__)

REGISTER_S = 20.0
"""Between registrations; the store forgets a reader after a minute."""


@dataclass(frozen=True)
class Arrival:
    """The mirror's safetensors files with the wanted weights in them, and how they came there."""

    files: Sequence[Path]
    how: str


class Puller:
    """Fetches, verifies and applies publications; the engine takes its tensors from the mirror's files afterwards.

    Args:
        replica: the name under which the source knows what this replica holds.
        scratch: a folder of this replica alone.
        verify: "changed": checksums are kept up to date from what changed; "full": computed from all bytes every time.
    """

    def __init__(self, source: WeightSource, replica: str, scratch: Path, *, verify: Literal["changed", "full"]) -> None:
        self._fetched = scratch / "fetched"
        self._fetched.mkdir(parents=True, exist_ok=True)
        self._mirror = Mirror(scratch / "mirror")
        self._source = source
        self._replica = replica
        self._verify = verify
        self._how = "held already"
        self._known_bad: set[str] = set()
        """Publications that turned out to be damaged: counted and told once, and tried again, since the trainer mends them."""
        self._lock = asyncio.Lock()
        self._registered_s = -REGISTER_S

    @asynccontextmanager
    async def at(self, weights: WeightIdentity) -> AsyncIterator[Arrival]:
        """Bring the mirror to these weights and keep it so.

        Raises:
            IntegrityError: what is published does not lead there; the mirror holds what it held, or nothing.
            WeightsUnavailableError: the source does not answer.
            OSError: the scratch folder is full, say.
        """
        async with self._lock:
            if self._weights_id != weights.weights_id:
                await self._pull(weights)
            yield Arrival(self._mirror.paths, self._how)

    @asynccontextmanager
    async def verified(self) -> AsyncIterator[tuple[str | None, Sequence[Path]]]:
        """Identity and files of what the mirror holds, its checksum computed from all bytes; it stays so inside.

        Raises:
            IntegrityError: which tensors are not as they were applied.
        """
        async with self._lock:
            if self._mirror.weights is not None:
                await asyncio.to_thread(self._mirror.verify_full)
            yield self._weights_id, self._mirror.paths

    async def stay_registered(self) -> None:
        """Tell the source, now and then, which weights this replica needs deltas from."""
        if time.monotonic() - self._registered_s < REGISTER_S:
            return
        self._registered_s = time.monotonic()
        try:
            await self._source.register(self._replica, self._weights_id)
        except (InputError, IntegrityError, WeightsUnavailableError) as error:
            logger.warning("%s", error)

    @property
    def _weights_id(self) -> str | None:
        return self._mirror.weights.weights_id if self._mirror.weights else None

    async def _pull(self, weights: WeightIdentity) -> None:
        """Go the cheapest way whose publications are good; one that is not is gone around."""
        seconds: defaultdict[str, float] = defaultdict(float)
        bad: dict[str, IntegrityError] = {}
        while self._weights_id != weights.weights_id:
            route = await self._plan(weights, bad, seconds)
            await asyncio.to_thread(self._forget_others, route)
            await self._go(route, bad, seconds)
        if self._verify == "full":
            await asyncio.to_thread(self._mirror.verify_full)
        count_stages(seconds)
        self._registered_s = -REGISTER_S

    async def _plan(self, weights: WeightIdentity, bad: dict[str, IntegrityError], seconds: defaultdict[str, float]) -> Route:
        """The way from what is held, by publications that are not known to be bad."""
        began = time.perf_counter()
        manifests = [manifest for manifest in await self._source.manifests() if manifest.folder_name not in bad]
        try:
            return plan_route(manifests, self._weights_id, weights.weights_id)
        except NoRouteError as error:
            if bad:
                raise next(iter(bad.values())) from error
            raise
        finally:
            seconds["plan"] += time.perf_counter() - began

    def _forget_others(self, route: Route) -> None:
        """Remove what came, whole or in part, of publications that are not on the way any more."""
        wanted = {hop.manifest.folder_name for hop in route.hops if hop.manifest}
        for folder in self._fetched.iterdir():
            if folder.name not in wanted:
                shutil.rmtree(folder)

    async def _go(self, route: Route, bad: dict[str, IntegrityError], seconds: defaultdict[str, float]) -> None:
        """Make a route's hops, up to one whose publication turns out to be bad."""
        for hop in route.hops:
            try:
                await self._take(hop, seconds)
            except IntegrityError as error:
                if hop.manifest is None:
                    raise
                bad[hop.manifest.folder_name] = error
                shutil.rmtree(self._fetched / hop.manifest.folder_name, ignore_errors=True)
                if hop.manifest.folder_name not in self._known_bad:
                    self._known_bad.add(hop.manifest.folder_name)
                    count_refused("damaged")
                    logger.warning("%s; looking for another way to %s", error, route.want.version)
                return
        self._how = str(route)

    async def _take(self, hop: Hop, seconds: defaultdict[str, float]) -> None:
        began = time.perf_counter()
        files = [await self._fetch(hop.manifest, index) for index in range(len(hop.manifest.files))] if hop.manifest else []
        fetched = time.perf_counter()
        try:
            await asyncio.to_thread(self._apply, hop, files)
        finally:
            if hop.manifest is not None:
                shutil.rmtree(self._fetched / hop.manifest.folder_name)
        seconds["fetch"] += fetched - began
        seconds["decode"] += time.perf_counter() - fetched

    async def _fetch(self, manifest: WeightManifest, index: int) -> Path:
        file = manifest.files[index]
        target = self._fetched / manifest.folder_name / file.name
        target.parent.mkdir(exist_ok=True)
        await self._source.fetch(manifest, file, target)
        count_fetched(manifest.kind, file.size_bytes)
        return target

    def _apply(self, hop: Hop, files: list[Path]) -> None:
        match hop.kind, hop.manifest:
            case HopKind.SNAPSHOT, WeightManifest() as manifest:
                self._mirror.take_snapshot(manifest, files)
            case HopKind.APPLY, WeightManifest() as manifest:
                self._mirror.apply(manifest, *files)
            case HopKind.UNDO, WeightManifest() as manifest:
                self._mirror.undo(manifest, *files)
            case _:
                self._mirror.rename(hop.weights)
