"""Changing the number of replicas of a running stack.

`mars scale` leaves a request in run.dir/scale.json; the supervisor's process looks for it in every
round, starts what is missing and ends what is too many. The request names the process that it is
meant for, so one that an earlier run left behind changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, Field, ValidationError

from mars_shared.errors import ConfigError
from mars_shared.files import write_atomic
from mars_shared.http import bind
from mars_shared.supervisor import Service, Supervisor

SCALE_FILE = "scale.json"
MOST_REPLICAS = 100
"""Their ports stand in a row from the base on, and the reward service's is base + 100."""


class ScaleRequest(BaseModel):
    """How many replicas somebody wants of the stack whose supervisor is this process."""

    supervisor_pid: int
    replicas: int = Field(ge=1, le=MOST_REPLICAS)
    id: str = Field(default_factory=lambda: uuid4().hex)

    def write(self, run_dir: Path) -> None:
        write_atomic(run_dir / SCALE_FILE, self.model_dump_json(indent=2).encode(), durable=False)


def read_request(run_dir: Path) -> ScaleRequest | None:
    """The last request that was made in a run folder; None if there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run_dir / SCALE_FILE
    try:
        return ScaleRequest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{path}: not a request to scale ({error.error_count()} errors); use `mars scale`") from error


def check_replicas(replicas: int) -> None:
    """Raises ConfigError if so many replicas cannot be."""
    if not 1 <= replicas <= MOST_REPLICAS:
        raise ConfigError(
            f"{replicas} rollout replicas were asked for; expected 1 to {MOST_REPLICAS}: "
            f"replica n listens on the first port + n, the reward service on the first port + {MOST_REPLICAS}"
        )


def replica_name(index: int) -> str:
    return f"rollout-{index}"


class Replicas:
    """The replicas of a running stack, made as many as the newest request says.

    Args:
        port: of the replica with that index.
        service: makes the service of the replica with that index.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        run_dir: Path,
        *,
        host: str,
        port: Callable[[int], int],
        service: Callable[[int], Service],
        say: Callable[[str], None],
    ) -> None:
        self._supervisor = supervisor
        self._run_dir = run_dir
        self._host, self._port, self._service = host, port, service
        self._say = say
        self._to_start: list[int] = []
        self.request_id: str | None = None
        """Of the newest request that was taken up."""
        (run_dir / SCALE_FILE).unlink(missing_ok=True)

    @property
    def ports(self) -> dict[str, int]:
        """Port by name of the replicas that are to run, in the order of their indices."""
        running = self._supervisor.names
        return {replica_name(i): self._port(i) for i in range(MOST_REPLICAS) if replica_name(i) in running}

    @property
    def settled(self) -> bool:
        """Whether nothing of the newest request is left to be started or to end."""
        return not self._to_start and not self._supervisor.ending

    def follow(self) -> None:
        """Take up a new request, and start what can be started; waits for nothing."""
        request = self._new_request()
        if request is not None:
            self._aim_at(request)
        ending = self._supervisor.ending
        ready_to_start = [index for index in self._to_start if replica_name(index) not in ending]
        for index in ready_to_start:
            self._to_start.remove(index)
            self._start(index)

    def _new_request(self) -> ScaleRequest | None:
        try:
            request = read_request(self._run_dir)
        except ConfigError as error:
            self._say(str(error))
            (self._run_dir / SCALE_FILE).unlink(missing_ok=True)
            return None
        if request is None or request.supervisor_pid != os.getpid() or request.id == self.request_id:
            return None
        return request

    def _aim_at(self, request: ScaleRequest) -> None:
        self.request_id = request.id
        self._supervisor.given_up.clear()
        running = self._supervisor.names
        surplus = [i for i in range(request.replicas, MOST_REPLICAS) if replica_name(i) in running]
        self._to_start = [i for i in range(request.replicas) if replica_name(i) not in running]
        self._say(f"scaling to {request.replicas} rollout replica(s)")
        for index in reversed(surplus):
            self._supervisor.end(replica_name(index))

    def _start(self, index: int) -> None:
        try:
            bind(self._host, self._port(index)).close()
        except ConfigError as error:
            self._supervisor.give_up(replica_name(index), f"{error}; then scale again")
            return
        self._supervisor.start(self._service(index))
