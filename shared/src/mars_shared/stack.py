"""The services of one run on this machine: Valkey, reward, rollout replicas, trainer, as processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from mars_shared.errors import ConfigError
from mars_shared.files import write_atomic
from mars_shared.http import bind, check_bind
from mars_shared.model_folder import check_model_folder
from mars_shared.queue import Queue
from mars_shared.scale import MOST_REPLICAS, SCALE_FILE, Replicas, check_replicas, replica_name
from mars_shared.server import EmbeddedValkey
from mars_shared.settings import Deployment, Recipe, load_deployment
from mars_shared.supervisor import Service, Supervisor
from mars_shared.trackers import check_trackers
from mars_shared.weights.source import open_source

TRAINER = "trainer"
STATE_FILE = "stack.json"
LOCK_FILE = "stack.lock"


@dataclass(frozen=True)
class Ports:
    """Ports of a stack: replicas from `base` on, reward at base + 100, trainer at base + 200."""

    base: int = 8100

    def rollout(self, index: int) -> int:
        return self.base + index

    @property
    def reward(self) -> int:
        return self.base + MOST_REPLICAS

    @property
    def trainer(self) -> int:
        return self.base + 200


def service_url(host: str, port: int) -> str:
    """E.g. http://127.0.0.1:8100, or http://[::1]:8100."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class StackState(BaseModel):
    """What a running stack consists of; kept up to date in run.dir/stack.json for `mars status`, `mars scale` and clients.

    `replicas`: port by name. `pids`: process id by service, of those that run; it changes with every restart.
    `ending`: services that were asked to end and have not. `given_up`: why, by name, of replicas that `mars scale`
    could not add. `settled_request`: the newest request of `mars scale` of which nothing is left to do.
    """

    run: str
    supervisor_pid: int
    host: str
    replicas: dict[str, int]
    reward_port: int
    trainer_port: int
    pids: dict[str, int] = {}
    ending: list[str] = []
    given_up: dict[str, str] = {}
    settled_request: str | None = None

    def url(self, port: int) -> str:
        return service_url(self.host, port)


TrainerMode = Literal["once", "linger", "evaluate"]


@dataclass(frozen=True)
class Plan:
    """How the processes of mars itself are started."""

    recipe_path: Path
    host: str
    ports: Ports
    trainer_mode: TrainerMode

    def reward(self) -> Service:
        return self._service("reward", "mars_reward", self.ports.reward)

    def replica(self, index: int, *, optional: bool = False) -> Service:
        name = replica_name(index)
        return self._service(name, "mars_rollout", self.ports.rollout(index), "--name", name, optional=optional)

    def trainer(self) -> Service:
        mode = self.trainer_mode
        return self._service(TRAINER, "mars_trainer", self.ports.trainer, "--mode", mode, finishes=mode != "linger")

    def _service(
        self, name: str, module: str, port: int, *arguments: str, finishes: bool = False, optional: bool = False
    ) -> Service:
        command = [sys.executable, "-m", module, "--recipe", str(self.recipe_path), "--port", str(port), *arguments]
        return Service(name, command, f"{service_url(self.host, port)}/readyz", finishes=finishes, optional=optional)


class Stack:
    """A running stack: `poll` keeps its services running, follows `mars scale` and keeps stack.json true."""

    def __init__(
        self, supervisor: Supervisor, replicas: Replicas, plan: Plan, *, run: str, run_dir: Path, say: Callable[[str], None]
    ) -> None:
        self.supervisor = supervisor
        self._replicas = replicas
        self._plan = plan
        self._run, self._path = run, run_dir / STATE_FILE
        self._say = say
        self._written: StackState | None = None
        self._is_stale = False

    def poll(self) -> None:
        """Look once at everything; see Supervisor.poll for what it raises."""
        self._replicas.follow()
        self.supervisor.poll()
        self.write_state()

    def write_state(self) -> None:
        """Write stack.json unless it says the same already; a full disk ends no run, the next call tries again."""
        state = self._state()
        if state == self._written:
            return
        try:
            write_atomic(self._path, state.model_dump_json(indent=2).encode(), durable=False)
        except OSError as error:
            if not self._is_stale:
                self._say(f"{self._path} cannot be written ({error.strerror}); `mars status` shows what was")
            self._is_stale = True
        else:
            self._written, self._is_stale = state, False

    def _state(self) -> StackState:
        return StackState(
            run=self._run,
            supervisor_pid=os.getpid(),
            host=self._plan.host,
            replicas=self._replicas.ports,
            reward_port=self._plan.ports.reward,
            trainer_port=self._plan.ports.trainer,
            pids=self.supervisor.pids(),
            ending=self.supervisor.ending,
            given_up=dict(self.supervisor.given_up),
            settled_request=self._replicas.request_id if self._replicas.settled else None,
        )


