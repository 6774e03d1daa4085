"""vLLM's engine as mars runs it: its settings, and AsyncLLM whose requests are tagged with the weights that answer them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from mars_rollout.engine.base import BASE_WEIGHTS_ID
from mars_rollout.transfer import BACKEND
from mars_shared.errors import IntegrityError
from mars_shared.settings import Recipe

SERVED_NAME = "policy"
MAX_CONCURRENT_SEQUENCES = 64
"""On CPU results are equal bit by bit in any batch up to this size."""
DEATH_POLL_S = 0.5
"""How often a call that waits for the engine's core looks whether that lives."""
URGENT, ADHOC = 0, 1
"""Priorities of requests; the lower one goes first."""
OWN_PREFIX = "mars-"
"""Of the ids of requests that a replica makes itself, whose priorities it knows."""


def engine_args(recipe: Recipe) -> AsyncEngineArgs:
    """vLLM's settings for a recipe, on the platform that vLLM found."""
    rollout, model = recipe.rollout, recipe.model
    cpu = current_platform.is_cpu()
    kv_cache_bytes = rollout.kv_cache_mib * 2**20 if rollout.kv_cache_mib is not None else None
    platform: dict[str, Any] = {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    if cpu:
        # One prefill is never cut in two: vLLM's CPU sampler refuses seeds otherwise.
        platform = {
            "enforce_eager": True,
            "skip_mm_profiling": True,
            "block_size": 32,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(model.max_model_len, 8192),
        }
    return AsyncEngineArgs(
        model=str(model.path),
        served_model_name=[SERVED_NAME, recipe.run.name],
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        max_num_seqs=MAX_CONCURRENT_SEQUENCES if cpu else 256,
        kv_cache_memory_bytes=kv_cache_bytes,
        seed=recipe.run.seed,
        enable_prefix_caching=True,
        scheduling_policy="priority",
        logprobs_mode="processed_logprobs",
        limit_mm_per_prompt={"image": 64, "video": 0},
        mm_device_do_normalize=False,  # the vision tower gets the very pixels that the self-test hashes
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        enable_log_requests=False,
        trust_remote_code=False,
        **platform,
    )


class PolicyLLM(AsyncLLM):
    """AsyncLLM whose requests, whoever makes them, are tagged with the weights that will answer them.

    The tag stands in every image's identifier and in the prefix cache's salt, so that nothing
    computed by other weights is ever reused. It counts updates: weights that come back after a
    rollback don't meet what requests in flight at the change may have left under the same name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tag = f"0-{BASE_WEIGHTS_ID}"
        self._updates = count(1)
        self.engine_core.add_request_async = self._tagged(self.engine_core.add_request_async)
        self.engine_core._call_utility_async = self._unless_dead(self.engine_core._call_utility_async)

    async def apply_weights(self, files: list[str], version: str, weights_id: str) -> dict[str, float]:
        """Change the weights between two forward passes; requests sent after this call carry the new tag.

        Returns seconds by stage. A change that is refused leaves a tag of its own behind, which costs cached values and
        nothing else.

        Raises:
            IntegrityError: the tensors don't fit; nothing was written.
            Exception: nobody knows which weights the engine holds.
        """
        async with self._between_steps():
            # The tag changes with the very message: the engine handles messages in the order sent.
            before, self._tag = self._tag, f"{next(self._updates)}-{weights_id}"
            try:
                answer: dict[str, float] | str = await self.engine_core.call_utility_async("apply_weights", files, version)
                if isinstance(answer, str):
                    raise IntegrityError(f"weights {version} do not fit the model: {answer}")
            except BaseException:
                self._tag = f"{next(self._updates)}-{before.partition('-')[2]}"
                raise
        return answer

    async def compare_weights(self, files: list[str]) -> None:
        """Compare the weights with safetensors files; raises what differs."""
        async with self._between_steps():
            await self.engine_core.call_utility_async("compare_weights", files)

    @asynccontextmanager
    async def _between_steps(self) -> AsyncIterator[None]:
        """Where the next step is scheduled while one runs, requests are held meanwhile."""
        overlapping = self.vllm_config.scheduler_config.async_scheduling
        if overlapping:
            await self.pause_generation(mode="keep", clear_cache=False)
        try:
            yield
        finally:
            if overlapping:
                await self.resume_generation()

    def _tagged(self, send: Callable[[EngineCoreRequest], Awaitable[None]]) -> Callable[[EngineCoreRequest], Awaitable[None]]:
        async def send_tagged(request: EngineCoreRequest) -> None:
            request.cache_salt = f"{self._tag}/{request.cache_salt or ''}"
            for feature in request.mm_features or ():
                feature.identifier = f"{self._tag}/{feature.mm_hash}"
            if not (request.external_req_id or "").startswith(OWN_PREFIX):
                request.priority = max(request.priority, ADHOC)
            await send(request)

        return send_tagged

    def _unless_dead(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call_unless_dead(*arguments: Any, **options: Any) -> Any:
            watching = asyncio.create_task(self._end_calls_with_the_core())
            try:
                # Not in a task of its own: the message is on its way before anything else runs.
                return await call(*arguments, **options)
            finally:
                watching.cancel()

        return call_unless_dead

    async def _end_calls_with_the_core(self) -> None:
        """Of calls that were under way when the engine's core died vLLM would wait for ever."""
        while not self.errored:  # noqa: ASYNC110  # another process dies
            await asyncio.sleep(DEATH_POLL_S)
        for answer in list(self.engine_core.utility_results.values()):
            if not answer.done():
                answer.set_exception(EngineDeadError())
