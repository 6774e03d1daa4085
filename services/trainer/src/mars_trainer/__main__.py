"""The trainer service: python -m mars_trainer --recipe recipes/digits.toml --port 8300."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from mars_shared.blobs import BlobStore
from mars_shared.contracts import PolicyVersion, Purpose
from mars_shared.errors import ConfigError, MarsError
from mars_shared.faults import arm
from mars_shared.http import HttpServer, bind
from mars_shared.logs import configure_logging, last_words
from mars_shared.model_folder import check_model_folder
from mars_shared.queue import Queue
from mars_shared.registry import Registry
from mars_shared.settings import Deployment, Recipe, load_deployment, load_recipe
from mars_shared.telemetry import EventLog
from mars_shared.weights import WeightsStore
from mars_trainer.app import build_app
from mars_trainer.checkpoint import CheckpointStore, Ledger, model_identity
from mars_trainer.datasets import RunData, open_data, open_held_out
from mars_trainer.dispatch import PromptMaker
from mars_trainer.exchange import Exchange, trainer_queue
from mars_trainer.group_log import GroupLog
from mars_trainer.learner import Learner
from mars_trainer.loop import TrainingRun
from mars_trainer.monitor import Monitor
from mars_trainer.progress import Progress
from mars_trainer.publish import Publisher
from mars_trainer.selftest import SelfTest
from mars_trainer.trackers import tracking
from mars_trainer.trackers.runner import exit_despite_trackers

logger = logging.getLogger("mars_trainer")

TERMINATED_EXIT_CODE = 128 + signal.SIGTERM


def main() -> int:
    parser = argparse.ArgumentParser(prog="mars_trainer", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--mode", choices=["once", "linger", "evaluate"], default="once", help="what to do, and when to end")
    arguments = parser.parse_args()
    configure_logging("trainer")
    disable_progress_bar()  # of loading weights: a log has lines
    try:
        recipe, deployment = load_recipe(arguments.recipe), load_deployment()
        configure_logging("trainer", run=recipe.run.name, secret_url=recipe.weights.url)
        arm(recipe.run.dir)
        with only_trainer(recipe.run.dir), nullcontext() if arguments.mode == "evaluate" else tracking(recipe):
            done = asyncio.run(serve(recipe, deployment, arguments.port, arguments.mode))
    except MarsError as error:
        logger.error("ended by %s: %s", type(error).__name__, error)
        last_words("mars_trainer", error)
        return error.exit_code
    return 0 if done else TERMINATED_EXIT_CODE


@contextmanager
def only_trainer(run_dir: Path) -> Iterator[None]:
    """Hold the run's trainer lock: a file lock, so that it ends with the process and not with Redis.

    Raises:
        ConfigError: another trainer holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "trainer.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another trainer works on {run_dir}; stop it, or choose another run.dir") from error
        yield


async def serve(recipe: Recipe, deployment: Deployment, port: int, mode: str) -> bool:
    """Train, or evaluate, with the HTTP face beside it; SIGTERM and SIGINT end both.

    Returns whether the work was done, not cut off by a signal.
    """
    loop = asyncio.get_running_loop()
    data = RunData((), open_held_out(recipe.data)) if mode == "evaluate" else open_data(recipe.data)
    queue = trainer_queue(deployment.redis_url)
    await queue.ping()
    run = build_run(recipe, queue, data, newest_incarnation=await queue.newest_incarnation(recipe.run.name))
    await queue.begin_incarnation(recipe.run.name, run.version.incarnation)
    weights = WeightsStore(recipe.run.dir / "weights")
    registry = Registry(deployment.redis_url, recipe.run.name)
    monitor = Monitor(registry, run.progress, run.events)
    app = build_app(deployment, run.progress, weights, lambda: monitor.newest)
    server = HttpServer(app, bind(deployment.host, port))
    await server.start()
    monitoring = asyncio.create_task(monitor.follow(), name="monitor")
    work = run.evaluate_newest() if mode == "evaluate" else run.run()
    training = asyncio.create_task(work, name="training")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, training.cancel)
    try:
        await asyncio.wait({training})
        if training.cancelled():
            run.events.write("stopped", step=run.version.step)
            return False
        training.result()
        if mode == "linger":
            await stopped(loop)
        return True
    finally:
        monitoring.cancel()
        await asyncio.wait({monitoring})
        await server.stop()
        await registry.close()
        await queue.close()


async def stopped(loop: asyncio.AbstractEventLoop) -> None:
    """Return on SIGTERM or SIGINT."""
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    await event.wait()


def build_run(recipe: Recipe, queue: Queue, data: RunData, *, newest_incarnation: int = 0) -> TrainingRun:
    """A run that goes on from its newest checkpoint, under an incarnation newer than all before, on disk and in Redis."""
    blobs = BlobStore(recipe.run.dir / "blobs")
    weights = WeightsStore(recipe.run.dir / "weights")
    weights.sweep()
    checkpoints = CheckpointStore(recipe.run.dir / "checkpoints", keep=recipe.train.keep_checkpoints)
    check_model_folder(recipe.model.path)
    identity = model_identity(recipe.model.path)
    newest = checkpoints.load_newest(run=recipe.run.name, model=identity)
    learner = Learner(recipe, blobs)
    head = weights.head()
    on_disk = max(newest.ledger.version.incarnation if newest else 0, head.version.incarnation if head else 0)
    incarnation = 1 + max(on_disk, newest_incarnation)
    version = PolicyVersion(incarnation=incarnation, step=newest.ledger.version.step if newest else 0)
    if newest is None:
        ledger = Ledger(run=recipe.run.name, model=identity, version=version, next_dispatch_index=0, consumed=())
    else:
        ledger = newest.ledger.model_copy(update={"version": version})
        learner.restore(newest.model, newest.optimizer, version.step)
        logger.info("going on from step %d as incarnation %d", version.step, incarnation)
    prompts = PromptMaker(recipe, blobs)
    events = EventLog(recipe.run.dir / "events.jsonl")
    bound = 4 * (recipe.train.max_staleness + 1) * recipe.train.prompts_per_step + 256

    def exchange(purpose: Purpose) -> Exchange:
        return Exchange(queue, recipe.run.name, purpose, incarnation=incarnation, bound=bound)

    return TrainingRun(
        recipe=recipe,
        data=data,
        learner=learner,
        prompts=prompts,
        training=exchange(Purpose.TRAIN),
        evaluation=exchange(Purpose.EVAL),
        publisher=Publisher(recipe, weights),
        checkpoints=checkpoints,
        events=events,
        groups=GroupLog(recipe.run.dir / "groups"),
        evaluations=recipe.run.dir / "evaluations",
        ledger=ledger,
        restored_from=newest.ledger.version if newest else None,
        progress=Progress(
            run=recipe.run.name,
            steps=recipe.train.steps,
            version=version,
            next_dispatch_index=ledger.next_dispatch_index,
            dead=list(ledger.dead),
        ),
        self_test=SelfTest(recipe, data.train, learner, prompts, exchange(Purpose.PROBE), events)
        if recipe.self_test.enabled
        else None,
    )


if __name__ == "__main__":
    exit_despite_trackers(main)
