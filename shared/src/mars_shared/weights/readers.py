"""Who reads a weights store, and from which weights on: what retention must spare."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from uuid import uuid4

from pydantic import Field, ValidationError

from mars_shared.contracts import Contract
from mars_shared.errors import InputError
from mars_shared.files import write_atomic

logger = logging.getLogger(__name__)

READER_S = 60.0
"""How long a registration counts after it was last renewed."""
READERS = "readers"
"""The folder of registrations in a store, one file per reader."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


class Registration(Contract):
    """What a reader says of itself, e.g. `Registration(weights_id="3f9c...")`."""

    weights_id: str | None = Field(pattern=r"^[0-9a-f]{64}$", description="of the weights that it serves; None for none yet")
    beat: str = Field(default="", max_length=64, description="differs at every renewal, for stores without a clock of their own")


def registration_file(reader: str) -> str:
    """Where a reader's registration is, relative to the store, e.g. "readers/rollout-0.json".

    Raises:
        InputError: the name cannot be a file's.
    """
    if not _NAME.fullmatch(reader):
        raise InputError(f"reader {reader[:140]!r}: expected 1 to 128 letters, digits, '_', '-' or '.', and no '.' first")
    return f"{READERS}/{reader}.json"


class Readers:
    """The registrations in a weights store; a reader renews its own, the store's writer reads all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def register(self, reader: str, weights_id: str | None) -> None:
        """Say that a reader lives and which weights it serves.

        Raises:
            InputError: the name cannot be a file's.
        """
        path = self._root / registration_file(reader)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, Registration(weights_id=weights_id).model_dump_json().encode(), durable=False)

    def living(self) -> dict[str, str | None]:
        """weights_id by reader, of those who registered within READER_S; the files of all others are removed."""
        folder = self._root / READERS
        if not folder.is_dir():
            return {}
        oldest_s, found = self._file_time_s() - READER_S, {}
        for path in folder.glob("[!.]*.json"):
            if path.stat().st_mtime < oldest_s:
                path.unlink()
                continue
            try:
                found[path.stem] = Registration.model_validate_json(path.read_bytes()).weights_id
            except ValidationError as error:
                logger.warning("%s is no registration of a reader (%d errors) and does not count", path, error.error_count())
        return found

    def _file_time_s(self) -> float:
        """The time by the clock that stamps the store's files, which need not be this machine's."""
        probe = self._root / READERS / f".now-{uuid4().hex}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()
