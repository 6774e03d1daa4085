"""Where a replica keeps its own copy of the weights: in memory if there is room, else on a local disk.

A replica that is killed cannot clean up; memory would be lost until the machine restarts. So every folder goes with a locked
file, and whoever begins removes the folders whose locks are free.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO

from mars_shared.errors import ConfigError
from mars_shared.settings import Recipe

logger = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")
ROOM = 2
"""Times the model's files: the copy itself, and a snapshot that is fetched."""
PREFIX = "mars-weights-"


@contextmanager
def scratch_folder(recipe: Recipe, replica: str) -> Iterator[Path]:
    """An empty folder of one replica of one run, which goes when the replica does.

    Raises:
        ConfigError: a replica of that name is at work on this machine.
    """
    parent = recipe.weights.scratch or _parent(recipe)
    parent.mkdir(parents=True, exist_ok=True)
    run = sha256(str(recipe.run.dir.resolve()).encode()).hexdigest()[:8]
    folder = parent / f"{PREFIX}{recipe.run.name}-{run}-{replica}"
    with _lock_file(folder).open("a") as lock:
        if not _locked(lock):
            raise ConfigError(
                f"another replica {replica!r} of run {recipe.run.name!r} is at work here ({folder}); name this one otherwise"
            )
        _sweep(parent)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _parent(recipe: Recipe) -> Path:
    needed = ROOM * sum(file.stat().st_size for file in recipe.model.path.glob("*.safetensors"))
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > needed:
        return MEMORY
    folder = Path(tempfile.gettempdir())
    logger.info("%s has no room for %d MiB; the weights are kept in %s", MEMORY, needed >> 20, folder)
    return folder


def _sweep(parent: Path) -> None:
    """Remove what replicas that were killed left behind."""
    for path in parent.glob(f"{PREFIX}*.lock"):
        folder = path.with_suffix("")
        try:
            with path.open("a") as lock:
                if folder.is_dir() and _locked(lock):
                    logger.info("removing %s, whose replica has gone", folder)
                    shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:  # another user's
            continue


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
