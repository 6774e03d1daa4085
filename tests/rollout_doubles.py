"""An engine without a model, at the `Engine` seam, for tests of what stands around it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from mars_rollout.engine.base import BASE_VERSION, BASE_WEIGHTS_ID, EngineAnswer, EngineCompletion, EngineRequest
from mars_shared.contracts import FinishReason, PolicyVersion, VersionSpan, WeightIdentity
from mars_shared.errors import NotReadyError

IMAGE_TOKEN = 5
TOKENS_PER_IMAGE = 4
"""Of a 56 x 56 image: (56 / 28) ** 2."""


class ScriptedEngine:
    """Answers at once unless `gate` is cleared; sample i of seed s is the token s + i.

    Where the version changed under the request that token comes once by the old and once by the new one.
    """

    def __init__(self) -> None:
        self.version: PolicyVersion = BASE_VERSION
        self.weights_id = BASE_WEIGHTS_ID
        self.alive = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[EngineRequest] = []
        self.updates: list[PolicyVersion] = []
        self.running = 0
        self.running_at_update: list[int] = []
        self.failures: list[Exception] = []

    async def generate(self, request: EngineRequest) -> EngineAnswer:
        self.requests.append(request)
        version = self.version
        self.running += 1
        try:
            if self.failures:
                raise self.failures.pop(0)
            await self.gate.wait()
            if not self.alive:
                raise NotReadyError("the engine is dead")
            return self._answer(request, version)
        finally:
            self.running -= 1

    async def update(self, weights: WeightIdentity, files: Sequence[Path]) -> dict[str, float]:
        self.running_at_update.append(self.running)
        self.version, self.weights_id = weights.version, weights.weights_id
        self.updates.append(weights.version)
        return {}

    async def compare(self, files: Sequence[Path]) -> None:
        """Whatever is in the files."""

    async def until_running(self, count: int) -> None:
        """Return once that many requests wait for an answer."""
        while self.running < count:
            await asyncio.sleep(0.01)

    async def shutdown(self) -> None:
        self.alive = False

    def _answer(self, request: EngineRequest, began: PolicyVersion) -> EngineAnswer:
        expanded = [t for token in request.token_ids for t in [token] * (TOKENS_PER_IMAGE if token == IMAGE_TOKEN else 1)]
        versions = [began] if began == self.version else [began, self.version]
        spans = tuple(VersionSpan(version=version, start=place, end=place + 1) for place, version in enumerate(versions))
        first = 0 if request.seed is None else request.seed
        completions = tuple(
            EngineCompletion((first + i,) * len(spans), (-0.5,) * len(spans), f"text {first + i}", FinishReason.STOP, spans)
            for i in range(request.n)
        )
        pixels = tuple(f"pixels of image {index}" for index in range(len(request.images))) if request.hash_pixels else None
        return EngineAnswer(tuple(expanded), completions, pixels)