@contextmanager
def running_stack(
    recipe_path: Path,
    recipe: Recipe,
    *,
    ports: Ports,
    trainer: TrainerMode,
    say: Callable[[str], None],
) -> Iterator[Stack]:
    """Start everything, in an order in which nothing waits for what comes later; end it all on exit.

    Without MARS_REDIS_URL in the environment an embedded Valkey is started in run.dir/valkey.

    Raises:
        ConfigError, QueueUnavailableError: as `check_start`; another stack works on this run.

    Args:
        trainer: "once" ends after the last step, "linger" serves on, "evaluate" evaluates the newest policy and ends.
    """
    with only_stack(recipe.run.dir):
        deployment = check_start(recipe, ports)
        with _services(recipe_path, recipe, deployment, ports, trainer, say) as stack:
            yield stack


@contextmanager
def only_stack(run_dir: Path) -> Iterator[None]:
    """Hold the run folder's lock, a file lock, so that it ends with the process.

    Raises:
        ConfigError: another stack works on this run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another `mars up`, `train` or `eval` works on {run_dir}; stop it (`mars status` shows it), or choose another run.dir"
            ) from error
        yield


@contextmanager
def _services(
    recipe_path: Path, recipe: Recipe, deployment: Deployment, ports: Ports, trainer: TrainerMode, say: Callable[[str], None]
) -> Iterator[Stack]:
    run_dir = recipe.run.dir
    log_dir = run_dir / "logs"
    environment = dict(os.environ) | {"MARS_REWARD_URL": service_url(deployment.host, ports.reward)}
    valkey = None
    if "MARS_REDIS_URL" not in os.environ:
        valkey = EmbeddedValkey(run_dir / "valkey", log_path=log_dir / "valkey.log")
        valkey.write_config()
        environment["MARS_REDIS_URL"] = valkey.url
    plan = Plan(recipe_path, deployment.host, ports, trainer)
    supervisor = Supervisor(log_dir=log_dir, environment=environment, say=say, secret_url=recipe.weights.url)
    try:
        if valkey is not None:
            supervisor.start(Service("valkey", valkey.command(), needed_to_stop=True))
            valkey.wait_ready()
        supervisor.start(plan.reward())
        for index in range(recipe.rollout.replicas):
            supervisor.start(plan.replica(index))
        supervisor.start(plan.trainer())
        replicas = Replicas(
            supervisor, run_dir, host=plan.host, port=ports.rollout, service=partial(plan.replica, optional=True), say=say
        )
        stack = Stack(supervisor, replicas, plan, run=recipe.run.name, run_dir=run_dir, say=say)
        stack.write_state()
        yield stack
    finally:
        try:
            supervisor.stop()
        finally:
            (run_dir / STATE_FILE).unlink(missing_ok=True)
            (run_dir / SCALE_FILE).unlink(missing_ok=True)


def check_start(recipe: Recipe, ports: Ports) -> Deployment:
    """What can be known to be wrong before anything is started or written; returns where the stack would run.

    Raises:
        ConfigError: a port is taken, there are more replicas than ports for them, the model folder cannot be a policy,
            weights.url is no URL or needs a package that is not installed, a tracker's package is missing,
            or the stack would serve beyond loopback without a key.
        QueueUnavailableError: nothing answers at MARS_REDIS_URL.
    """
    deployment = load_deployment()
    check_bind(deployment)
    _check_ports(deployment.host, ports, recipe)
    check_model_folder(recipe.model.path)
    open_source(recipe.weights.url, recipe.run.dir / "weights", deployment.api_key)
    check_trackers(recipe.track.trackers)
    if "MARS_REDIS_URL" in os.environ:
        asyncio.run(_check_redis(deployment.redis_url))
    return deployment


def _check_ports(host: str, ports: Ports, recipe: Recipe) -> None:
    check_replicas(recipe.rollout.replicas)
    for port in (ports.reward, ports.trainer, *(ports.rollout(index) for index in range(recipe.rollout.replicas))):
        try:
            bind(host, port).close()
        except ConfigError as error:
            raise ConfigError(
                f"{error}: --port N moves replicas to N and up, reward to N + 100, trainer to N + 200 (`make demo PORT=N` too)"
            ) from error


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
    except (FileNotFoundError, NotADirectoryError):  # runs/ may have files beside run folders
        return None
    except ValidationError as error:
        raise ConfigError(f"{path}: not a stack's state; delete it if no `mars up` runs there") from error
    return state if Path(f"/proc/{state.supervisor_pid}").exists() else None


def find_stack(run_dir: Path | None) -> tuple[Path, StackState]:
    """The stack that runs in a run folder, or the only one that runs in runs/*.

    Raises:
        ConfigError: none runs there, or several run and none is named.
    """
    if run_dir is not None:
        state = read_state(run_dir)
        if state is None:
            raise ConfigError(f"no stack runs in {run_dir}; start one with `mars up RECIPE`, `mars status` shows what runs")
        return run_dir, state
    stacks = [(folder, state) for folder in sorted(Path("runs").glob("*")) if (state := read_state(folder))]
    if not stacks:
        raise ConfigError("no stack runs in runs/*; start one with `mars up RECIPE`, or say where one runs")
    if len(stacks) > 1:
        raise ConfigError(f"several stacks run ({', '.join(str(folder) for folder, _ in stacks)}); say which one is meant")
    return stacks[0]
