"""A real run with all its services, once for all tests that look at one: tiny policy, boxes, one replica, a key.

test_page.py watches it go on, so the files of the others have names that come later: test_run_*.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mars_shared.telemetry import read_events
from prometheus_server import PrometheusServer

ROOT = Path(__file__).resolve().parent.parent
PORT = 18700
URLS = {name: f"http://127.0.0.1:{PORT + offset}" for name, offset in (("rollout", 0), ("reward", 100), ("trainer", 200))}
STEPS = 8
KEY = "a key of the tests"
MARS = Path(sys.executable).with_name("mars")
RECIPE = """
[run]
name = "live"
dir = "{run_dir}"
seed = 3

[model]
path = "{model}"
dtype = "float32"
max_model_len = 512

[data]
dataset = "scene"
source_names = ["visible", "infrared"]
eval_samples = 6

[rollout]
num_generations = 6
num_mono = 1
mono_view = "repeat"
mono_decoding = "greedy"
max_completion_length = 64
replicas = 1
kv_cache_mib = 64

[train]
steps = {steps}
prompts_per_step = 4
learning_rate = 3e-4
beta = 0.002
checkpoint_every = 4
threads = 1
"""


@dataclass
class LiveRun:
    """A running `mars up`, and a Prometheus that has watched it from its start."""

    process: subprocess.Popen[bytes]
    folder: Path
    recipe: Path
    output: Path
    environment: dict[str, str]
    prometheus: PrometheusServer

    def events(self, kind: str) -> list[dict[str, Any]]:
        return read_events(self.folder / "events.jsonl", kind)

    def wait(self, what: str, condition: Callable[[], object], *, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"mars up ended while waiting for {what}:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.output.read_text()}"
            time.sleep(0.2)

    def until_finished(self) -> None:
        self.wait("the last step", lambda: self.events("finished"), timeout_s=600)

    def scrape(self, service: str) -> str:
        """What Prometheus would be told."""
        answer = httpx.get(f"{URLS[service]}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        answer.raise_for_status()
        return answer.text

    def mars(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run another command beside it."""
        return subprocess.run([MARS, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    folder = tmp_path_factory.mktemp("live")
    run_dir, recipe, output = folder / "run", folder / "recipe.toml", folder / "output.txt"
    recipe.write_text(RECIPE.format(run_dir=run_dir, steps=STEPS, model=ROOT / "models" / "tiny"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MARS_")} | {"MARS_API_KEY": KEY}
    with output.open("wb") as file:
        command = [MARS, "up", recipe, "--port", str(PORT)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    targets = {service: [url.removeprefix("http://")] for service, url in URLS.items()}
    with PrometheusServer(folder, targets, api_key=KEY) as prometheus:
        yield LiveRun(process, run_dir, recipe, output, environment, prometheus)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(60)
