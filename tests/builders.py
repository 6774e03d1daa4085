"""Small valid prompts, groups and images for tests; every helper takes what its test is about."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image

from mars_shared.contracts import (
    BoxFrame,
    Completion,
    Decoding,
    FinishReason,
    FrameKind,
    Kind,
    PolicyVersion,
    Prompt,
    Purpose,
    RenderedView,
    RolloutGroup,
    SamplingSpec,
    Score,
    ScoredGroup,
    Source,
    TextTruth,
    expected_members,
)

V0 = PolicyVersion(incarnation=1, step=0)
FRAME = BoxFrame(kind=FrameKind.ORIGINAL, width=56, height=56)
SOURCES = ("visible", "infrared")


def image_bytes(size: tuple[int, int] = (8, 6), *, format: str = "PNG", color: tuple[int, int, int] = (200, 10, 30)) -> bytes:
    """A whole image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format)
    return buffer.getvalue()


def sampling(num_generations: int = 2, num_mono: int = 1, *, greedy: bool = False) -> SamplingSpec:
    decoding = Decoding.GREEDY if greedy else Decoding.SAMPLE
    return SamplingSpec(
        num_generations=num_generations,
        num_mono=num_mono,
        mono_decoding=decoding,
        multi_decoding=decoding,
        temperature=1.0,
        top_p=1.0,
        max_completion_length=8,
        seed=0,
    )


def make_prompt(
    index: int = 0,
    *,
    run: str = "test",
    purpose: Purpose = Purpose.TRAIN,
    sources: Sequence[str] = SOURCES,
    spec: SamplingSpec | None = None,
    version: PolicyVersion = V0,
) -> Prompt:
    """A prompt with dispatch index `index` and task id "train-00000000"."""
    return Prompt(
        task_id=f"{purpose.value}-{index:08d}",
        prompt_id=f"sample-{index}",
        run=run,
        purpose=purpose,
        epoch=0,
        dispatch_index=index,
        question="Which digit?",
        sources=tuple(Source(name=name, blob="0" * 64, media_type="image/png") for name in sources),
        truth=TextTruth(text="7"),
        box_frame=FrameKind.ORIGINAL,
        sampling=spec or sampling(),
        policy_version=version,
    )


def make_completion(
    group_id: str,
    kind: Kind,
    source: str | None,
    index: int,
    *,
    tokens: int = 3,
    finish_reason: FinishReason = FinishReason.STOP,
) -> Completion:
    return Completion(
        group_id=group_id,
        kind=kind,
        source=source,
        index=index,
        text="7",
        token_ids=tuple(range(tokens)),
        logprobs=(-0.5,) * tokens,
        finish_reason=finish_reason,
        seed=index,
    )


def make_views(prompt: Prompt) -> tuple[RenderedView, ...]:
    names = [source.name for source in prompt.sources]
    views = [RenderedView(source=None, token_ids=(1, 2), images=tuple(names), frame=FRAME)]
    if prompt.sampling.num_mono:
        views += [RenderedView(source=name, token_ids=(1,), images=(name,), frame=FRAME) for name in names]
    return tuple(views)


def make_group(prompt: Prompt, completions: Sequence[Completion] | None = None) -> RolloutGroup:
    """The whole group that `prompt` asks for."""
    members = [make_completion(prompt.task_id, *member) for member in expected_members(prompt)]
    return RolloutGroup(
        prompt=prompt,
        views=make_views(prompt),
        completions=tuple(members if completions is None else completions),
        policy_version=prompt.policy_version or V0,
        weights_id="f" * 64,
        replica="replica-0",
        started_at=100.0,
        generation_s=2.0,
    )


def make_score(reward: float, *, accuracy: float | None = None, parsed: bool = True) -> Score:
    """A score; its parts are accuracy (the reward itself if not given) and what is left as format."""
    right = reward if accuracy is None else accuracy
    return Score(reward=reward, parts={"accuracy": right, "format": reward - right}, parsed=parsed)


def make_scored(group: RolloutGroup, scores: Sequence[Score]) -> ScoredGroup:
    return ScoredGroup(group=group, scores=tuple(scores), recipe="paper", scoring_started_at=102.0, reward_s=0.5)


def scored_with(multi: Sequence[float], mono: Mapping[str, Sequence[float]] | None = None, *, index: int = 0) -> ScoredGroup:
    """A scored group with these rewards; `mono` by source, the same number for each.

    Example:
        scored_with((1, 0), {"visible": (1,), "infrared": (0,)}) has G = 2, K = 2, M = 1.
    """
    mono = mono or {}
    num_mono = len(next(iter(mono.values()), ()))
    prompt = make_prompt(index, sources=tuple(mono) or SOURCES, spec=sampling(len(multi), num_mono))
    rewards = [*multi, *(reward for rewards in mono.values() for reward in rewards)]
    return make_scored(make_group(prompt), [make_score(reward) for reward in rewards])
