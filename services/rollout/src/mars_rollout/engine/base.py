"""What the rollout service needs of an inference engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from mars_shared.contracts import FinishReason, PolicyVersion, VersionSpan, WeightIdentity

BASE_VERSION = PolicyVersion(incarnation=0, step=0)
BASE_WEIGHTS_ID = "base"
"""Names the weights of the model folder, which serve until a version is published."""


@dataclass(frozen=True)
class EngineRequest:
    """One prompt and how often and how to answer it.

    Attributes:
        token_ids: the prompt with ONE placeholder token per image; the engine expands them.
        images: pixels in placeholder order.
        n: completions; sample i uses seed + i.
        seed: None exactly if `greedy`.
        urgent: training and evaluation groups go before ad-hoc requests.
        hash_pixels: the answer shall have the `pixels` of its images.
    """

    token_ids: tuple[int, ...]
    images: tuple[Image.Image, ...]
    n: int
    seed: int | None
    temperature: float
    top_p: float
    max_tokens: int
    greedy: bool = False
    urgent: bool = True
    hash_pixels: bool = False


@dataclass(frozen=True)
class EngineCompletion:
    """One sampled answer; `logprobs` are of the sampled tokens under the sampling policy."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    spans: tuple[VersionSpan, ...]


@dataclass(frozen=True)
class EngineAnswer:
    """Completions in sample order, and the prompt as the model saw it (placeholders expanded).

    `pixels`, where asked for: `pixel_hash` of every image as the engine's own preprocessing made it.
    """

    prompt_token_ids: tuple[int, ...]
    completions: tuple[EngineCompletion, ...]
    pixels: tuple[str, ...] | None = None


class Engine(Protocol):
    """Generates, and changes its weights in place between two forward passes."""

    @property
    def version(self) -> PolicyVersion:
        """The version whose weights answer a request that is sent from here on."""

    @property
    def weights_id(self) -> str:
        """Identity of those weights."""

    @property
    def alive(self) -> bool:
        """False once the engine can never answer again."""

    async def generate(self, request: EngineRequest) -> EngineAnswer:
        """Answer one request; it goes on over a weight change, which `spans` then show.

        Raises:
            NotReadyError: the engine is dead or dropped the request.
        """

    async def update(self, weights: WeightIdentity, files: Sequence[Path]) -> dict[str, float]:
        """Take all tensors from verified safetensors files, in place and in one step; returns seconds by stage.

        Raises:
            IntegrityError: the tensors don't fit the model; it serves what it served before.
            NotReadyError: the engine is dead, maybe of this update.
        """

    async def compare(self, files: Sequence[Path]) -> None:
        """Compare the weights that answer with safetensors files, bit by bit.

        Raises:
            IntegrityError: which tensors differ.
            NotReadyError: the engine is dead.
        """

    async def shutdown(self) -> None:
        """End the engine and every process of it."""
