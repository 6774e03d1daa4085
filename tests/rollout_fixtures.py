"""What tests of the rollout service share: a tiny random policy, its history of versions, one engine.

A session has one engine in this process and one replica as a process of its own; starting one
takes 15 s and more.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from PIL import Image
from safetensors.torch import save_file

from mars_rollout.engine.environment import configure_environment
from mars_rollout.group import GroupMaker
from mars_rollout.policy import Policy as RolloutPolicy
from mars_rollout.pull import Puller
from mars_rollout.render import PromptRenderer
from mars_shared.blobs import BlobStore
from mars_shared.contracts import (
    FrameKind,
    PolicyVersion,
    Prompt,
    Purpose,
    SamplingSpec,
    Source,
    TextTruth,
    WeightIdentity,
    WeightManifest,
    WeightsKind,
)
from mars_shared.server import EmbeddedValkey
from mars_shared.settings import DataSection, DatasetName, Recipe, load_recipe
from mars_shared.weights import WeightsStore, model_fingerprint
from mars_shared.weights.bits.sums import ModelSums
from mars_shared.weights.source import VolumeSource
from mars_trainer.model import Policy as TrainerPolicy
from mars_trainer.model import load_policy
from mars_trainer.publish import bits_of, policy_tensors
from mars_trainer.tiny import write_tiny

RUN = "rollout-test"
MAX_MODEL_LEN = 384
MAX_PIXELS = 512 * 512
DATA = DataSection(dataset=DatasetName.DIGITS, source_names=("visible", "infrared", "depth"), max_image_pixels=MAX_PIXELS)
VERSIONS = 10
RECIPE = """
[run]
name = "{run}"
dir = "{dir}"
[model]
path = "{model}"
dtype = "float32"
max_model_len = {max_model_len}
[data]
dataset = "digits"
max_image_pixels = {max_pixels}
[rollout]
num_generations = 4
max_completion_length = 24
kv_cache_mib = 64
[train]
steps = 1
prompts_per_step = 1
learning_rate = 1e-3
"""


@dataclass(frozen=True)
class History:
    """Versions 1.1 to 1.10 of a policy, the odd ones with another vision tower alone."""

    store: WeightsStore
    manifests: list[WeightManifest]
    tensors: list[dict[str, torch.Tensor]]

    def files(self, index: int) -> list[Path]:
        return [self.store.verify(self.manifests[index]) / "model.safetensors"]


@dataclass
class RunFolder:
    """A run folder with its recipe."""

    dir: Path
    recipe_path: Path
    recipe: Recipe
    blobs: BlobStore


def is_vision(name: str) -> bool:
    return "visual" in name


def perturbed(tensors: dict[str, torch.Tensor], *, seed: int, vision_only: bool) -> dict[str, torch.Tensor]:
    """A visibly different policy: noise on every weight, or on the vision tower's alone."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: tensor if vision_only and not is_vision(name) else tensor + 0.03 * torch.randn(tensor.shape, generator=noise)
        for name, tensor in tensors.items()
    }


def png(seed: int, width: int = 56, height: int = 56) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def make_prompt(blobs: BlobStore, *, task: str = "task-1", **changes: object) -> Prompt:
    """A training prompt about two noise images, for version 1.10 unless changed."""
    sources = tuple(
        Source(name=name, blob=blobs.put(png(seed)), media_type="image/png") for seed, name in enumerate(("visible", "infrared"))
    )
    sampling = SamplingSpec(num_generations=4, num_mono=2, temperature=1.0, top_p=1.0, max_completion_length=16, seed=11)
    values: dict[str, object] = {
        "task_id": task,
        "prompt_id": "sample-1",
        "run": RUN,
        "purpose": Purpose.TRAIN,
        "epoch": 0,
        "dispatch_index": 0,
        "question": "Which digit?",
        "sources": sources,
        "truth": TextTruth(text="7"),
        "box_frame": FrameKind.RESIZED,
        "sampling": sampling,
        "policy_version": PolicyVersion(incarnation=1, step=VERSIONS),
    }
    return Prompt.model_validate(values | changes)


def adhoc(prompt: Prompt) -> Prompt:
    """The same question without a wish for a version."""
    return prompt.model_copy(update={"purpose": Purpose.ADHOC, "policy_version": None})


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    write_tiny(folder, seed=5)
    return folder


