"""Versions on their way through the project's own parts, from the publisher to replicas that must hold the very bits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from torch import nn

from mars_rollout.pull import Puller
from mars_rollout.scratch import scratch_folder
from mars_shared.contracts import PolicyVersion, WeightIdentity, WeightManifest
from mars_shared.settings import Recipe
from mars_shared.weights import WeightsStore
from mars_shared.weights.bits.kernels import Bits
from mars_shared.weights.bits.tensor_file import TensorFile
from mars_shared.weights.source import VolumeSource
from mars_trainer.publish import Publisher
from weights.policies import published


class Move(NamedTuple):
    """Which version a replica came to, how, in words, whether it holds its bits, the seconds that took, and its files."""

    weights: WeightIdentity
    how: str
    exact: bool
    seconds: float
    files: Sequence[Path]


class Journey:
    """A weights store, its publisher, and a replica that follows every version.

    Args:
        back: how many versions before the newest a rollback goes to.
    """

    def __init__(self, recipe: Recipe, *, back: int = 2) -> None:
        self.folder = recipe.run.dir
        self._recipe = recipe
        self._store = WeightsStore(recipe.run.dir / "weights")
        self._publisher = Publisher(recipe, self._store)
        self._back = back
        self._stack = ExitStack()
        self._follower = self._replica("follower", self._stack)
        self._recent: list[tuple[WeightManifest, dict[str, Bits]]] = []

    @property
    def bits(self) -> dict[str, Bits]:
        """Of the newest version; not to be written."""
        return self._recent[-1][1]

    def publish(self, model: nn.Module) -> tuple[WeightManifest, float]:
        """Make the model's weights the next version; returns the announced manifest and the seconds that took."""
        step = self._recent[-1][0].version.step + 1 if self._recent else 0
        began = perf_counter()
        manifest = self._publisher.publish(model, PolicyVersion(incarnation=1, step=step))
        seconds = perf_counter() - began
        self._recent = [*self._recent[-self._back :], (manifest, published(model))]
        return manifest, seconds

    def file(self, manifest: WeightManifest) -> bytes:
        """What travels for a publication."""
        (file,) = manifest.files
        return (self._store.folder(manifest) / file.name).read_bytes()

    def follow(self) -> Move:
        """The replica goes to the newest version."""
        return self._bring(self._follower, *self._recent[-1])

    def roll_back(self) -> Move:
        """The replica goes back some versions."""
        return self._bring(self._follower, *self._recent[0])

    def join(self) -> Move:
        """Another replica, which holds nothing, goes to the newest version."""
        with ExitStack() as stack:
            return self._bring(self._replica("joiner", stack), *self._recent[-1])

    def close(self) -> None:
        """Remove the replica's copy."""
        self._stack.close()

    def _replica(self, name: str, stack: ExitStack) -> Puller:
        scratch = stack.enter_context(scratch_folder(self._recipe, name))
        return Puller(VolumeSource(self._store.root), name, scratch, verify="changed")

    def _bring(self, replica: Puller, weights: WeightIdentity, expected: dict[str, Bits]) -> Move:
        async def bring() -> Move:
            began = perf_counter()
            async with replica.at(weights) as arrival:
                seconds = perf_counter() - began
                return Move(weights.identity, arrival.how, _hold(arrival.files, expected), seconds, arrival.files)

        return asyncio.run(bring())


def _hold(files: Sequence[Path], expected: dict[str, Bits]) -> bool:
    """Whether files hold exactly these bits, compared one by one."""
    found: dict[str, Bits] = {}
    for path in files:
        with TensorFile(path) as file:
            found |= {name: tensor.bits for name, tensor in file.tensors.items()}
    return found.keys() == expected.keys() and all((found[name] == bits).all() for name, bits in expected.items())
