"""`python -m mars_rollout --recipe PATH --port N --name replica-0`: one rollout replica."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from mars_rollout.engine.environment import configure_environment
from mars_shared.errors import MarsError
from mars_shared.faults import arm
from mars_shared.http import bind, check_bind
from mars_shared.logs import configure_logging, last_words
from mars_shared.model_folder import check_model_folder
from mars_shared.queue import Queue
from mars_shared.registry import Registry
from mars_shared.settings import Deployment, Recipe, load_deployment, load_recipe

logger = logging.getLogger("mars_rollout")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mars_rollout", description="A rollout replica of mars.")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML recipe of the run")
    parser.add_argument("--port", type=int, default=8100, help="port of the HTTP API (default: 8100)")
    parser.add_argument("--name", default="replica-0", help="this replica's name, unique in the run and kept over restarts")
    options = parser.parse_args(arguments)
    configure_logging("rollout", name=options.name)
    failure: MarsError | None = None
    try:
        recipe, deployment = load_recipe(options.recipe), load_deployment()
        configure_logging("rollout", name=options.name, run=recipe.run.name, secret_url=recipe.weights.url)
        arm(recipe.run.dir)
        check_bind(deployment)
        asyncio.run(serve(recipe, deployment, bind(deployment.host, options.port), options.name))
    except* MarsError as group:
        failure = _first(group)
    if failure is None:
        return 0
    logger.error("ended by %s: %s", type(failure).__name__, failure)
    last_words("mars_rollout", failure)
    return failure.exit_code


async def serve(recipe: Recipe, deployment: Deployment, listener: socket.socket, name: str) -> None:
    """Run a replica until a signal.

    Raises:
        ConfigError: the model folder cannot be a policy.
        QueueUnavailableError: Redis does not answer at the start; later the worker waits for it.
    """
    from mars_rollout.service import Replica

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    check_model_folder(recipe.model.path)
    queue = Queue(deployment.redis_url, lease_s=deployment.lease_s)
    registry = Registry(deployment.redis_url, recipe.run.name)
    try:
        await queue.ping()
        configure_environment(recipe.rollout.threads, recipe.data.max_image_pixels)
        await Replica(recipe, deployment, queue, registry, name=name).run(listener, stop)
    finally:
        await registry.close()
        await queue.close()


def _first(group: BaseExceptionGroup[MarsError]) -> MarsError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


if __name__ == "__main__":
    sys.exit(main())
