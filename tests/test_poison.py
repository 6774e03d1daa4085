"""Ten poisoned rows among two hundred: the run ends normally, and ten dead letters say why.

A real stack with one replica on a file of its own and a custom reward; Redis outlives it, so that its letters can be read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builders import image_bytes
from mars_shared.server import EmbeddedValkey
from mars_shared.telemetry import read_events

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parent.parent
MARS = Path(sys.executable).with_name("mars")
ROWS, STEPS, BATCH = 200, 19, 10
"""190 places and ten deaths: every row is asked exactly once."""
RECIPE = """
[run]
name = "poison"
dir = "{dir}/run"
[model]
path = "{model}"
dtype = "float32"
max_model_len = 512
[data]
train = [{{path = "{dir}/train.jsonl"}}]
test = [{{path = "{dir}/test.jsonl"}}]
[rollout]
num_generations = 2
num_mono = 0
max_completion_length = 4
kv_cache_mib = 64
[reward]
recipe = "{dir}/reward.py:reward"
time_limit_s = 0.5
[train]
steps = {steps}
prompts_per_step = {batch}
learning_rate = 1e-5
threads = 1
[self_test]
enabled = false
"""
REWARD = """
def reward(completion, truth, question):
    if "raise" in question:
        raise KeyError(question)
    while "hang" in question:
        pass
    return len(completion) % 2
"""


def poison(rows: list[dict[str, Any]], folder: Path) -> dict[int, str]:
    """Spoil ten rows; what each one's letter must say."""
    (folder / "torn.jpg").write_bytes(image_bytes((56, 56), format="JPEG")[:60])
    (folder / "text.png").write_text("no image")
    rows[3]["sources"][0]["image"] = "nowhere.png"
    rows[40]["sources"][0]["image"] = "gone/nowhere.png"
    rows[41]["sources"][0]["image"] = "torn.jpg"
    rows[77]["sources"][0]["image"] = "text.png"
    rows[90]["answer"] = 7
    rows[91]["answer"] = [["a", "box"]]
    for row, word in ((120, "raise"), (150, "raise"), (151, "hang"), (199, "hang")):
        rows[row]["question"] = f"{word} {row}"
    return {
        3: "nowhere.png",
        40: "gone/nowhere.png",
        41: "cannot be decoded",
        77: "line 78",
        90: "line 91: answer",
        91: "line 92: answer",
        120: "KeyError: 'raise 120'",
        150: "KeyError: 'raise 150'",
        151: "used more than 0.5 CPU seconds",
        199: "used more than 0.5 CPU seconds",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poison")
    (folder / "a.png").write_bytes(image_bytes((56, 56)))
    rows: list[dict[str, Any]] = [
        {"id": f"q{row}", "question": f"Which digit? {row}", "sources": [{"name": "visible", "image": "a.png"}], "answer": "7"}
        for row in range(ROWS)
    ]
    (folder / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (folder / "expected.json").write_text(json.dumps(poison(rows, folder)))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "recipe.toml").write_text(RECIPE.format(dir=folder, model=ROOT / "models" / "tiny", steps=STEPS, batch=BATCH))
    return folder


def test_a_run_with_ten_poisoned_rows_ends_normally_with_ten_dead_letters(folder: Path, valkey: EmbeddedValkey) -> None:
    environment = os.environ | {"MARS_REDIS_URL": valkey.url}
    command = [MARS, "train", folder / "recipe.toml", "--port", "17600"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    run = folder / "run"
    (finished,) = read_events(run / "events.jsonl", "finished")
    assert finished["step"] == STEPS
    trained = [event["metrics"]["groups/trained"] for event in read_events(run / "events.jsonl", "step")]
    assert trained == [BATCH] * STEPS, "each dead prompt was replaced"
    command = [MARS, "dead", "list", "--run", folder / "recipe.toml", "--json"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    letters = [json.loads(line) for line in listed.stdout.splitlines()]
    assert len(letters) == 10, listed.stdout + listed.stderr
    details = [shown(folder, letter["id"], environment) for letter in letters]
    for row, words in json.loads((folder / "expected.json").read_text()).items():
        about = [detail for detail in details if words in detail and mentions(detail, int(row))]
        assert len(about) == 1, f"row {row}: {len(about)} letters say {words!r}"


def mentions(detail: str, row: int) -> bool:
    return any(name in detail for name in (f"line {row + 1}:", f'q{row}"', f"q{row} ", f"/q{row}"))


def shown(folder: Path, letter: str, environment: dict[str, str]) -> str:
    command = [MARS, "dead", "show", letter, "--run", folder / "recipe.toml"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
