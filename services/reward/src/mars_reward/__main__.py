"""`python -m mars_reward --recipe PATH --port N`: HTTP and the queue worker in one process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mars_reward.app import build_app
from mars_reward.registry import check_recipe, offered
from mars_reward.worker import RewardWorker
from mars_shared.errors import MarsError
from mars_shared.faults import arm
from mars_shared.http import HttpServer, bind
from mars_shared.logs import configure_logging, last_words
from mars_shared.queue import Queue, Streams
from mars_shared.registry import Heartbeat, Registry, keep_announced, software
from mars_shared.settings import Deployment, Recipe, load_deployment, load_recipe

logger = logging.getLogger("mars_reward")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or check the recipe's reward; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mars_reward", description="The reward service of mars.")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML recipe of the run")
    parser.add_argument("--port", type=int, default=8200, help="port of the HTTP API (default: 8200)")
    parser.add_argument("--check", action="store_true", help="find the recipe's reward, import it if it is one's own, and end")
    options = parser.parse_args(arguments)
    name = service_name(options.port)
    if not options.check:
        configure_logging("reward", name=name)
    try:
        recipe, deployment = load_recipe(options.recipe), load_deployment()
        if options.check:
            check(recipe)
            return 0
        configure_logging("reward", name=name, run=recipe.run.name, secret_url=recipe.weights.url)
        arm(recipe.run.dir)
        with offered(recipe.reward.recipe, time_limit_s=recipe.reward.time_limit_s):
            asyncio.run(serve(recipe, deployment, options.port))
    except MarsError as error:
        if not options.check:
            logger.error("ended by %s: %s", type(error).__name__, error)
        last_words("mars_reward", error)
        return error.exit_code
    return 0


def service_name(port: int) -> str:
    """As it is known in the queue and in logs: the same after a restart, and unique among those alive."""
    return f"reward-{socket.gethostname()}-{port}"


def check(recipe: Recipe) -> None:
    """Find the reward as the service does at its start, and say so.

    Raises:
        ConfigError: there is no such reward, or its module fails.
    """
    with offered(recipe.reward.recipe, time_limit_s=recipe.reward.time_limit_s):
        sys.stdout.write(f"reward: {check_recipe(recipe.reward.recipe)!r} is there\n")


async def serve(recipe: Recipe, deployment: Deployment, port: int) -> None:
    """Run the HTTP server and the worker until a signal; then finish what is in hand.

    Raises:
        ConfigError: the port is taken, or it would serve beyond loopback without a key.
        QueueUnavailableError: Redis does not answer at the start; later the worker waits for it.
    """
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    queue = Queue(deployment.redis_url, lease_s=deployment.lease_s)
    worker = RewardWorker(queue, Streams(recipe.run.name), service_name(port), recipe=recipe.reward.recipe)
    registry = Registry(deployment.redis_url, recipe.run.name)
    app = build_app(deployment, recipe=recipe.reward.recipe, ready=lambda: worker.problem)
    began, installed = time.time(), software()

    def heartbeat() -> Heartbeat:
        return Heartbeat(service="reward", name=service_name(port), started=began, in_hand=worker.in_hand, software=installed)

    try:
        await queue.ping()
        server = HttpServer(app, bind(deployment.host, port))
        await server.start()
        announcing = asyncio.create_task(keep_announced(registry, heartbeat))
        try:
            await worker.run(stop)
        finally:
            announcing.cancel()
            await asyncio.wait({announcing})
            await server.stop()
    finally:
        await registry.close()
        await queue.close()


if __name__ == "__main__":
    sys.exit(main())
