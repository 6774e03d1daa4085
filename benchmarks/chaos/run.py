"""One small run of the whole stack under observation: where it is, what of it lives, whether it still moves."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from redis import Redis, exceptions

from mars_shared.contracts import Purpose
from mars_shared.errors import ConfigError, MarsError
from mars_shared.http import bind
from mars_shared.lua import GROUP
from mars_shared.queue import Streams
from mars_shared.server import HOST, EmbeddedValkey
from mars_shared.settings import Recipe, load_recipe
from mars_shared.stack import TRAINER, Ports, Stack, running_stack, service_url
from mars_shared.supervisor import MANY_DEATHS, MANY_DEATHS_S, POLL_S
from mars_shared.telemetry import read_events

ROOT = Path(__file__).resolve().parents[2]
LEASE_S = 4.0
STALL_S = 300.0
"""Without any progress for so long, a run counts as hanging."""
START_S = 1200.0
"""The same before its first step: engines start slowly."""
FEWEST_FREE_DEATHS = 5
"""Deaths that are left to a service's own misfortune before the supervisor gives it up."""
RUN_VARIABLE = "MARS_CHAOS_RUN"
"""Marks every process of a run, so that orphans are found."""

RECIPE = """
[run]
name = "chaos"
dir = "{run_dir}"
seed = {seed}

[model]
path = "{model}"
dtype = "float32"
max_model_len = 512

[data]
dataset = "digits"
eval_samples = 1

[rollout]
num_generations = 4
num_mono = 1
max_completion_length = 16
replicas = {replicas}
concurrent_groups = 4
kv_cache_mib = 64

[train]
steps = {steps}
prompts_per_step = 3
learning_rate = 3e-4
checkpoint_every = {checkpoint_every}
threads = 1
"""


class StalledError(MarsError):
    """A run makes no progress any more."""


