"""One prompt becomes one whole group, made by this replica from one set of weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from PIL import Image

from mars_rollout.admission import tolerates
from mars_rollout.engine.base import Engine, EngineAnswer, EngineRequest
from mars_shared.blobs import BlobStore
from mars_shared.contracts import (
    Completion,
    Decoding,
    Kind,
    PolicyVersion,
    Prompt,
    Purpose,
    RenderedView,
    RolloutGroup,
    Source,
    sampling_seed,
)
from mars_shared.errors import BlobMissingError, InputError, MediaTypeError, NotReadyError
from mars_shared.images import media_type_of, open_image
from mars_shared.settings import DataSection

if TYPE_CHECKING:
    from mars_rollout.render import PromptRenderer, ViewDraft


class GroupMaker:
    """Makes groups: images decoded once, views rendered once, all members sampled concurrently."""

    def __init__(self, engine: Engine, renderer: PromptRenderer, blobs: BlobStore, *, replica: str, data: DataSection) -> None:
        self._engine = engine
        self._renderer = renderer
        self._blobs = blobs
        self._replica = replica
        self._data = data
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="images")

    async def make(self, prompt: Prompt, *, pull_s: float = 0.0) -> RolloutGroup:
        """All completions that the prompt asks for, in canonical order.

        Args:
            pull_s: seconds that were spent on weights for this prompt; goes into the group's timeline.

        Raises:
            InputError: an image or the question is unusable; names prompt and source.
            NotReadyError: the engine is dead, or its weights changed under a group that does not tolerate it.
        """
        started_at, start_s = time.time(), time.perf_counter()
        images = await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, prompt)
        drafts = self._renderer.views(prompt, {name: image.size for name, image in images.items()})
        version, weights_id = self._engine.version, self._engine.weights_id
        answers = await _all_or_none([self._engine.generate(_request(prompt, draft, images)) for draft in drafts])
        completions = tuple(c for draft, answer in zip(drafts, answers, strict=True) for c in _members(prompt, draft, answer))
        _check_versions(prompt, version, completions)
        return RolloutGroup(
            prompt=prompt,
            views=tuple(_view(draft, answer) for draft, answer in zip(drafts, answers, strict=True)),
            completions=completions,
            policy_version=version,
            weights_id=weights_id,
            replica=self._replica,
            started_at=started_at,
            generation_s=time.perf_counter() - start_s,
            pull_s=pull_s,
        )

    def _decode(self, prompt: Prompt) -> dict[str, Image.Image]:
        known = self._data.source_names
        for source in prompt.sources:
            if known is not None and source.name not in known:
                raise InputError(f"prompt {prompt.prompt_id}: unknown source {source.name!r}; expected one of {', '.join(known)}")
        return {source.name: self._decode_source(prompt, source) for source in prompt.sources}

    def _decode_source(self, prompt: Prompt, source: Source) -> Image.Image:
        what = f"prompt {prompt.prompt_id}, source {source.name!r}"
        try:
            data = self._blobs.get(source.blob)
        except BlobMissingError as error:
            raise BlobMissingError(f"{what}: {error}") from error
        actual = media_type_of(data, what=what)
        if actual != source.media_type:
            raise MediaTypeError(f"{what}: declared as {source.media_type}, but its bytes are {actual}")
        return open_image(data, what=what, max_pixels=self._data.max_image_pixels)


async def _all_or_none(requests: Sequence[Coroutine[Any, Any, EngineAnswer]]) -> list[EngineAnswer]:
    """Await all; when one fails, cancel the others and raise its error."""
    tasks = [asyncio.create_task(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _kind(draft: ViewDraft) -> Kind:
    return Kind.MULTI if draft.source is None else Kind.MONO


def _is_greedy(prompt: Prompt, kind: Kind) -> bool:
    spec = prompt.sampling
    return (spec.multi_decoding if kind is Kind.MULTI else spec.mono_decoding) is Decoding.GREEDY


def _first_seed(prompt: Prompt, draft: ViewDraft) -> int | None:
    kind = _kind(draft)
    if _is_greedy(prompt, kind):
        return None
    return sampling_seed(prompt.sampling.seed, prompt.prompt_id, prompt.epoch, kind, draft.source)


def _request(prompt: Prompt, draft: ViewDraft, images: Mapping[str, Image.Image]) -> EngineRequest:
    spec, kind = prompt.sampling, _kind(draft)
    return EngineRequest(
        token_ids=draft.token_ids,
        images=tuple(images[name] for name in draft.images),
        n=spec.num_generations if kind is Kind.MULTI else spec.num_mono,
        seed=_first_seed(prompt, draft),
        temperature=spec.temperature,
        top_p=spec.top_p,
        max_tokens=spec.max_completion_length,
        greedy=_is_greedy(prompt, kind),
        urgent=prompt.purpose is not Purpose.ADHOC,
        hash_pixels=prompt.purpose is Purpose.PROBE,
    )


def _members(prompt: Prompt, draft: ViewDraft, answer: EngineAnswer) -> list[Completion]:
    seed = _first_seed(prompt, draft)
    return [
        Completion(
            group_id=prompt.task_id,
            kind=_kind(draft),
            source=draft.source,
            index=index,
            text=sampled.text,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            finish_reason=sampled.finish_reason,
            seed=None if seed is None else seed + index,
            spans=sampled.spans,
        )
        for index, sampled in enumerate(answer.completions)
    ]


def _check_versions(prompt: Prompt, version: PolicyVersion, completions: Sequence[Completion]) -> None:
    """All tokens of a group that is not ad-hoc are by versions that it tolerates, at max_staleness 0 by `version` alone."""
    if prompt.purpose is Purpose.ADHOC:
        return
    served = {span.version for completion in completions for span in completion.spans}
    if prompt.max_staleness and prompt.policy_version is not None:
        strange = {one for one in served if not tolerates(prompt, one)}
    else:
        strange = served - {version}
    if strange:
        names = [str(one) for one in sorted(strange)]
        raise NotReadyError(f"group {prompt.task_id}: weights changed from {version} to {names} under it")


def _view(draft: ViewDraft, answer: EngineAnswer) -> RenderedView:
    if len(answer.prompt_token_ids) != draft.expanded_length:
        raise NotReadyError(
            f"the engine expanded a prompt to {len(answer.prompt_token_ids)} tokens; expected {draft.expanded_length} "
            "by the model's image processor"
        )
    return RenderedView(
        source=draft.source,
        token_ids=answer.prompt_token_ids,
        images=draft.images,
        frame=draft.frame,
        pixels=answer.pixels,
    )
