"""Custom rewards run isolated: what one item does to them costs that item and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mars_reward.custom import CustomReward
from mars_reward.metrics import TIME_OUTS
from mars_reward.registry import RECIPES, offered, score
from mars_shared.contracts import BoxesTruth, ScoreItem, TextTruth
from mars_shared.errors import ConfigError, RewardError

REWARDS = """
from __future__ import annotations

import asyncio, os, re, subprocess, sys, time
from dataclasses import dataclass

LOCK = asyncio.Lock()

@dataclass
class Judge:
    name: str = "a module may define dataclasses"

def length(completion, truth, *, question):
    print("prints do no harm")
    subprocess.run([sys.executable, "-c", "import sys; sys.stdin.read()"], check=True)  # reads no item away
    return len(completion) / 10

async def patient(completion, truth, *, question):
    async with LOCK:  # belongs to one event loop
        await asyncio.sleep(0.01)
    return {"question": float(question == "Which digit?"), "truth": float(truth == "7")}

def boxes(completion, truth, *, question):
    return float(truth == [[1.0, 2.0, 3.0, 4.0]])

def trap(completion, truth, *, question):
    if completion == "loop":
        while True: pass
    if completion == "regex":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if completion == "exit":
        os._exit(0)
    if completion == "sleep":
        time.sleep(600)
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "nan":
        return float("nan")
    if completion == "text":
        return "good"
    return 1.0

def trl_style(prompts, completions, answer, **columns):
    assert columns["ground_truth"] == answer
    return [float(a in c) + len(p) for p, c, a in zip(prompts, completions, answer)]

def trl_wrong(prompts, completions, **columns):
    return 1.0

not_callable = 7
"""


OWNER = """
import sys
from mars_reward.custom import CustomReward
from mars_shared.contracts import ScoreItem, TextTruth
reward = CustomReward(sys.argv[1], 60.0, sandboxes=1).start()
print(reward._started[0]._process.pid, flush=True)
reward(ScoreItem(completion="sleep", truth=TextTruth(text="7")))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def trap(file: Path) -> Iterator[CustomReward]:
    reward = CustomReward(f"{file}:trap", 0.5, sandboxes=1).start()
    yield reward
    reward.stop()


def item(completion: str) -> ScoreItem:
    return ScoreItem(completion=completion, truth=TextTruth(text="7"), question="Which digit?")


@pytest.mark.parametrize(
    ("function", "parts"),
    [("length", {"length": 0.5}), ("patient", {"question": 1.0, "truth": 1.0})],
)
def test_a_function_of_a_file_scores_sync_or_async(file: Path, function: str, parts: dict[str, float]) -> None:
    with offered(f"{file}:{function}", time_limit_s=5):
        found = score(item("abcde"), f"{file}:{function}")
    assert found.parts == parts and found.reward == pytest.approx(sum(parts.values()))
    assert f"{file}:{function}" not in RECIPES


def test_boxes_reach_the_function_as_lists(file: Path) -> None:
    truth = BoxesTruth(boxes=((1, 2, 3, 4),), width_px=10, height_px=10)
    with offered(f"{file}:boxes", time_limit_s=5):
        assert score(ScoreItem(completion="", truth=truth), f"{file}:boxes").reward == 1.0


def test_a_function_with_trls_signature_scores_through_the_adapter(file: Path) -> None:
    with offered(f"trl:{file}:trl_style", time_limit_s=5):
        # "7" stands in "it is 7": 1, and the prompt has 12 letters.
        assert score(item("it is 7"), f"trl:{file}:trl_style").reward == 13.0


@pytest.mark.parametrize(("completion", "cause"), [("loop", "cpu"), ("regex", "cpu"), ("exit", "exit"), ("sleep", "wall")])
def test_what_never_ends_costs_one_item(trap: CustomReward, completion: str, cause: str) -> None:
    counter = TIME_OUTS.labels(cause=cause)._value
    before = counter.get()
    found = trap(item(completion))
    assert (dict(found.parts), found.parsed) == ({}, False)
    assert counter.get() == before + 1
    assert trap(item("fine")).parts == {"trap": 1.0}


def test_a_process_that_died_between_two_items_costs_one_item_at_most(trap: CustomReward) -> None:
    assert trap(item("fine")).parts == {"trap": 1.0}
    (sandbox,) = trap._started
    assert sandbox._process is not None
    sandbox._process.kill()
    sandbox._process.wait()
    assert trap(item("fine")).parsed is False
    assert trap(item("fine")).parts == {"trap": 1.0}


def test_no_sandbox_outlives_a_killed_service(file: Path, tmp_path: Path) -> None:
    service = subprocess.Popen(
        [sys.executable, "-c", OWNER, f"{file}:trap"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert service.stdout is not None
    sandbox = psutil.Process(int(service.stdout.readline()))
    service.kill()
    service.wait()
    sandbox.wait(timeout=20)
    service.stdout.close()


@pytest.mark.parametrize(
    ("completion", "message"),
    [("raise", "KeyError: 'no such thing'"), ("nan", "gave nan for 'trap'; expected a finite number"), ("text", "ValueError")],
)
def test_a_function_that_fails_names_its_error_and_goes_on(trap: CustomReward, completion: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        trap(item(completion))
    assert trap(item("fine")).parts == {"trap": 1.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:nothing", "has no function 'nothing'"),
        ("{file}:not_callable", "has no function 'not_callable'"),
        ("{file}s:length", "no file .*rewards.pys; expected file.py:function"),
        ("no-such-entry-point", "no entry point 'no-such-entry-point' in the group mars.rewards"),
    ],
)
def test_a_wrong_specification_is_refused_at_the_start(file: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CustomReward(spec.format(file=file), 1.0).start()


def test_a_module_that_fails_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_at_all")
    with pytest.raises(ConfigError, match="ModuleNotFoundError: No module named 'no_such_module_at_all'"):
        CustomReward(f"{tmp_path}/broken.py:reward", 1.0).start()


def test_trls_signature_needs_one_number_an_item(file: Path) -> None:
    with offered(f"trl:{file}:trl_wrong", time_limit_s=5), pytest.raises(RewardError, match="expected a list with one number"):
        score(item("x"), f"trl:{file}:trl_wrong")


def test_items_that_were_not_offered_cannot_be_asked_for(file: Path) -> None:
    with pytest.raises(ConfigError, match="unknown; expected one of paper, released"):
        score(item("x"), f"{file}:length")
