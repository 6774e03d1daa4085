"""A replica process that joins late, lags behind, or is of a dead incarnation, over HTTP from a trainer's app with a key."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from pydantic import SecretStr

from mars_shared.contracts import WeightManifest, WeightsKind
from mars_shared.http import HttpServer, bind
from mars_shared.settings import Deployment, load_recipe
from mars_shared.weights import WeightsStore
from mars_trainer.app import build_app
from mars_trainer.model import Policy as TrainerPolicy
from mars_trainer.progress import Progress
from rollout_fixtures import RUN, ReplicaProcess, RunFolder, make_run_folder
from weight_line import TrainerSide, make_trainer_side, only_first_layer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
KEY = "a-key-of-some-length"
JOINED, AT_START = 40, 43
"""A snapshot is due at every tenth version, the last at 40 (deltas are small); three deltas follow it when the replica starts."""


@dataclass
class Crowd:
    """A trainer that serves its store, and one replica."""

    trainer: TrainerSide
    replica: ReplicaProcess
    client: httpx.AsyncClient

    def publish(self, seed: int) -> WeightManifest:
        self.trainer.change(seed, only_first_layer)
        return self.trainer.publish()

    async def version(self) -> dict[str, Any]:
        response = await self.client.get("/v1/version")
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def until_served(self, manifest: WeightManifest) -> str:
        """Returns how it was reached."""
        while (served := await self.version())["weights_id"] != manifest.weights_id:
            assert self.replica.process.poll() is None, self.replica.log
            await asyncio.sleep(0.05)
        response = await self.client.post("/v1/version/verify", timeout=60)
        assert (response.status_code, response.json().get("weights")) == (200, "equal"), response.text
        return str(served["reached_by"])

    async def fetched_bytes(self) -> dict[str, float]:
        text = (await self.client.get("/metrics")).text
        found = re.findall(r'^mars_rollout_weight_fetched_bytes_total\{kind="(\w+)"\} (\S+)$', text, re.MULTILINE)
        return {kind: float(size) for kind, size in found}


def size_bytes(store: WeightsStore, kind: WeightsKind, steps: range) -> int:
    return sum(m.size_bytes for m in store.manifests() if m.kind is kind and m.version.step in steps)


@pytest.fixture(scope="module")
def place(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run_folder(tmp_path_factory.mktemp("crowd"), model_dir)


@pytest_asyncio.fixture(loop_scope="session")
async def crowd(place: RunFolder, trainer_policy: TrainerPolicy, redis_url: str) -> AsyncIterator[Crowd]:
    trainer = make_trainer_side(place.recipe, WeightsStore(place.dir / "weights"), trainer_policy)
    for seed in range(AT_START + 1):
        trainer.change(seed, only_first_layer)
        trainer.publish()
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    progress = Progress(run=RUN, steps=1, version=trainer.version)
    server = HttpServer(build_app(Deployment(api_key=SecretStr(KEY)), progress, trainer.store), listener)
    await server.start()
    with place.recipe_path.open("a") as recipe:
        recipe.write(f'[weights]\nurl = "http://127.0.0.1:{port}"\n')
    replica = ReplicaProcess(
        RunFolder(place.dir, place.recipe_path, load_recipe(place.recipe_path), place.blobs),
        {"MARS_REDIS_URL": redis_url, "MARS_API_KEY": KEY},
    )
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        async with httpx.AsyncClient(base_url=replica.url, headers=headers, trust_env=False, timeout=60) as client:
            yield Crowd(trainer, replica, client)
    finally:
        await asyncio.to_thread(replica.end)
        await server.stop()


async def test_a_late_joiner_a_laggard_and_a_replica_of_a_dead_incarnation_come_by_the_fewest_bytes(crowd: Crowd) -> None:
    store, trainer = crowd.trainer.store, crowd.trainer
    ready = asyncio.create_task(asyncio.to_thread(crowd.replica.wait_ready))
    for seed in range(AT_START + 1, AT_START + 4):
        await asyncio.wait({ready}, timeout=3)
        head = crowd.publish(seed)
    await ready
    first = await crowd.version()
    assert int(first["version"].removeprefix("1.")) >= JOINED
    assert re.fullmatch(r"snapshot 1\.40, then [3-6] deltas to 1\.4\d \(.*\)|1 delta to 1\.4\d \(.*\)", first["reached_by"])
    await crowd.until_served(head)
    last = head.version.step
    assert last - JOINED <= 9
    assert await crowd.fetched_bytes() == {
        "snapshot": size_bytes(store, WeightsKind.SNAPSHOT, range(JOINED, JOINED + 1)),
        "delta": size_bytes(store, WeightsKind.DELTA, range(JOINED + 1, last + 1)),
    }

    process = psutil.Process(crowd.replica.process.pid)
    process.suspend()
    for seed in range(last + 1, last + 6):
        head = crowd.publish(seed)
    process.resume()
    assert (await crowd.until_served(head)).startswith(f"5 deltas to {head.version} (")
    assert (await crowd.fetched_bytes())["snapshot"] == size_bytes(store, WeightsKind.SNAPSHOT, range(JOINED, JOINED + 1))

    kept = trainer.state()
    for seed in (100, 101):
        head = crowd.publish(seed)
        await crowd.until_served(head)
    trainer.restart(head.version.step - 2, kept)
    again = trainer.publish()
    fork = f"1.{again.version.step}"
    assert (await crowd.until_served(again)).startswith(f"2 deltas undone to {fork}, the same weights as {again.version} (")
    assert await crowd.version() | {"reached_by": ""} == {
        "replica": "replica-0",
        "version": str(again.version),
        "weights_id": again.weights_id,
        "reached_by": "",
    }
    assert (await crowd.until_served(crowd.publish(200))).startswith("1 delta to ")
