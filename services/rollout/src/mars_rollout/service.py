"""A replica's life: HTTP first, then the engine, then the current weights, then work, until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from mars_rollout.adhoc import AdhocPrompts, RewardClient
from mars_rollout.app import Stage, build_app, mount_openai
from mars_rollout.engine.base import BASE_VERSION, Engine
from mars_rollout.group import GroupMaker
from mars_rollout.policy import Policy
from mars_rollout.pull import Puller
from mars_rollout.scratch import scratch_folder
from mars_rollout.worker import RolloutWorker
from mars_shared.blobs import BlobStore
from mars_shared.errors import NotReadyError
from mars_shared.http import HttpServer
from mars_shared.logs import configure_logging
from mars_shared.queue import Queue, Streams
from mars_shared.registry import Heartbeat, Registry, keep_announced, software
from mars_shared.settings import Deployment, Recipe
from mars_shared.weights.bits.warm_up import compile_codec
from mars_shared.weights.source import open_source

if TYPE_CHECKING:
    from mars_rollout.render import PromptRenderer

logger = logging.getLogger(__name__)

WATCH_S = 0.5
SWEEP_S = 300.0
FINISH_S = 10.0
"""How long groups in hand may take to finish after a stop; then they are handed back."""

LAST_WORDS_S = 20.0
"""How long a replica whose engine died may take to hand back its groups and end."""


class Replica:
    """One replica of one run."""

    def __init__(self, recipe: Recipe, deployment: Deployment, queue: Queue, registry: Registry, *, name: str) -> None:
        self._recipe = recipe
        self._deployment = deployment
        self._queue = queue
        self._registry = registry
        self._name = name
        self._began = time.time()
        self._worker: RolloutWorker | None = None
        self._software = software()
        self._blobs = BlobStore(recipe.run.dir / "blobs")
        self._source = open_source(recipe.weights.url, recipe.run.dir / "weights", deployment.api_key)
        self._rewards = RewardClient(deployment)
        self._stage = Stage(name, AdhocPrompts(recipe, self._blobs), self._rewards)
        self._problem: str | None = "the engine is starting"

    async def run(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serve and work until `stop` is set.

        Raises:
            NotReadyError: the engine died.
            IntegrityError: the announced weights cannot be applied.
        """
        app = build_app(self._deployment, self._stage, ready=lambda: self._problem)
        server = HttpServer(app, listener)
        await server.start()
        announcing = asyncio.create_task(keep_announced(self._registry, self._heartbeat))
        try:
            await self._start_and_work(app, stop)
        finally:
            announcing.cancel()
            await asyncio.wait({announcing})
            await server.stop()
            await self._rewards.close()
            await self._source.aclose()

    async def _start_and_work(self, app: FastAPI, stop: asyncio.Event) -> None:
        engine, openai_app, maker = await self._start_engine(stop)
        try:
            mount_openai(app, openai_app)
            self._stage.engine, self._stage.maker = engine, maker
            await self._work(engine, maker, stop)
        finally:
            self._problem = "the replica is stopping"
            await engine.shutdown()

    async def _start_engine(self, stop: asyncio.Event) -> tuple[Engine, ASGIApp, GroupMaker]:
        """The engine, its OpenAI app and a group maker; a stop meanwhile ends the process at once."""
        starting = asyncio.create_task(self._load())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # vLLM's start cannot be interrupted; its processes end with this one.
            logger.info("stopped while the engine was starting")
            logging.shutdown()
            os._exit(0)
        stopping.cancel()
        return starting.result()

    async def _load(self) -> tuple[Engine, ASGIApp, GroupMaker]:
        recipe = self._recipe
        renderer = await asyncio.to_thread(_load_renderer, recipe)
        start_engine, build_openai_app = await asyncio.to_thread(_import_engine)
        await asyncio.to_thread(compile_codec)
        engine = await start_engine(recipe)
        maker = GroupMaker(engine, renderer, self._blobs, replica=self._name, data=recipe.data)
        openai_app = await build_openai_app(engine, recipe)
        # vLLM raises the level of the root logger and its handlers, when it is imported and when its app is built.
        configure_logging("rollout", name=self._name, run=recipe.run.name, secret_url=recipe.weights.url)
        return engine, openai_app, maker

    async def _work(self, engine: Engine, maker: GroupMaker, stop: asyncio.Event) -> None:
        with scratch_folder(self._recipe, self._name) as scratch:
            puller = Puller(self._source, self._name, scratch, verify=self._recipe.weights.verify)
            policy = Policy(engine, self._source, puller, self._recipe.model.path, in_flight=self._recipe.rollout.in_flight)
            self._stage.policy = policy
            await self._follow_and_work(engine, maker, policy, stop)

    async def _follow_and_work(self, engine: Engine, maker: GroupMaker, policy: Policy, stop: asyncio.Event) -> None:
        worker = RolloutWorker(
            self._queue,
            Streams(self._recipe.run.name),
            maker,
            policy,
            consumer=self._name,
            concurrency=self._recipe.rollout.concurrent_groups,
            healthy=lambda: engine.alive and policy.fault is None,
        )
        self._worker = worker
        async with asyncio.TaskGroup() as tasks:
            aside = [tasks.create_task(work) for work in (policy.follow(), _watch(engine), self._sweep_uploads())]
            await self._until_current(policy, stop)
            working = tasks.create_task(self._claim_when_announced(worker, policy, stop))
            await stop.wait()
            self._problem = "the replica is stopping"
            await asyncio.wait({working}, timeout=FINISH_S)
            for task in (*aside, working):
                task.cancel()

    async def _until_current(self, policy: Policy, stop: asyncio.Event) -> None:
        while not (policy.current or stop.is_set()):
            self._problem = policy.damage or "the current weights are being pulled"
            await asyncio.sleep(0.05)
        self._problem = None
        logger.info("ready to answer")

    @staticmethod
    async def _claim_when_announced(worker: RolloutWorker, policy: Policy, stop: asyncio.Event) -> None:
        while not (policy.announced or stop.is_set()):  # noqa: ASYNC110  # another process announces
            await asyncio.sleep(WATCH_S)
        await worker.run(stop)

    def _heartbeat(self) -> Heartbeat:
        engine = self._stage.engine
        return Heartbeat(
            service="rollout",
            name=self._name,
            started=self._began,
            in_hand=self._worker.in_hand if self._worker else 0,
            version=engine.version if engine is not None and engine.version != BASE_VERSION else None,
            software=self._software,
        )

    async def _sweep_uploads(self) -> None:
        while True:
            await asyncio.to_thread(self._blobs.sweep_uploads, self._deployment.upload_ttl_s)
            await asyncio.sleep(SWEEP_S)


async def _watch(engine: Engine) -> None:
    while engine.alive:  # noqa: ASYNC110  # another process dies
        await asyncio.sleep(WATCH_S)
    end_surely()
    raise NotReadyError("the engine died, so this replica ends; what the engine said last stands above")


def end_surely() -> None:
    """End this process after a while whatever happens: something may wait for the dead engine's answer."""
    timer = threading.Timer(LAST_WORDS_S, os._exit, [1])
    timer.daemon = True
    timer.start()


def _load_renderer(recipe: Recipe) -> PromptRenderer:
    from mars_rollout.render import PromptRenderer

    return PromptRenderer(recipe.model.path, recipe.model.max_model_len)


def _import_engine() -> tuple[Callable[[Recipe], Awaitable[Any]], Callable[[Any, Recipe], Awaitable[ASGIApp]]]:
    """Imported late and in a thread: it takes seconds in which /healthz should answer."""
    from mars_rollout.engine.http import build_openai_app
    from mars_rollout.engine.vllm import VllmEngine

    return VllmEngine.start, build_openai_app
