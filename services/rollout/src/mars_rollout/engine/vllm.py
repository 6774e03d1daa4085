"""vLLM behind the `Engine` seam: settings, request tags, weight updates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from vllm import SamplingParams, TokensPrompt
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from mars_rollout.engine.base import BASE_VERSION, BASE_WEIGHTS_ID, EngineAnswer, EngineCompletion, EngineRequest
from mars_rollout.engine.child import run_engine_core
from mars_rollout.transfer import BACKEND
from mars_shared.contracts import FinishReason, PolicyVersion, VersionSpan, WeightIdentity
from mars_shared.errors import InputError, IntegrityError, NotReadyError
from mars_shared.images import pixel_hash
from mars_shared.settings import Recipe

T = TypeVar("T")

SERVED_NAME = "policy"
MAX_CONCURRENT_SEQUENCES = 64
"""On CPU results are equal bit by bit in any batch up to this size."""
SHUTDOWN_S = 2.0
"""How long the engine's processes may take to end before they are killed; they hold nothing durable."""
DEATH_POLL_S = 0.5
"""How often a call that waits for the engine's core looks whether that lives."""
_URGENT, _ADHOC = 0, 1
_OWN_PREFIX = "mars-"


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
            if not (request.external_req_id or "").startswith(_OWN_PREFIX):
                request.priority = max(request.priority, _ADHOC)
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


class VllmEngine:
    """The `Engine` that replicas use; see `mars_rollout.engine.base.Engine`.

    Example:
        engine = await VllmEngine.start(recipe)
        await engine.update(manifest, files)
        answer = await engine.generate(request)
    """

    def __init__(self, llm: PolicyLLM) -> None:
        self.llm = llm
        self._version = BASE_VERSION
        self._weights_id = BASE_WEIGHTS_ID
        self._whole = True
        self._ids = count()

    @classmethod
    async def start(cls, recipe: Recipe) -> VllmEngine:
        """Load the base model; takes 10 s and more, without blocking the event loop."""
        # vLLM gives its child process this target, by name.
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
        llm = await asyncio.to_thread(PolicyLLM.from_engine_args, engine_args(recipe))
        await llm.update_weight_version(str(BASE_VERSION))
        return cls(llm)

    @property
    def version(self) -> PolicyVersion:
        return self._version

    @property
    def weights_id(self) -> str:
        return self._weights_id

    @property
    def alive(self) -> bool:
        return self._whole and not self.llm.errored

    async def generate(self, request: EngineRequest) -> EngineAnswer:
        request_id = f"{_OWN_PREFIX}{next(self._ids)}"
        prompt = TokensPrompt(prompt_token_ids=list(request.token_ids), multi_modal_data={"image": list(request.images)})
        if request.hash_pixels:
            # Under names of their own no cache knows the images, so that they are preprocessed here and now.
            prompt["multi_modal_uuids"] = {"image": [f"{request_id}/{index}" for index in range(len(request.images))]}
        try:
            (engine_input,) = await self.llm.renderer.render_cmpl_async([parse_model_prompt(self.llm.model_config, prompt)])
        except ValueError as error:
            raise InputError(f"the engine refuses the prompt: {error}") from error
        outputs = self.llm.generate(
            engine_input,
            sampling_params(request),
            request_id,
            priority=_URGENT if request.urgent else _ADHOC,
        )
        final: RequestOutput | None = None
        try:
            async for output in outputs:
                final = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise NotReadyError(f"the engine did not answer ({type(error).__name__}: {error})") from error
        if final is None or not final.finished or final.prompt_token_ids is None:
            raise NotReadyError("the engine dropped a request before it was answered; ask again")
        samples = sorted(final.outputs, key=lambda sample: sample.index)
        return EngineAnswer(
            tuple(final.prompt_token_ids),
            tuple(_completion(sample) for sample in samples),
            _pixel_hashes(engine_input) if request.hash_pixels else None,
        )

    async def update(self, weights: WeightIdentity, files: Sequence[Path]) -> dict[str, float]:
        version, names = str(weights.version), [str(file) for file in files]
        known = False
        try:
            seconds = await self.llm.apply_weights(names, version, weights.weights_id)
            known = True
        except IntegrityError:
            known = True
            raise
        except EngineDeadError as error:
            raise NotReadyError("the engine died over its weights") from error
        except Exception as error:  # vLLM reports a failed call by no narrower class
            raise NotReadyError(f"the engine failed over weights {version} ({type(error).__name__}: {error})") from error
        finally:
            # Cut off or failed, nobody knows which weights the engine holds.
            self._whole = self._whole and known
        self._version, self._weights_id = weights.version, weights.weights_id
        return seconds

    async def compare(self, files: Sequence[Path]) -> None:
        with _failures(f"the engine's weights are not those of {self._version}"):
            await self.llm.compare_weights([str(file) for file in files])

    async def shutdown(self) -> None:
        await asyncio.to_thread(self.llm.shutdown, SHUTDOWN_S)


def sampling_params(request: EngineRequest) -> SamplingParams:
    """vLLM's sampling parameters; `logprobs=0` asks for the sampled token's own, no alternatives."""
    return SamplingParams(
        n=request.n,
        seed=request.seed,
        temperature=0.0 if request.greedy else request.temperature,
        top_p=1.0 if request.greedy else request.top_p,
        max_tokens=request.max_tokens,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@contextmanager
def _failures(what: str) -> Iterator[None]:
    try:
        yield
    except EngineDeadError as error:
        raise NotReadyError("the engine died over its weights") from error
    except Exception as error:  # vLLM reports a failed call by no narrower class
        raise IntegrityError(f"{what}: {error}") from error


def _pixel_hashes(engine_input: Any) -> tuple[str, ...]:
    """Of each image as it is sent to the engine's core, where the vision tower takes it from."""
    return tuple(
        pixel_hash(item["pixel_values"].data.float().numpy().tobytes(), item["image_grid_thw"].data.flatten().tolist())
        for item in engine_input["mm_kwargs"]["image"]
    )


def _completion(output: CompletionOutput) -> EngineCompletion:
    if output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or output.logprobs is None:
        raise NotReadyError(f"the engine ended a completion with {output.finish_reason!r}; ask again")
    spans = tuple(
        VersionSpan(version=parse_version(span.version), start=span.start, end=span.end) for span in output.weight_versions or ()
    )
    return EngineCompletion(
        token_ids=tuple(output.token_ids),
        logprobs=tuple(step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)),
        text=output.text,
        finish_reason=FinishReason(output.finish_reason),
        spans=spans,
    )


def parse_version(label: str) -> PolicyVersion:
    """Inverse of str(PolicyVersion): "3.17" is incarnation 3, step 17."""
    incarnation, step = label.split(".")
    return PolicyVersion(incarnation=int(incarnation), step=int(step))
