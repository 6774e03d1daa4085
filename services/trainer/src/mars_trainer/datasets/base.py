"""What a dataset is: splits of samples that depend on nothing but their place."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mars_shared.contracts import Truth

PAIR = ("visible", "infrared")
"""Source names of a visible + infrared pair, in order."""

Plane = NDArray[np.float64]
"""An image in floating point, [height, width] or [height, width, 3], 0 black to 1 white."""


class Split(StrEnum):
    """Parts of a dataset; no digit and no scene of TEST occurs in another part."""

    TRAIN = "train"
    TEST = "test"
    WARMUP = "warmup"
    """Single sources at every clarity, of the training material: what a warm start imitates."""


class SampleKind(StrEnum):
    """Which source of a pair holds the answer."""

    ONLY_VISIBLE = "only-visible"
    ONLY_INFRARED = "only-infrared"
    BOTH = "both"
    VISIBLE_MISLED = "visible-misled"
    """Visible holds the answer, infrared faintly shows another one."""
    INFRARED_MISLED = "infrared-misled"
    """Infrared holds the answer, visible faintly shows another one."""

    @property
    def thought(self) -> str:
        """A chain of thought that says where the answer is, in the tiny policy's own words."""
        holders = {SampleKind.ONLY_VISIBLE: "visible", SampleKind.VISIBLE_MISLED: "visible", SampleKind.BOTH: "both"}
        return clear(holders.get(self, "infrared"))


def clear(source: str) -> str:
    """A chain of thought that names a source, or "both"; e.g. "visible is clear"."""
    return f"{source} is clear"


@dataclass(frozen=True)
class Sample:
    """A question about named images and its truth.

    Attributes:
        prompt_id: the sample's name, e.g. "digits/test/17".
        images: encoded bytes (PNG, JPEG or WebP) by source name, in source order.
        thought: a chain of thought that leads to the answer, if the dataset has one; for a warm start.
        where: file and row of a sample that stands in a file.
        meta: the degradations that were applied, as plain JSON values.
    """

    prompt_id: str
    question: str
    images: Mapping[str, bytes]
    truth: Truth
    thought: str | None = None
    where: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How errors name the sample."""
        return f"sample {self.prompt_id}" + (f" ({self.where})" if self.where else "")


class LazySplit(Sequence[Sample]):
    """A split whose samples are made when asked for; sample i is always the same."""

    def __init__(self, length: int, make: Callable[[int], Sample]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self._make(position)


class Dataset(Protocol):
    """A named source of samples."""

    name: str

    @property
    def train(self) -> Sequence[Sample]: ...
    @property
    def test(self) -> Sequence[Sample]: ...
    @property
    def warmup(self) -> Sequence[Sample]: ...


def stable_fraction(data: bytes) -> float:
    """A number in [0, 1) that depends on the bytes alone: what splits are decided by."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") / 2**64


def generator(*key: str | int) -> np.random.Generator:
    """A random generator that depends on the key alone, e.g. generator("digits", 0, "train", 17)."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def encode_png(image: Plane) -> bytes:
    """RGB PNG of a plane; values outside 0..1 are clipped, one channel becomes three equal ones."""
    levels = np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
    if levels.ndim == 2:
        levels = np.repeat(levels[..., None], 3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(levels, "RGB").save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
