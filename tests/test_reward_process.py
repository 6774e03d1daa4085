"""The reward service as a process: it serves, ends on a signal, and refuses to start in one line."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mars_reward.__main__ import main
from mars_shared.queue import DeadLetter, Queue, Streams
from mars_shared.server import EmbeddedValkey

RECIPE = """
[run]
name = "reward-test"
dir = "{dir}"
[model]
path = "{dir}/model"
max_model_len = 256
[data]
dataset = "digits"
[rollout]
num_generations = 2
max_completion_length = 16
[train]
steps = 1
prompts_per_step = 1
learning_rate = 1e-3
"""


def start(tmp_path: Path, redis_url: str, port: int, **environment: str) -> subprocess.Popen[str]:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(dir=tmp_path))
    command = [sys.executable, "-m", "mars_reward", "--recipe", str(recipe), "--port", str(port)]
    env = os.environ | {"MARS_REDIS_URL": redis_url, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("reward", "code"), [("paper", 0), ("mine.py:good", 0), ("mine.py:god", 2)])
def test_a_recipes_reward_can_be_checked_without_a_service(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reward: str, code: int
) -> None:
    clean_environment.chdir(tmp_path)
    Path("mine.py").write_text("def good(completion, truth, *, question):\n    return 1.0\n")
    Path("recipe.toml").write_text(RECIPE.format(dir=tmp_path) + f'[reward]\nrecipe = "{reward}"')
    assert main(["--check", "--recipe", "recipe.toml"]) == code
    said = capsys.readouterr()
    assert said.out == ("" if code else f"reward: {reward!r} is there\n")
    assert ("mars_reward: reward 'mine.py:god'" in said.err) == bool(code)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def dead_letter_of(url: str, payload: bytes) -> DeadLetter:
    """Put an entry that is no group, and wait until the worker gave it up."""
    queue, streams = Queue(url), Streams("reward-test")
    await queue.put(streams.rollouts, payload, dedupe_key="k", bound=10)
    async with asyncio.timeout(60):
        while not await queue.depth(streams.dead):
            await asyncio.sleep(0.02)
    (letter,) = await queue.dead("reward-test")
    await queue.close()
    return letter


def test_the_process_serves_http_and_queue_until_sigterm_and_leaves_cleanly(tmp_path: Path) -> None:
    port = free_port()
    with EmbeddedValkey(tmp_path / "valkey") as valkey, start(tmp_path, valkey.url, port) as process:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(retries=8), base_url=f"http://127.0.0.1:{port}") as client:
                assert client.get("/readyz").status_code == 200
                item = {"completion": "<answer>2</answer>", "truth": {"kind": "text", "text": "two"}}
                assert client.post("/v1/score", json={"items": [item]}).json()["scores"][0]["reward"] == 1.25
            assert asyncio.run(dead_letter_of(valkey.url, b"garbage")).reason == "bad input"
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 0
        assert "Traceback" not in errors


def ends_with_one_line(process: subprocess.Popen[str], exit_code: int, *expected: str) -> None:
    with process:
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == exit_code
    (line,) = (line for line in errors.splitlines() if line.startswith("mars_reward: "))
    assert all(word in line for word in expected), line
    assert "Traceback" not in errors


def test_a_redis_that_does_not_answer_ends_the_start_with_one_line(tmp_path: Path) -> None:
    port = free_port()
    process = start(tmp_path, f"redis://:secret@127.0.0.1:{port}/0", free_port())
    ends_with_one_line(process, 1, f"no answer from Redis at 127.0.0.1:{port}")


def test_a_taken_port_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "valkey") as valkey, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ends_with_one_line(start(tmp_path, valkey.url, port), 2, f"cannot listen on 127.0.0.1:{port}")


def test_a_public_address_without_a_key_ends_the_start_with_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "redis://127.0.0.1:1/0", free_port(), MARS_HOST="0.0.0.0")
    ends_with_one_line(process, 2, "MARS_API_KEY")


def test_the_service_brings_neither_torch_nor_vllm() -> None:
    code = "import sys, mars_reward.__main__; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
