"""What every message has in common."""

from __future__ import annotations

from functools import total_ordering
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Literal[1] = 1


class Contract(BaseModel):
    """A frozen value; unknown fields are refused, NaN and infinity too."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Message(Contract):
    """A contract that travels through a stream or is kept on disk by itself."""

    schema_version: Literal[1] = SCHEMA_VERSION


@total_ordering
class PolicyVersion(Contract):
    """Which policy: the trainer's incarnation (one per trainer start) and its step.

    Ordered by incarnation, then step: `PolicyVersion(incarnation=2, step=0)` comes after
    every version of incarnation 1.
    """

    incarnation: int = Field(ge=0)
    step: int = Field(ge=0)

    def __lt__(self, other: PolicyVersion) -> bool:
        return (self.incarnation, self.step) < (other.incarnation, other.step)

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.step}"
