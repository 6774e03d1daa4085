"""vLLM behind the `Engine` seam: requests, answers, weight updates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from mars_rollout.engine.base import BASE_VERSION, BASE_WEIGHTS_ID, EngineAnswer, EngineCompletion, EngineRequest
from mars_rollout.engine.child import run_engine_core
from mars_rollout.engine.llm import ADHOC, OWN_PREFIX, URGENT, PolicyLLM, engine_args
from mars_shared.contracts import FinishReason, PolicyVersion, VersionSpan, WeightIdentity
from mars_shared.errors import InputError, IntegrityError, NotReadyError
from mars_shared.images import pixel_hash
from mars_shared.settings import Recipe

SHUTDOWN_S = 2.0
"""How long the engine's processes may take to end before they are killed; they hold nothing durable."""


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
        request_id = f"{OWN_PREFIX}{next(self._ids)}"
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
            priority=URGENT if request.urgent else ADHOC,
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
