"""What a run looked like at a moment: the `state` event, from which page, `mars watch` and metrics tell of replicas and queues."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mars_shared.contracts.base import Contract

ServiceKind = Literal["rollout", "reward"]


class QueueState(Contract):
    """One stream. Scored groups stay in theirs, claimed by the trainer, until a checkpoint contains them."""

    entries: int = Field(ge=0, description="waiting and claimed ones together")
    claimed: int = Field(ge=0, description="in the hands of a consumer")
    oldest_s: float = Field(ge=0, description="age of the oldest entry; 0 if there is none")


class ServiceState(Contract):
    """One replica or reward worker, as it said itself when it was last heard of."""

    service: ServiceKind
    name: str
    seen_s: float = Field(ge=0, description="since its last heartbeat, by Redis's clock")
    started: float = Field(description="unix time at which its process began")
    starts: int = Field(ge=1, description="how often a process of this name began")
    in_hand: int = Field(ge=0, description="groups that it works on")
    version: str | None = Field(default=None, description='of the policy that a replica serves, e.g. "1.7"; None: none yet')
    lag: int | None = Field(default=None, description="steps by which that is behind the announced one")
    software: dict[str, str] = Field(default_factory=dict, description='versions of what it runs on, e.g. {"vllm": "0.32.0"}')


class RunState(Contract):
    """A run at a moment."""

    state: str = Field(description="what the trainer does, e.g. collecting")
    step: int
    steps: int
    version: str
    redis: bool = Field(description="whether Redis answered; if not, queues and services are empty")
    queues: dict[str, QueueState] = Field(
        default_factory=dict, description="by the last parts of their names: prompts, rollouts, scored:train, retries, dead"
    )
    services: tuple[ServiceState, ...] = ()
