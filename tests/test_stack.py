"""The whole system as a user runs it: `mars up` with two replicas, in order from start to Ctrl-C.

One start serves the module; the tests follow one run through its life.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from mars_shared.contracts import Kind
from mars_shared.records.groups import GroupRecord, read_groups
from mars_shared.telemetry import read_events
from mars_trainer.datasets import load_dataset

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parent.parent
PORT = 18100
STEPS = 12
MARS = Path(sys.executable).with_name("mars")
RECIPE = """
[run]
name = "stack-test"
dir = "{run_dir}"
seed = 7

[model]
path = "{model}"
dtype = "float32"
max_model_len = 512

[data]
dataset = "digits"
eval_samples = 8

[rollout]
num_generations = 6
num_mono = 1
mono_view = "repeat"
mono_decoding = "greedy"
max_completion_length = 16
replicas = 2
kv_cache_mib = 64

[train]
steps = {steps}
prompts_per_step = 4
learning_rate = 3e-4
checkpoint_every = 4
threads = 1
"""


@dataclass
class Stack:
    """A running `mars up`."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    recipe: Path
    output: Path

    def url(self, offset: int = 0) -> str:
        return f"http://127.0.0.1:{PORT + offset}"

    def events(self, kind: str) -> list[dict[str, Any]]:
        return read_events(self.run_dir / "events.jsonl", kind)

    def wait(self, what: str, condition: Callable[[], bool], *, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"mars up ended while waiting for {what}:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.output.read_text()}"
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Every process whose environment or command line names this run."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MARS_TEST_RUN") == str(self.run_dir) and process.status() != psutil.STATUS_ZOMBIE:
                    mine.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return mine


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    run_dir, recipe, output = folder / "run", folder / "recipe.toml", folder / "output.txt"
    recipe.write_text(RECIPE.format(run_dir=run_dir, steps=STEPS, model=ROOT / "models" / "tiny"))
    environment = os.environ | {"MARS_TEST_RUN": str(run_dir), "MARS_LEASE_S": "5"}
    environment.pop("MARS_REDIS_URL", None)
    with output.open("wb") as file:
        process = subprocess.Popen(
            [MARS, "up", recipe, "--port", str(PORT)], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    running = Stack(process, run_dir, recipe, output)
    yield running
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    for left in running.processes():
        left.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def groups_of_step_one(stack: Stack) -> list[GroupRecord]:
    return [group for group in read_groups(stack.run_dir / "groups") if (group.occasion, group.step) == ("step", 1)]


def test_the_run_evaluates_its_start_and_takes_steps(stack: Stack) -> None:
    stack.wait("first evaluation", lambda: bool(stack.events("evaluation")))
    stack.wait("second step", lambda: len(stack.events("step")) >= 2)
    assert stack.events("evaluation")[0]["step"] == 0
    assert stack.events("evaluation")[0]["samples"] == 8


def test_a_killed_replica_leaves_no_orphan_and_the_run_finishes(stack: Stack) -> None:
    stack.wait("both replicas", lambda: answers(stack.url()) and answers(stack.url(1)))
    victim = next(p for p in stack.processes() if "mars_rollout" in p.cmdline() and "rollout-0" in p.cmdline())
    family = [victim, *victim.children(recursive=True)]
    assert len(family) >= 2, "a replica has an engine process of its own"
    os.kill(victim.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)
    assert not [process for process in family if process.is_running()]
    stack.wait("the end of the run", lambda: bool(stack.events("finished")))
    assert [event["step"] for event in stack.events("step")] == list(range(1, STEPS + 1))
    assert "rollout-0 ended with signal 9" in stack.output.read_text()


def test_advantages_of_the_first_step_are_those_of_the_paper(stack: Stack) -> None:
    groups = groups_of_step_one(stack)
    assert groups
    for group in groups:
        r = [answer.reward for answer in group.answers if answer.kind is Kind.MULTI]
        s = [answer.reward for answer in group.answers if answer.kind is Kind.MONO]
        assert (len(r), len(s)) == (6, 2)
        pool = [*r, *s]
        mu, sigma = statistics.mean(pool), statistics.stdev(pool)
        expected = [(reward - mu) / (sigma + 1e-6) for reward in r] if sigma else [0.0] * 6
        assert [answer.advantage for answer in group.answers] == [
            *(pytest.approx(value, abs=1e-9) for value in expected),
            None,
            None,
        ]
        assert group.statistics is not None and group.statistics.pool_mean == pytest.approx(mu, abs=1e-12)
        assert group.gain == pytest.approx(statistics.mean(r) - statistics.mean(s), abs=1e-12)


def test_rewards_are_those_of_the_answers(stack: Stack) -> None:
    for group in groups_of_step_one(stack):
        assert group.truth is not None and group.truth.kind == "text"
        for answer in group.answers:
            right = f"<answer>{group.truth.text}</answer>" in answer.text
            assert answer.parts["accuracy"] == float(right), answer.text
            assert answer.reward == pytest.approx(sum(answer.parts.values()))


def test_the_run_began_with_a_self_test(stack: Stack) -> None:
    (event,) = stack.events("self_test")
    assert event["logprob_difference_max"] < 1e-4
    assert event["tokens"] >= 4 and event["image_tokens"] > 0
    assert "self-test: sampler and trainer agree" in stack.output.read_text()


def test_sampler_and_trainer_agree_on_every_step(stack: Stack) -> None:
    for event in stack.events("step"):
        assert event["metrics"]["sampler/logprob_difference_max"] < 1e-4


def test_stages_of_a_step_sum_to_its_wall_time(stack: Stack) -> None:
    for event in stack.events("step"):
        start, end = event["window"]
        assert math.fsum(event["seconds"].values()) == pytest.approx(end - start, abs=1e-6)
        assert event["seconds"]["generation"] > 0 and event["seconds"]["training"] > 0


def test_every_replica_serves_the_last_version(stack: Stack) -> None:
    stack.wait("the killed replica's return", lambda: answers(stack.url()) and answers(stack.url(1)))
    run = httpx.get(f"{stack.url(200)}/v1/run").json()
    assert (run["state"], run["step"], run["steps"]) == ("finished", STEPS, STEPS)
    for replica in (0, 1):
        assert httpx.get(f"{stack.url(replica)}/v1/version").json()["version"] == run["version"]
        assert "ready to answer" in (stack.run_dir / "logs" / f"rollout-{replica}.log").read_text(), "vLLM leaves our log alone"


def write_pair(folder: Path) -> tuple[Path, Path, str]:
    """Two image files of a held-out sample and its answer."""
    sample = load_dataset("digits").test[0]
    paths = [folder / f"{name}.png" for name in sample.images]
    for path, data in zip(paths, sample.images.values(), strict=True):
        path.write_bytes(data)
    assert sample.truth.kind == "text"
    return paths[0], paths[1], sample.truth.text


def test_mars_rollout_prints_scored_completions_of_the_users_own_files(stack: Stack, tmp_path: Path) -> None:
    visible, infrared, truth = write_pair(tmp_path)
    images = ["--image", f"visible={visible}", "--image", f"infrared={infrared}"]
    command = [MARS, "rollout", *images, "--truth", truth, "--num-generations", "3", "--url", stack.url(), "Which digit?"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("multi") >= 3
    assert result.stdout.count("mono") >= 2
    assert "accuracy" in result.stdout and "gain" in result.stdout


def test_curl_gets_the_same_group_as_json(stack: Stack, tmp_path: Path) -> None:
    visible, infrared, truth = write_pair(tmp_path)
    form = [f"visible=@{visible}", f"infrared=@{infrared}", "question=Which digit?", f"truth={truth}", "num_generations=3"]
    command = ["curl", "-sS", *(part for field in form for part in ("-F", field)), f"{stack.url()}/v1/rollouts"]
    answer = json.loads(subprocess.check_output(command))
    completions = answer["group"]["completions"]
    assert [c["kind"] for c in completions] == ["multi"] * 3 + ["mono"] * 2
    assert [c["source"] for c in completions] == [None] * 3 + ["visible", "infrared"]
    assert len(answer["scores"]) == 5
    assert all(len(c["token_ids"]) == len(c["logprobs"]) for c in completions)


def test_the_openai_client_asks_the_trained_policy(stack: Stack, tmp_path: Path) -> None:
    import base64

    visible, infrared, _ = write_pair(tmp_path)
    client = openai.OpenAI(base_url=f"{stack.url()}/v1", api_key="unused")
    content: list[dict[str, object]] = []
    for name, path in (("visible", visible), ("infrared", infrared)):
        url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        content += [
            {"type": "text", "text": f"{name}: "},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": " "},
        ]
    content.append({"type": "text", "text": "Which digit?"})
    answer = client.chat.completions.create(
        model="policy",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
        max_tokens=16,
        temperature=0,
    )
    assert "<answer>" in (answer.choices[0].message.content or "")


def test_mars_status_names_every_service_and_version(stack: Stack) -> None:
    result = subprocess.run([MARS, "status", stack.run_dir], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    for text in ("rollout-0", "rollout-1", "reward", f"finished, step {STEPS}/{STEPS}", f"serves policy 1.{STEPS}"):
        assert text in result.stdout


def test_a_second_mars_up_on_the_same_run_is_refused(stack: Stack) -> None:
    result = subprocess.run([MARS, "up", stack.recipe, "--port", "18500"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert str(stack.run_dir) in result.stderr


def test_ctrl_c_ends_everything(stack: Stack) -> None:
    stack.process.send_signal(signal.SIGINT)
    stack.process.wait(60)
    deadline = time.monotonic() + 10
    while stack.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process.cmdline() for process in stack.processes()] == []
    assert not (stack.run_dir / "stack.json").exists()
