"""A version of the policy's weights."""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

from pydantic import Field

from mars_shared.contracts.base import Contract, Message, PolicyVersion


class WeightFile(Contract):
    """One file of a snapshot, verified by size and hash before any of it is used."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    size_bytes: int = Field(ge=0)
    blake3: str = Field(pattern=r"^[0-9a-f]{64}$")


class WeightManifest(Message):
    """An immutable snapshot; `weights_id` is its identity and tags every cache."""

    run: str
    version: PolicyVersion
    model: str = Field(description="fingerprint of the model configuration that these weights fit")
    dtype: Literal["float32", "bfloat16"]
    files: tuple[WeightFile, ...] = Field(min_length=1)

    @property
    def weights_id(self) -> str:
        """sha256 of the canonical JSON: the same content always has the same id."""
        return sha256(self.model_dump_json().encode()).hexdigest()
