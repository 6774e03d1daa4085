"""The whole way of the weights, for tests: a trainer's model, publisher and store, a replica's puller, policy and engine."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY
from torch import nn

from mars_rollout.policy import Policy
from mars_shared.contracts import PolicyVersion, RolloutGroup, WeightManifest
from mars_shared.settings import Recipe
from mars_shared.weights import WeightsStore
from mars_trainer.model import Policy as TrainerPolicy
from mars_trainer.publish import Publisher
from rollout_fixtures import is_vision, policy_at


@dataclass
class TrainerSide:
    """A model whose versions are published as a trainer publishes them."""

    recipe: Recipe
    store: WeightsStore
    trainer: TrainerPolicy
    publisher: Publisher
    version: PolicyVersion
    """Of the next publication."""
    head: WeightManifest | None = None
    """The last publication."""

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    def publish(self) -> WeightManifest:
        self.head = self.publisher.publish(self.model, self.version)
        self.version = PolicyVersion(incarnation=self.version.incarnation, step=self.version.step + 1)
        return self.head

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def restart(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """As a trainer does that goes on from a checkpoint: those weights, a new incarnation, nothing remembered."""
        self.model.load_state_dict(weights)
        self.publisher = Publisher(self.recipe, self.store)
        self.version = PolicyVersion(incarnation=self.version.incarnation + 1, step=step)

    def change(self, seed: int, part: Callable[[str], bool] = lambda name: True) -> None:
        """Every tenth value of some tensors, visibly."""
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if part(name):
                    mask = torch.rand(parameter.shape, generator=noise) < 0.1
                    parameter.add_(mask * 0.1 * torch.randn(parameter.shape, generator=noise))


@dataclass
class Line(TrainerSide):
    """A run of its own that the session's engine follows; it begins with an incarnation that the engine has not seen."""

    policy: Policy = field(kw_only=True)

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        following = asyncio.create_task(self.policy.follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.wait({following})

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)

    async def until_served(self, manifest: WeightManifest, engine: Any) -> None:
        await self.until(lambda: engine.weights_id == manifest.weights_id)


def make_trainer_side(recipe: Recipe, store: WeightsStore, trainer: TrainerPolicy, *, incarnation: int = 1) -> TrainerSide:
    own = replace(trainer, model=copy.deepcopy(trainer.model))
    return TrainerSide(recipe, store, own, Publisher(recipe, store), PolicyVersion(incarnation=incarnation, step=0))


def make_line(folder: Path, engine: Any, recipe: Recipe, trainer: TrainerPolicy, *, in_flight: str = "drain") -> Line:
    store = WeightsStore(folder / "weights")
    side = make_trainer_side(recipe, store, trainer, incarnation=engine.version.incarnation + 1)
    policy = policy_at(engine, store, recipe.model.path, folder / "scratch", in_flight=in_flight)
    return Line(side.recipe, side.store, side.trainer, side.publisher, side.version, policy=policy)


def only_embedding(name: str) -> bool:
    return "embed_tokens" in name


def only_first_layer(name: str) -> bool:
    """Of the language model."""
    return "layers.0." in name and not is_vision(name)


def said(group: RolloutGroup) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(completion.token_ids, completion.logprobs) for completion in group.completions]


def refused(reason: str) -> float:
    return REGISTRY.get_sample_value("mars_rollout_weights_refused_total", {"reason": reason}) or 0.0


def fetched_bytes(kind: str) -> float:
    return REGISTRY.get_sample_value("mars_rollout_weight_fetched_bytes_total", {"kind": kind}) or 0.0
