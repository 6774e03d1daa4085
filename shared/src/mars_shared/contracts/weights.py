"""A version of the policy's weights, and how it can be reached."""

from __future__ import annotations

from enum import StrEnum
from hashlib import sha256
from typing import Literal, Self

from pydantic import Field, model_validator

from mars_shared.contracts.base import Contract, Message, PolicyVersion


class WeightFile(Contract):
    """One file of a publication, verified by size and hash before any of it is used."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    size_bytes: int = Field(ge=0)
    blake3: str = Field(pattern=r"^[0-9a-f]{64}$")


class WeightsKind(StrEnum):
    """What a publication holds."""

    SNAPSHOT = "snapshot"
    """Every tensor, in safetensors files."""
    DELTA = "delta"
    """What differs from an earlier version, its base."""


class WeightIdentity(Message):
    """Which weights: the same run, version, model and bits are the same weights, however they were reached."""

    run: str
    version: PolicyVersion
    model: str = Field(description="fingerprint of the model configuration that these weights fit")
    dtype: Literal["float32", "bfloat16"]
    checksum: str = Field(pattern=r"^[0-9a-f]{64}$", description="of all tensors: names, dtypes, shapes and bits")

    @property
    def identity(self) -> WeightIdentity:
        """The identity alone, of a manifest too; equal ones are the same weights."""
        return WeightIdentity(**{name: getattr(self, name) for name in WeightIdentity.model_fields})

    @property
    def weights_id(self) -> str:
        """sha256 of the canonical JSON of the identity; tags every cache."""
        return sha256(self.identity.model_dump_json().encode()).hexdigest()


class WeightManifest(WeightIdentity):
    """An immutable publication that leads to a version: a snapshot of it, or a delta from its base."""

    kind: WeightsKind
    base: WeightIdentity | None = Field(default=None, description="of a delta: the weights that it changes")
    invertible: bool = Field(default=False, description="of a delta: it leads back to its base too")
    files: tuple[WeightFile, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _deltas_alone_have_a_base(self) -> Self:
        if (self.kind is WeightsKind.DELTA) != (self.base is not None):
            raise ValueError(f"a {self.kind} has {'no ' if self.base is None else 'a '}base; expected one exactly for a delta")
        if self.base is not None and (self.base.model, self.base.dtype) != (self.model, self.dtype):
            raise ValueError("a delta's base is of another model or dtype")
        if self.base is not None and len(self.files) != 1:
            raise ValueError(f"a delta has {len(self.files)} files; expected one")
        if len({file.name for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        if self.invertible and self.base is None:
            raise ValueError("a snapshot leads back to nothing")
        return self

    @property
    def size_bytes(self) -> int:
        """What it costs to fetch it."""
        return sum(file.size_bytes for file in self.files)

    @property
    def folder_name(self) -> str:
        """Its folder in a weights store, e.g. "1.40-3f9c2a6b1d00e4f7-delta"."""
        return f"{self.version}-{self.weights_id[:16]}-{self.kind}"