@dataclass
class Run:
    """A running stack.

    `say` prints one line for people. Everything that waits goes through `poll`, which restarts
    what died and notices a run that hangs.
    """

    folder: Path
    recipe: Recipe
    ports: Ports
    stack: Stack
    say: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    _deaths: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    _last_progress: tuple[object, float] = (None, 0.0)

    def __post_init__(self) -> None:
        self._last_progress = (None, time.monotonic())
        self.redis = Redis.from_url(EmbeddedValkey(self.folder / "valkey").url, socket_timeout=2.0, protocol=2, retry=None)
        self._http = httpx.Client(timeout=0.5, trust_env=False)

    @property
    def replicas(self) -> list[str]:
        return [f"rollout-{index}" for index in range(self.recipe.rollout.replicas)]

    @property
    def finished(self) -> bool:
        return self.stack.supervisor.finished(TRAINER)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return read_events(self.folder / "events.jsonl", kind)

    @property
    def step(self) -> int:
        """Of the newest step event; it goes back when the trainer does."""
        events = self.events("step")
        return int(events[-1]["step"]) if events else 0

    @property
    def furthest_step(self) -> int:
        return max((int(event["step"]) for event in self.events("step")), default=0)

    @property
    def progress(self) -> object:
        """Differs from what it was whenever one more group was scored or a step was done."""
        try:
            information: Any = self.redis.xinfo_stream(Streams(self.recipe.run.name).scored(Purpose.TRAIN))
            scored = information["last-generated-id"]
        except exceptions.RedisError:
            scored = None
        return scored, len(self.events("step"))

    def poll(self) -> None:
        """Let the supervisor look at its services, then pause a moment.

        Raises:
            ServiceFailedError: the supervisor gave a service up.
            StalledError: nothing has happened for STALL_S.
        """
        self.stack.poll()
        progress, now = self.progress, time.monotonic()
        if progress != self._last_progress[0]:
            self._last_progress = (progress, now)
        elif now - self._last_progress[1] > (limit_s := STALL_S if self.step else START_S):
            raise StalledError(f"no progress for {limit_s:g} s at step {self.step}; the logs are in {self.folder / 'logs'}")
        time.sleep(POLL_S)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Poll until the condition holds; False if it does not within the time, or before the run's end."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.finished or time.monotonic() > deadline:
                return condition()
            self.poll()
        return True

    def pid(self, name: str) -> int | None:
        """Process id of a service, None while it does not run."""
        return self.stack.supervisor.pids().get(name)

    def can_suffer(self, name: str) -> bool:
        """Whether a service is ready, and has not died so often of late that the supervisor would give it up."""
        died = self._deaths[name]
        while died and time.monotonic() - died[0] > MANY_DEATHS_S:
            died.popleft()
        return self.pid(name) is not None and len(died) < MANY_DEATHS - FEWEST_FREE_DEATHS and self._is_ready(name)

    def _is_ready(self, name: str) -> bool:
        if name == "valkey":
            try:
                return bool(self.redis.ping())
            except exceptions.RedisError:
                return False
        port = {"reward": self.ports.reward, TRAINER: self.ports.trainer}.get(name)
        if port is None:
            port = self.ports.rollout(self.replicas.index(name))
        try:
            return self._http.get(f"{service_url(HOST, port)}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def has_work(self, name: str) -> bool:
        """Whether a replica holds prompts at this moment."""
        try:
            consumers: Any = self.redis.xinfo_consumers(Streams(self.recipe.run.name).prompts, GROUP)
        except exceptions.RedisError:
            return False
        return any(consumer["name"].decode() == name and consumer["pending"] for consumer in consumers)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a service the signal that ends it; returns its process id."""
        pid = self.stack.supervisor.pids()[name]
        os.kill(pid, number)
        self._deaths[name].append(time.monotonic())
        return pid

    def wait_gone(self, name: str, pid: int, timeout_s: float = 30.0) -> bool:
        """Wait until a service's process has ended; the supervisor does not look meanwhile, so nothing is restarted yet."""
        deadline = time.monotonic() + timeout_s
        while self.pid(name) == pid and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.pid(name) != pid

    def close(self) -> None:
        self.redis.close()
        self._http.close()


@contextmanager
def observed_run(
    folder: Path,
    *,
    replicas: int,
    steps: int,
    seed: int,
    checkpoint_every: int = 3,
    faults: str = "",
    say: Callable[[str], None] = print,
) -> Iterator[Run]:
    """A running stack of the tiny policy in a new folder; all of it ends on exit.

    Args:
        faults: MARS_FAULT of every service.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".toml")
    text = RECIPE.format(
        run_dir=folder, seed=seed, model=ROOT / "models/tiny", replicas=replicas, steps=steps, checkpoint_every=checkpoint_every
    )
    path.write_text(text, encoding="utf-8")
    ports = free_ports(replicas)
    with environment({"MARS_LEASE_S": f"{LEASE_S:g}", "MARS_FAULT": faults, RUN_VARIABLE: str(folder)}):
        recipe = load_recipe(path)
        with running_stack(path, recipe, ports=ports, trainer="once", say=lambda line: say(f"    {line}")) as stack:
            run = Run(folder, recipe, ports, stack, say)
            try:
                yield run
            finally:
                run.close()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with these variables and no other MARS_*."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("MARS_")]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_ports(replicas: int) -> Ports:
    """Ports that nothing uses.

    Raises:
        ConfigError: there are none.
    """
    for base in range(19_100, 29_100, 10):
        ports = Ports(base)
        try:
            for port in (ports.reward, ports.trainer, *(ports.rollout(index) for index in range(replicas))):
                bind(HOST, port).close()
        except ConfigError:
            continue
        return ports
    raise ConfigError("no free ports between 19100 and 29300")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every living process that a run started, itself or through others."""
    mine = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_VARIABLE) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                mine.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in mine if process.pid != os.getpid()]
