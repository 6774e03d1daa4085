"""A replica as a process: what ends it, how it says so, and that nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from mars_shared.contracts import PolicyVersion
from mars_shared.http import bind
from mars_shared.weights import WeightsStore
from mars_trainer.model import Policy
from mars_trainer.publish import policy_tensors
from rollout_fixtures import ReplicaProcess, RunFolder, free_port, make_run_folder, publish, stop_politely

DEAD_URL = "redis://127.0.0.1:9/0"


def run(recipe: Path, redis_url: str, port: int | None = None, **environment: str) -> tuple[int, str]:
    """Exit code and what was said of a replica that should end by itself."""
    command = [sys.executable, "-m", "mars_rollout", "--recipe", str(recipe), "--port", str(port or free_port())]
    done = subprocess.run(
        command, env=os.environ | {"MARS_REDIS_URL": redis_url} | environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


def only_line(said: str) -> str:
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("mars_rollout: ")]
    return line


def test_a_redis_that_does_not_answer_is_named(run_folder: RunFolder) -> None:
    code, said = run(run_folder.recipe_path, DEAD_URL)
    assert code == 1
    assert "no answer from Redis at 127.0.0.1:9" in only_line(said)


def test_a_taken_port_is_named(run_folder: RunFolder, redis_url: str) -> None:
    port = free_port()
    with bind("127.0.0.1", port):
        code, said = run(run_folder.recipe_path, redis_url, port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in only_line(said)


def test_serving_beyond_loopback_needs_a_key(run_folder: RunFolder, redis_url: str) -> None:
    code, said = run(run_folder.recipe_path, redis_url, MARS_HOST="0.0.0.0")
    assert code == 2
    assert "MARS_API_KEY" in only_line(said)


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_model_folder_without_its_parts_is_named(missing: str, model_dir: Path, tmp_path: Path, redis_url: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / missing).unlink()
    code, said = run(make_run_folder(tmp_path, model).recipe_path, redis_url)
    assert code == 2
    assert str(model) in only_line(said)


def test_an_unknown_recipe_key_is_named(run_folder: RunFolder, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(run_folder.recipe_path.read_text() + "\n[rollouts]\nnum = 1\n")
    code, said = run(recipe, DEAD_URL)
    assert code == 2
    assert "unknown key rollouts" in only_line(said)


def until_gone(replica: ReplicaProcess, within_s: float = 30.0) -> None:
    """Fails with the survivors if a process of the session outlives its replica."""
    deadline = time.monotonic() + within_s
    while survivors := replica.session():
        assert time.monotonic() < deadline, survivors
        time.sleep(0.1)


def engine_process(replica: ReplicaProcess) -> psutil.Process | None:
    children = psutil.Process(replica.process.pid).children()
    return next((child for child in children if "resource_tracker" not in " ".join(child.cmdline())), None)


@dataclass
class Quartet:
    """Four replicas of one run that start together, each to be ended in its own way."""

    place: RunFolder
    killed: ReplicaProcess
    robbed: ReplicaProcess
    stopped: ReplicaProcess
    interrupted: ReplicaProcess


@pytest.fixture(scope="module")
def quartet(model_dir: Path, tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Quartet]:
    """Without any published version: they are ready with the base model's weights."""
    place = make_run_folder(tmp_path_factory.mktemp("quartet"), model_dir)
    names = ("killed", "robbed", "stopped", "interrupted")
    replicas = [ReplicaProcess(place, {"MARS_REDIS_URL": redis_url}, name) for name in names]
    try:
        for replica in replicas:
            replica.wait_ready()
        yield Quartet(place, *replicas)
    finally:
        for replica in replicas:
            replica.end()


@pytest.mark.engine
def test_kill_9_leaves_no_process_of_the_replica(quartet: Quartet) -> None:
    assert len(quartet.killed.session()) >= 2, "the engine is a process of its own"
    quartet.killed.process.kill()
    quartet.killed.process.wait()
    until_gone(quartet.killed)


@pytest.mark.engine
def test_a_dead_engine_ends_its_replica_with_one_clear_error(quartet: Quartet) -> None:
    engine = engine_process(quartet.robbed)
    assert engine is not None
    engine.kill()
    assert quartet.robbed.process.wait(timeout=60) == 1
    assert "mars_rollout: the engine died, so this replica ends" in quartet.robbed.log
    until_gone(quartet.robbed)


@pytest.mark.engine
def test_sigterm_ends_a_replica_cleanly(quartet: Quartet) -> None:
    assert stop_politely(quartet.stopped.process) == 0
    assert "Traceback" not in quartet.stopped.log
    until_gone(quartet.stopped)


@pytest.mark.engine
def test_an_engine_that_dies_while_its_weights_change_ends_its_replica_too(
    quartet: Quartet, trainer_policy: Policy, model_dir: Path
) -> None:
    """It is frozen first, so that the change is sent and never answered."""
    engine = engine_process(quartet.interrupted)
    assert engine is not None
    engine.suspend()
    tensors = dict(policy_tensors(trainer_policy.model, torch.float32))
    publish(WeightsStore(quartet.place.dir / "weights"), tensors, PolicyVersion(incarnation=1, step=1), model_dir)
    time.sleep(2.0)  # ten looks at HEAD: nothing outside the replica tells when the change was sent
    assert quartet.interrupted.process.poll() is None
    engine.kill()
    assert quartet.interrupted.process.wait(timeout=60) == 1
    assert "mars_rollout: the engine died" in quartet.interrupted.log
    until_gone(quartet.interrupted)


def test_the_engines_process_begins_without_the_codecs_compiler() -> None:
    """It imports its parent's main module first; a compiler that is loaded before vLLM can keep it from starting."""
    begins = (
        "import sys, mars_rollout.__main__, mars_rollout.engine.child; print({'numba', 'llvmlite', 'vllm'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", begins], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ending_a_replica_while_its_engine_starts_leaves_nothing(
    number: signal.Signals, model_dir: Path, tmp_path: Path, redis_url: str
) -> None:
    replica = ReplicaProcess(make_run_folder(tmp_path, model_dir), {"MARS_REDIS_URL": redis_url})
    try:
        while engine_process(replica) is None:
            assert replica.process.poll() is None, replica.log
            time.sleep(0.05)
        replica.process.send_signal(number)
        assert replica.process.wait(timeout=60) == (0 if number == signal.SIGTERM else -signal.SIGKILL), replica.log
        until_gone(replica)
    finally:
        replica.end()
