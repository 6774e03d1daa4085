"""The services of one run on this machine: Valkey, reward, rollout replicas, trainer, as processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from mars_shared.errors import ConfigError
from mars_shared.files import write_atomic
from mars_shared.http import bind, check_bind
from mars_shared.queue import Queue
from mars_shared.server import EmbeddedValkey
from mars_shared.settings import Recipe, load_deployment
from mars_shared.supervisor import Service, Supervisor

TRAINER = "trainer"
STATE_FILE = "stack.json"


@dataclass(frozen=True)
class Ports:
    """Ports of a stack: replicas from `base` on, reward at base + 100, trainer at base + 200."""

    base: int = 8100

    def rollout(self, index: int) -> int:
        return self.base + index

    @property
    def reward(self) -> int:
        return self.base + 100

    @property
    def trainer(self) -> int:
        return self.base + 200


def service_url(host: str, port: int) -> str:
    """E.g. http://127.0.0.1:8100, or http://[::1]:8100."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class StackState(BaseModel):
    """Where a running stack's services answer; written to run.dir/stack.json for `mars status` and clients."""

    run: str
    supervisor_pid: int
    host: str
    rollout_ports: list[int]
    reward_port: int
    trainer_port: int

    def url(self, port: int) -> str:
        return service_url(self.host, port)


TrainerMode = Literal["once", "linger", "evaluate"]


@contextmanager
def running_stack(
    recipe_path: Path,
    recipe: Recipe,
    *,
    ports: Ports,
    trainer: TrainerMode,
    say: Callable[[str], None],
) -> Iterator[Supervisor]:
    """Start everything, in an order in which nothing waits for what comes later; end it all on exit.

    Without MARS_REDIS_URL in the environment an embedded Valkey is started in run.dir/valkey.

    Raises:
        ConfigError: a port is taken, or the stack would serve beyond loopback without a key.
        QueueUnavailableError: nothing answers at MARS_REDIS_URL.

    Args:
        trainer: "once" ends after the last step, "linger" serves on, "evaluate" evaluates the newest policy and ends.
    """
    deployment = load_deployment()
    check_bind(deployment)
    _check_ports(deployment.host, ports, recipe)
    run_dir = recipe.run.dir
    log_dir = run_dir / "logs"
    run_dir.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) | {"MARS_REWARD_URL": service_url(deployment.host, ports.reward)}
    valkey = None
    if "MARS_REDIS_URL" in os.environ:
        asyncio.run(_check_redis(deployment.redis_url))
    else:
        valkey = EmbeddedValkey(run_dir / "valkey", log_path=log_dir / "valkey.log")
        valkey.write_config()
        environment["MARS_REDIS_URL"] = valkey.url
    supervisor = Supervisor(log_dir=log_dir, environment=environment, say=say)
    try:
        if valkey is not None:
            supervisor.start(Service("valkey", valkey.command(), needed_to_stop=True))
            valkey.wait_ready()
        for service in _services(recipe_path, recipe, deployment.host, ports, trainer):
            supervisor.start(service)
        state = StackState(
            run=recipe.run.name,
            supervisor_pid=os.getpid(),
            host=deployment.host,
            rollout_ports=[ports.rollout(index) for index in range(recipe.rollout.replicas)],
            reward_port=ports.reward,
            trainer_port=ports.trainer,
        )
        write_atomic(run_dir / STATE_FILE, state.model_dump_json(indent=2).encode())
        yield supervisor
    finally:
        try:
            supervisor.stop()
        finally:
            (run_dir / STATE_FILE).unlink(missing_ok=True)


def _check_ports(host: str, ports: Ports, recipe: Recipe) -> None:
    for port in (ports.reward, ports.trainer, *(ports.rollout(index) for index in range(recipe.rollout.replicas))):
        try:
            bind(host, port).close()
        except ConfigError as error:
            raise ConfigError(f"{error}: --port N moves replicas to N and up, reward to N + 100, trainer to N + 200") from error


async def _check_redis(url: str) -> None:
    queue = Queue(url)
    try:
        await queue.ping()
    finally:
        await queue.close()


def read_state(run_dir: Path) -> StackState | None:
    """The stack that runs in a run folder; None if none does.

    Raises:
        ConfigError: the state file is damaged.
    """
    path = run_dir / STATE_FILE
    try:
        state = StackState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{path}: not a stack's state; delete it if no `mars up` runs there") from error
    return state if Path(f"/proc/{state.supervisor_pid}").exists() else None


def _services(recipe_path: Path, recipe: Recipe, host: str, ports: Ports, trainer: TrainerMode) -> Iterator[Service]:
    def service(name: str, module: str, port: int, *arguments: str, finishes: bool = False) -> Service:
        command = [sys.executable, "-m", module, "--recipe", str(recipe_path), "--port", str(port), *arguments]
        return Service(name, command, ready_url=f"{service_url(host, port)}/readyz", finishes=finishes)

    yield service("reward", "mars_reward", ports.reward)
    for index in range(recipe.rollout.replicas):
        name = f"rollout-{index}"
        yield service(name, "mars_rollout", ports.rollout(index), "--name", name)
    yield service(TRAINER, "mars_trainer", ports.trainer, "--mode", trainer, finishes=trainer != "linger")
