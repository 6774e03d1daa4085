"""Logs of the services: one JSON object a line on standard error, with the ids that lead through all of them.

    {"time": "2026-01-31T12:00:00.123Z", "level": "INFO", "service": "rollout", "name": "rollout-0", "run": "demo",
     "group": "train-00000007", "logger": "mars_rollout.worker", "message": "made the group", "seconds": 1.9, "tokens": 96}

`group` is the task id of the group in hand, if one is. What `extra=` says of an event stands beside its message. `exception`
has a whole traceback in one string, so that a line is an event and an event a line. What `mars_shared.masking` calls a secret is
stars, wherever in a line it stands.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from mars_shared.masking import known_secrets, masked, masked_json
from mars_shared.terminal import printable

GROUP_HEADER = "x-mars-group"
"""The task id of an ad-hoc group, in requests between services."""
IDENTITY = "MARS_LOG_IDENTITY"
"""Set for child processes: whose lines theirs are."""
OWN_FIELDS = ("time", "level", "service", "name", "run", "group", "process", "logger", "message", "exception", "stack")
OF_LIBRARIES = ("color_message", "websocket", "vllm_process_name", "fileinfo", "taskName")
"""What uvicorn, vLLM and Python attach to records and nobody follows."""
_TASK_ID = re.compile(rb'"task_id":\s*("(?:[^"\\]|\\.)*")')

_group: ContextVar[str | None] = ContextVar("group", default=None)


@dataclass(frozen=True)
class Identity:
    """Whose lines they are: the kind of service, the process's name, and the run once it is known."""

    service: str
    name: str
    run: str | None


@contextmanager
def logged_group(task_id: str | None) -> Iterator[None]:
    """Give every line that is logged inside the id of a group; tasks and `asyncio.to_thread` that begin inside take it along."""
    token = _group.set(task_id)
    try:
        yield
    finally:
        _group.reset(token)


def group_named_in(payload: bytes) -> str | None:
    """The first task id in a message's JSON, which need not be whole: a group that cannot be read has a name nevertheless."""
    match = _TASK_ID.search(payload)
    try:
        return json.loads(match[1]) if match else None
    except ValueError:
        return None


def configure_logging(service: str, *, name: str | None = None, run: str | None = None, secret_url: str | None = None) -> None:
    """Log as JSON lines on standard error from here on, warnings and uncaught exceptions too; a later call replaces an earlier one.

    Args:
        service: "rollout", "reward" or "trainer".
        name: of the process among its kind, e.g. "rollout-0"; default: the service.
        secret_url: of the recipe, where weights are found; its credentials are secrets.
    """
    _configure(Identity(service, name or service, run), secret_url)


def inherit_logging() -> None:
    """In a child process: log as the process that started it, if that one logs as JSON lines."""
    if said := os.environ.get(IDENTITY):
        _configure(Identity(**json.loads(said)))


def last_words(program: str, error: Exception) -> None:
    """Tell people on standard error what ended a program, without the secrets that its log lines lack too."""
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    own = next((formatter.secrets for formatter in formatters if isinstance(formatter, JsonLines)), known_secrets(os.environ))
    sys.stderr.write(f"{program}: {masked(str(error), own)}\n")


def _configure(identity: Identity, secret_url: str | None = None) -> None:
    os.environ[IDENTITY] = json.dumps(asdict(identity))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(identity, known_secrets(os.environ, secret_url)))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda said: _log_uncaught(said.exc_type, said.exc_value or said.exc_type(), said.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, SystemExit):
        return  # of a thread, which it ends silently
    logging.getLogger(__name__).critical("ended by %s: %s", kind.__name__, error, exc_info=(kind, error, trace))


class JsonLines(JsonFormatter):
    """Makes the lines; `secrets` in them, and credentials of URLs, are masked, wherever they come from."""

    def __init__(self, identity: Identity, secrets: tuple[str, ...] = ()) -> None:
        super().__init__(
            ["message"],
            rename_fields={"exc_info": "exception", "stack_info": "stack"},
            reserved_attrs=[*RESERVED_ATTRS, *OF_LIBRARIES],
        )
        self._identity = {key: value for key, value in asdict(identity).items() if value is not None}
        self.secrets = secrets

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        log_data["level"] = record.levelname
        log_data.update(self._identity)
        if group := _group.get():
            log_data["group"] = group
        if record.processName not in (None, "MainProcess"):
            log_data["process"] = record.processName
        log_data["logger"] = record.name
        super().add_fields(log_data, record, message_dict)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        # As JSON, so that what is inside paths, exceptions and other objects is masked too.
        masked_data: dict[str, Any] = masked_json(json.loads(self.jsonify_log_record(log_data)), self.secrets)
        return masked_data


def parse_log_line(line: str) -> dict[str, Any] | None:
    """A line of a service's log as an object; None if it is no line of ours: a crash of the interpreter, a server's own words."""
    try:
        entry = json.loads(line)
        log_time_s(entry)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if {"level", "message"} <= entry.keys() else None


def log_time_s(entry: Mapping[str, Any]) -> float:
    """When a line was logged, in unix seconds."""
    return datetime.fromisoformat(str(entry["time"])).timestamp()


def said_in(entry: Mapping[str, Any]) -> str:
    """What a line says, for people: message and details, below them the traceback if there is one."""
    details = [f"{key} {_short(value)}" for key, value in entry.items() if key not in OWN_FIELDS]
    level = f"{entry['level']}: " if entry["level"] not in ("DEBUG", "INFO") else ""
    text = printable("  ".join([f"{level}{entry['message']}", *details]))
    traces = [str(entry[key]) for key in ("exception", "stack") if entry.get(key)]
    return "\n".join([text, *(f"  {printable(line)}" for trace in traces for line in trace.splitlines())])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tail_for_people(path: Path, *, start: int, lines: int, secrets: tuple[str, ...] = ()) -> list[str]:
    """The last lines of a log from a byte on, JSON lines told as sentences; what no service wrote itself is masked here."""
    own = path.read_bytes()[start:].decode(errors="replace").splitlines()[-lines:]
    told = [said_in(entry) if (entry := parse_log_line(line)) else line for line in own]
    return masked("\n".join(told), secrets).splitlines()[-lines:]
