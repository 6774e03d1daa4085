"""How long generation stands still while a real engine takes new weights.

A request in flight yields its tokens one by one as updates happen. The stall of an update is the longest pause between two
tokens that overlaps it, less the usual pause (the median where no update is): the time for which the engine's loop was held,
with all that leads into it and out of it. Beside it stand the stages as `Engine.update` returns them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import count, pairwise
from statistics import median
from time import perf_counter
from typing import Any

from mars_shared.settings import Recipe
from weights.journey import Move

TOKENS_BETWEEN = 12
"""Tokens that are awaited before an update, and after it."""
PROMPT = (1, 8, 2)
LENGTH = 1000
"""Tokens of a request; another one follows it."""


class Stream:
    """When the tokens of one long request after another came, in seconds of `perf_counter`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.times: list[float] = []
        self._came = asyncio.Condition()

    async def run(self) -> None:
        """Generate until cancelled."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=1.0, output_kind=RequestOutputKind.DELTA)
        for number in count():
            async for output in self._engine.llm.generate({"prompt_token_ids": list(PROMPT)}, wanted, f"stream-{number}"):
                self.times += [perf_counter()] * len(output.outputs[0].token_ids)
                async with self._came:
                    self._came.notify_all()

    async def more(self, tokens: int) -> None:
        """Wait for some more of them."""
        goal = len(self.times) + tokens
        async with self._came:
            await self._came.wait_for(lambda: len(self.times) >= goal)


@asynccontextmanager
async def started(recipe: Recipe) -> AsyncIterator[Any]:
    """The real engine with a recipe's model."""
    from mars_rollout.engine.environment import configure_environment

    configure_environment(threads=recipe.rollout.threads, max_image_pixels=recipe.data.max_image_pixels)
    from mars_rollout.engine.vllm import VllmEngine

    engine = await VllmEngine.start(recipe)
    try:
        yield engine
    finally:
        await engine.shutdown()


async def measure_stalls(engine: Any, moves: Sequence[Callable[[], Move]]) -> list[dict[str, float]]:
    """Seconds by stage of an update after each of a replica's moves, under a request in flight, and "stall".

    Raises:
        IntegrityError: the engine does not hold the bits of the last move's files.
    """
    stream = Stream(engine)
    spans: list[tuple[float, float]] = []
    stages: list[dict[str, float]] = []
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(stream.run())
        for move in moves:
            moved = await asyncio.to_thread(move)
            await stream.more(TOKENS_BETWEEN)
            began = perf_counter()
            stages.append(await engine.update(moved.weights, moved.files))
            spans.append((began, perf_counter()))
            await stream.more(TOKENS_BETWEEN)
        running.cancel()
    await engine.compare(moved.files)
    return [seconds | {"stall": stall} for seconds, stall in zip(stages, stalls(stream.times, spans), strict=True)]


def stalls(times: Sequence[float], updates: Iterable[tuple[float, float]]) -> list[float]:
    """Longest pause between tokens that overlaps each update, less the median of those that overlap none.

    >>> stalls([0.0, 0.1, 0.2, 0.7, 0.8], [(0.25, 0.6)])
    [0.4]
    """
    spans = list(updates)
    pauses = list(pairwise(times))
    usual = median(end - start for start, end in pauses if not any(_meet((start, end), span) for span in spans))
    return [max((end - start for start, end in pauses if _meet((start, end), span)), default=usual) - usual for span in spans]


def _meet(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
