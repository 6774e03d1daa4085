"""A whole group: every completion of one prompt, multi-source and mono-source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from hashlib import blake2b

from pydantic import Field, model_validator

from mars_shared.contracts.base import Contract, Message, PolicyVersion
from mars_shared.contracts.prompt import FrameKind, Prompt


class Kind(StrEnum):
    """Whether a completion saw all sources or one."""

    MULTI = "multi"
    MONO = "mono"


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"


class BoxFrame(Contract):
    """The extents of the coordinates in which a view's completions write boxes.

    A box converts to original pixels by x * truth.width_px / frame.width (y alike).
    """

    kind: FrameKind
    width: float = Field(gt=0)
    height: float = Field(gt=0)


class RenderedView(Contract):
    """A prompt as the model saw it: `source` None is the multi-source view.

    `token_ids` are expanded (one placeholder token per merged image patch), ready for the
    trainer: nobody tokenises again.
    """

    source: str | None
    token_ids: tuple[int, ...] = Field(min_length=1)
    images: tuple[str, ...] = Field(description="source names in placeholder order")
    frame: BoxFrame
    pixels: tuple[str, ...] | None = Field(
        default=None, description="probes alone: `pixel_hash` of what the vision tower gets, image by image"
    )


class VersionSpan(Contract):
    """Tokens [start, end) of a completion were sampled by this policy version."""

    version: PolicyVersion
    start: int = Field(ge=0)
    end: int = Field(ge=0)


class Completion(Contract):
    """One sampled answer. `logprobs` are of the sampling policy (after temperature and top_p)."""

    group_id: str
    kind: Kind
    source: str | None = Field(description="None for multi-source completions")
    index: int = Field(ge=0, description="among its siblings of the same kind and source")
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int | None = Field(description="None for greedy decoding")
    spans: tuple[VersionSpan, ...] = ()

    @model_validator(mode="after")
    def _lengths_agree(self) -> Completion:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs; expected one each")
        if (self.kind is Kind.MULTI) != (self.source is None):
            raise ValueError(f"kind is {self.kind} with source {self.source!r}; only multi-source completions have none")
        return self

    @model_validator(mode="after")
    def _spans_tile_the_tokens(self) -> Completion:
        ends = [0, *(span.end for span in self.spans)]
        starts = [*(span.start for span in self.spans), len(self.token_ids)]
        if self.spans and (ends != starts or any(span.start > span.end for span in self.spans)):
            ranges = [(span.start, span.end) for span in self.spans]
            raise ValueError(f"version spans are {ranges}; expected them to tile {len(self.token_ids)} token_ids without a gap")
        return self


Member = tuple[Kind, str | None, int]


def expected_members(prompt: Prompt) -> Iterator[Member]:
    """The (kind, source, index) of every completion a prompt asks for, in canonical order."""
    for index in range(prompt.sampling.num_generations):
        yield Kind.MULTI, None, index
    for source in prompt.sources:
        for index in range(prompt.sampling.num_mono):
            yield Kind.MONO, source.name, index


class RolloutGroup(Message):
    """One prompt answered by ONE replica; completions stand in `expected_members` order.

    Mixed-up members are impossible by construction: every completion carries its group id,
    kind and source, and the order is checked.
    """

    prompt: Prompt
    views: tuple[RenderedView, ...] = Field(description="the multi-source view, then one per source if M > 0")
    completions: tuple[Completion, ...]
    policy_version: PolicyVersion
    weights_id: str = Field(description="hash of the manifest of the weights that answered")
    replica: str
    started_at: float = Field(ge=0, description="unix time when generation began; for the timeline alone")
    generation_s: float = Field(ge=0, description="wall seconds that the group took to make")
    pull_s: float = Field(default=0.0, ge=0, description="seconds before `started_at` spent on pulling weights for it")

    @property
    def group_id(self) -> str:
        return self.prompt.task_id

    def view_of(self, source: str | None) -> RenderedView:
        """The rendered view of a source (None: multi-source); KeyError if there is none."""
        for view in self.views:
            if view.source == source:
                return view
        raise KeyError(source)

    @model_validator(mode="after")
    def _members_are_whole(self) -> RolloutGroup:
        foreign = {c.group_id for c in self.completions} - {self.group_id}
        if foreign:
            raise ValueError(f"group {self.group_id} holds completions of {sorted(foreign)}")
        expected = list(expected_members(self.prompt))
        actual: list[Member] = [(c.kind, c.source, c.index) for c in self.completions]
        if actual != expected:
            missing, extra = Counter(expected) - Counter(actual), Counter(actual) - Counter(expected)
            raise ValueError(
                f"group {self.group_id}: completions differ from what the prompt asks for; "
                f"missing {sorted(map(str, missing))}, extra {sorted(map(str, extra))} (or out of order)"
            )
        wanted = {None} | ({s.name for s in self.prompt.sources} if self.prompt.sampling.num_mono else set())
        if {view.source for view in self.views} != wanted or len(self.views) != len(wanted):
            raise ValueError(
                f"group {self.group_id}: views are {[v.source for v in self.views]}, expected {sorted(map(str, wanted))}"
            )
        return self


def sampling_seed(run_seed: int, prompt_id: str, epoch: int, kind: Kind, source: str | None) -> int:
    """Seed of the first completion of a kind and source; sample i uses this + i (vLLM's rule for n > 1).

    Returns:
        an integer in [0, 2**31), equal on every machine.
    """
    text = "\x1f".join((str(run_seed), prompt_id, str(epoch), kind.value, source or ""))
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
