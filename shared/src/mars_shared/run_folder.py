"""A run as commands name it: its folder, its name, and its Redis."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from mars_shared.errors import ConfigError, QueueUnavailableError
from mars_shared.queue import Queue
from mars_shared.server import EmbeddedValkey
from mars_shared.settings import load_deployment, load_recipe
from mars_shared.stack import find_stack, read_state
from mars_shared.weights import WeightsStore


@dataclass(frozen=True)
class Run:
    """A run's name and folder."""

    name: str
    folder: Path

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    def redis_url(self) -> str:
        """MARS_REDIS_URL, else that of the run's own Valkey.

        Raises:
            QueueUnavailableError: there is neither.
        """
        if "MARS_REDIS_URL" in os.environ:
            return load_deployment().redis_url
        valkey = EmbeddedValkey(self.folder / "valkey")
        if not valkey.config_path.exists():
            raise QueueUnavailableError(
                f"MARS_REDIS_URL is not set and there is no {valkey.config_path}: no Redis of {self.name}"
            )
        return valkey.url


def find_run(path: Path | None) -> Run:
    """The run that a folder or a recipe is about; of None the only stack in runs/* that runs.

    Raises:
        ConfigError: there is none, or the folder does not tell the run's name.
    """
    if path is not None and path.suffix == ".toml":
        recipe = load_recipe(path)
        return Run(recipe.run.name, recipe.run.dir)
    if path is not None and not path.is_dir():
        raise ConfigError(f"{path} is neither a run's folder nor a TOML recipe")
    if path is None or read_state(path):
        folder, state = find_stack(path)
        return Run(state.run, folder)
    head = WeightsStore(path / "weights").head() if (path / "weights").is_dir() else None
    if head is None:
        raise ConfigError(f"{path}: no stack runs there and no weights tell the run's name; name the run's recipe instead")
    return Run(head.run, path)


@asynccontextmanager
async def open_queue(run: Run) -> AsyncIterator[Queue]:
    """The run's queue. Raises QueueUnavailableError: its Redis does not answer; the message says what would bring it back."""
    queue = Queue(run.redis_url())
    try:
        yield queue
    except QueueUnavailableError as error:
        if "MARS_REDIS_URL" in os.environ or read_state(run.folder):
            raise
        raise QueueUnavailableError(
            f"nothing runs in {run.folder}, its Valkey neither, which keeps the dead letters; `mars up` with the run's recipe "
            "brings them back, after the last step too"
        ) from error
    finally:
        await queue.close()