@pytest.fixture(scope="session")
def trainer_policy(model_dir: Path) -> TrainerPolicy:
    """The trainer's side of the base model, in float32; tests load other weights into it."""
    torch.set_num_threads(1)
    return load_policy(model_dir)


@pytest.fixture(scope="session")
def run_folder(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    return make_run_folder(folder, model_dir)


def make_run_folder(folder: Path, model: Path) -> RunFolder:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(run=RUN, dir=folder, model=model, max_model_len=MAX_MODEL_LEN, max_pixels=MAX_PIXELS))
    return RunFolder(folder, path, load_recipe(path), BlobStore(folder / "blobs"))


@pytest.fixture(scope="session")
def history(model_dir: Path, run_folder: RunFolder) -> History:
    store = WeightsStore(run_folder.dir / "weights")
    history = History(store, [], [])
    tensors = dict(policy_tensors(load_policy(model_dir).model, torch.float32))
    for step in range(1, VERSIONS + 1):
        tensors = perturbed(tensors, seed=step, vision_only=step % 2 == 1)
        history.tensors.append(tensors)
        history.manifests.append(publish(store, tensors, PolicyVersion(incarnation=1, step=step), model_dir))
    return history


def publish(store: WeightsStore, tensors: dict[str, torch.Tensor], version: PolicyVersion, model: Path) -> WeightManifest:
    """A snapshot of that version, announced."""
    staged = store.stage()
    save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
    return store.publish(staged, identity=identity_of_tensors(tensors, version, model), kind=WeightsKind.SNAPSHOT)


def identity_of_tensors(tensors: dict[str, torch.Tensor], version: PolicyVersion, model: Path) -> WeightIdentity:
    sums = ModelSums()
    for name, tensor in tensors.items():
        sums.add(name, "float32", tuple(tensor.shape), bits_of(tensor))
    return WeightIdentity(run=RUN, version=version, model=model_fingerprint(model), dtype="float32", checksum=sums.checksum)


def policy_at(engine: Any, store: WeightsStore, model: Path, scratch: Path, **options: Any) -> RolloutPolicy:
    """A replica's policy that reads that store."""
    source = VolumeSource(store.root)
    puller = Puller(source, "replica-0", scratch, verify="full")
    return RolloutPolicy(engine, source, puller, model, **{"in_flight": "drain"} | options)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(run_folder: RunFolder) -> AsyncIterator[object]:
    """The real vLLM engine with the base model's weights; every test sets the version it needs."""
    configure_environment(threads=1, max_image_pixels=MAX_PIXELS)
    from mars_rollout.engine.vllm import VllmEngine

    engine = await VllmEngine.start(run_folder.recipe)
    yield engine
    await engine.shutdown()


@pytest.fixture(scope="session")
def renderer(model_dir: Path) -> PromptRenderer:
    return PromptRenderer(model_dir, MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def maker(engine: object, renderer: PromptRenderer, run_folder: RunFolder) -> GroupMaker:
    return GroupMaker(engine, renderer, run_folder.blobs, replica="in-process", data=DATA)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


class ReplicaProcess:
    """`python -m mars_rollout` in a session of its own."""

    def __init__(self, run_folder: RunFolder, environment: dict[str, str], name: str = "replica-0") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = run_folder.dir / f"{name}.log"
        command = [sys.executable, "-m", "mars_rollout", "--recipe", str(run_folder.recipe_path)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--name", name],
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> None:
        while True:
            assert self.process.poll() is None, self.log
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)

    def session(self) -> list[psutil.Process]:
        """Living processes of this replica's session, zombies left out."""
        return [process for process in psutil.process_iter() if self._belongs(process)]

    def _belongs(self, process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def end(self) -> None:
        for process in self.session():
            process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def reward_url(run_folder: RunFolder, redis_url: str) -> Iterator[str]:
    """The real reward service."""
    port = free_port()
    command = [sys.executable, "-m", "mars_reward", "--recipe", str(run_folder.recipe_path), "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"MARS_REDIS_URL": redis_url}, start_new_session=True)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def replica(run_folder: RunFolder, history: History, redis_url: str, reward_url: str) -> Iterator[ReplicaProcess]:
    """A replica that starts when version 1.10 is HEAD; the one that tests may talk to, not kill."""
    process = ReplicaProcess(run_folder, {"MARS_REDIS_URL": redis_url, "MARS_REWARD_URL": reward_url})
    try:
        process.wait_ready()
        yield process
    finally:
        process.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_politely(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait()
