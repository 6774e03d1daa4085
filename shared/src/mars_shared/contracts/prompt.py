"""A question about named image sources, with its ground truth and how to sample it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mars_shared.contracts.base import Contract, Message, PolicyVersion

BlobHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="blake3 of the original encoded bytes")]
SOURCE_NAME = r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}$"
SourceName = Annotated[str, Field(pattern=SOURCE_NAME)]
Box = tuple[float, float, float, float]


class View(StrEnum):
    """What a mono-source rollout sees (method.md's table of paper and released code)."""

    SINGLE = "single"
    """Only that source's placeholder and name: the paper."""
    REPEAT = "repeat"
    """The prompt keeps its K placeholders, each shows the one image: the released code."""


class Decoding(StrEnum):
    """How mono-source completions are decoded."""

    SAMPLE = "sample"
    GREEDY = "greedy"


class Purpose(StrEnum):
    """Why a group is made; only TRAIN groups ever reach the loss."""

    TRAIN = "train"
    EVAL = "eval"
    ADHOC = "adhoc"
    PROBE = "probe"
    """The self-test at a run's start: views carry hashes of their pixels."""


class FrameKind(StrEnum):
    """The coordinate frame in which a model family writes its boxes."""

    ORIGINAL = "original"
    """Pixels of the image file."""
    RESIZED = "resized"
    """Pixels after the processor's smart resize (Qwen2.5-VL)."""
    PER_MILLE = "per_mille"
    """0..1000 along each side (Qwen2-VL, Qwen3-VL)."""


class Source(Contract):
    """One named image, by the hash of its bytes; the bytes are in the blob store."""

    name: SourceName
    blob: BlobHash
    media_type: Literal["image/png", "image/jpeg", "image/webp"]


class BoxesTruth(Contract):
    """Ground truth of grounding: boxes (x1, y1, x2, y2) in original pixels.

    Example:
        BoxesTruth(boxes=((10, 20, 40, 80),), width_px=112, height_px=112)
    """

    kind: Literal["boxes"] = "boxes"
    boxes: tuple[Box, ...] = Field(min_length=1)
    width_px: int = Field(gt=0, description="width of the original image that the boxes refer to")
    height_px: int = Field(gt=0)

    @model_validator(mode="after")
    def _boxes_are_ordered(self) -> BoxesTruth:
        for index, (x1, y1, x2, y2) in enumerate(self.boxes):
            if not (x1 < x2 and y1 < y2):
                raise ValueError(f"box {index} is ({x1}, {y1}, {x2}, {y2}); expected x1 < x2 and y1 < y2")
        return self


class TextTruth(Contract):
    """Ground truth of visual question answering: the right answer as text."""

    kind: Literal["text"] = "text"
    text: str = Field(min_length=1)


Truth = Annotated[BoxesTruth | TextTruth, Field(discriminator="kind")]


class SamplingSpec(Contract):
    """How a group is sampled: G multi-source and M mono-source completions a source."""

    num_generations: int = Field(ge=1, le=1024, description="G, multi-source completions")
    num_mono: int = Field(ge=0, le=256, description="M, mono-source completions of each source")
    mono_view: View = View.SINGLE
    mono_decoding: Decoding = Decoding.SAMPLE
    multi_decoding: Decoding = Decoding.SAMPLE
    temperature: float = Field(gt=0, le=10)
    top_p: float = Field(gt=0, le=1)
    max_completion_length: int = Field(ge=1, description="tokens")
    seed: int = Field(ge=0, description="the run's seed; completions derive theirs from it")

    @model_validator(mode="after")
    def _greedy_is_one(self) -> SamplingSpec:
        if self.mono_decoding is Decoding.GREEDY and self.num_mono > 1:
            raise ValueError(f"num_mono is {self.num_mono} with greedy mono decoding; expected 0 or 1 (all would be equal)")
        if self.multi_decoding is Decoding.GREEDY and self.num_generations > 1:
            raise ValueError(f"num_generations is {self.num_generations} with greedy decoding; expected 1 (all would be equal)")
        return self


class Prompt(Message):
    """One prompt to be answered by one whole group.

    `task_id` names the piece of work and, like the seeds, doesn't contain the incarnation:
    a group issued again after a crash is the same group.
    """

    task_id: str = Field(min_length=1)
    prompt_id: str = Field(min_length=1, description="the dataset's name of the sample")
    run: str = Field(min_length=1)
    purpose: Purpose
    epoch: int = Field(ge=0)
    dispatch_index: int = Field(ge=0)
    question: str = Field(min_length=1)
    sources: tuple[Source, ...] = Field(min_length=1, max_length=64)
    truth: Truth | None = None
    box_frame: FrameKind
    sampling: SamplingSpec
    policy_version: PolicyVersion | None = Field(
        default=None, description="the version to answer with; None: whatever the replica serves (ad-hoc)"
    )
    max_staleness: int = Field(default=0, ge=0, description="steps by which the answering versions may be newer than that")

    @model_validator(mode="after")
    def _sources_have_different_names(self) -> Prompt:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names are {names}; expected each name once")
        return self
