"""What a replica does about versions that it refuses, and about publications that are not good; a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mars_rollout import policy as policy_module
from mars_rollout.policy import Policy
from mars_shared.contracts import PolicyVersion, Prompt, WeightIdentity, WeightManifest
from mars_shared.errors import IntegrityError, NotReadyError
from mars_shared.weights import WeightsStore
from rollout_doubles import ScriptedEngine
from rollout_fixtures import RunFolder, make_prompt, policy_at, publish

MISFIT = 2
"""The step whose tensors the engine refuses."""


class Picky(ScriptedEngine):
    async def update(self, weights: WeightIdentity, files: Sequence[Path]) -> dict[str, float]:
        if weights.version.step == MISFIT:
            raise IntegrityError(f"weights {weights.version} cannot be applied: a tensor does not fit")
        return await super().update(weights, files)


@dataclass
class Bench:
    store: WeightsStore
    engine: Picky
    policy: Policy
    place: RunFolder

    def publish(self, step: int) -> WeightManifest:
        tensors = {"weight": torch.full((1,), float(step))}
        return publish(self.store, tensors, PolicyVersion(incarnation=1, step=step), self.place.recipe.model.path)

    def prompt(self, step: int, staleness: int = 0) -> Prompt:
        version = PolicyVersion(incarnation=1, step=step)
        return make_prompt(self.place.blobs, policy_version=version, max_staleness=staleness)

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        following = asyncio.create_task(self.policy.follow())
        yield
        following.cancel()


@pytest.fixture
def bench(tmp_path: Path, model_dir: Path, run_folder: RunFolder) -> Bench:
    engine, store = Picky(), WeightsStore(tmp_path / "weights")
    return Bench(store, engine, policy_at(engine, store, model_dir, tmp_path / "scratch"), run_folder)


async def served_at(bench: Bench, prompt: Prompt) -> int:
    async with bench.policy.hold(prompt):
        return bench.engine.version.step


async def test_a_prompt_for_a_refused_version_waits_for_the_next_and_keeps_no_other_waiting(bench: Bench) -> None:
    bench.publish(1)
    assert await served_at(bench, bench.prompt(1)) == 1
    bench.publish(MISFIT)
    waiting = asyncio.create_task(served_at(bench, bench.prompt(MISFIT, staleness=1)))
    while bench.policy.damage is None:
        await asyncio.sleep(0.01)
    assert await served_at(bench, bench.prompt(1)) == 1
    assert not waiting.done()
    bench.publish(3)
    assert await waiting == 3
    assert bench.engine.updates == [PolicyVersion(incarnation=1, step=step) for step in (1, 3)]


async def test_a_prompt_for_a_refused_version_is_given_up_with_the_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "ANNOUNCEMENT_S", 0.3)
    bench.publish(1)
    assert await served_at(bench, bench.prompt(1)) == 1
    bench.publish(MISFIT)
    with pytest.raises(NotReadyError, match=r"version 1\.2 was not announced, or cannot be served.*a tensor does not fit"):
        await served_at(bench, bench.prompt(MISFIT))


async def test_prompts_for_what_is_served_go_on_while_the_announced_version_is_damaged(bench: Bench) -> None:
    bench.publish(1)
    async with bench.followed():
        assert await served_at(bench, bench.prompt(1)) == 1
        file = bench.store.folder(bench.publish(3)) / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(b"rubbish")
        while not bench.store.needs_snapshot():
            await asyncio.sleep(0.01)
        assert await served_at(bench, bench.prompt(1)) == 1
        file.write_bytes(whole)
        assert await served_at(bench, bench.prompt(3)) == 3
