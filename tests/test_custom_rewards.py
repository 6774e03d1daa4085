"""Custom rewards run isolated: what one item does to them costs that item and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mars_reward import custom
from mars_reward.custom import CustomReward
from mars_reward.metrics import FAILURES
from mars_reward.registry import RECIPES, offered, score
from mars_shared.contracts import BoxesTruth, ScoreItem, TextTruth
from mars_shared.errors import (
    ConfigError,
    RewardCpuTimeoutError,
    RewardDiedError,
    RewardError,
    RewardNotFiniteError,
    RewardTimeoutError,
)
from reward_traps import SPEC

REWARDS = """
from __future__ import annotations

import asyncio, subprocess, sys
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
def trap() -> Iterator[CustomReward]:
    reward = CustomReward(SPEC, 0.5, sandboxes=1).start()
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


@pytest.mark.parametrize(
    ("completion", "error", "message"),
    [
        ("loop", RewardCpuTimeoutError, r"used more than 0.5 CPU seconds \(reward.time_limit_s\)"),
        ("regex", RewardCpuTimeoutError, "used more than 0.5 CPU seconds"),
        ("sleep", RewardTimeoutError, "took longer than 2 s by the clock"),
        ("never", RewardTimeoutError, "took longer than 2 s by the clock"),
        ("exit", RewardDiedError, r"ended its process \(exit code 0\)"),
        ("close", RewardDiedError, "closed the pipe of its process"),
    ],
)
def test_what_never_comes_back_is_an_error_of_its_own_kind_and_costs_one_item(
    trap: CustomReward, monkeypatch: pytest.MonkeyPatch, completion: str, error: type[RewardError], message: str
) -> None:
    if error is RewardTimeoutError:
        monkeypatch.setattr(custom, "WALL_FACTOR", 2.0)
    monkeypatch.setattr(custom, "EXIT_S", 0.5)
    with pytest.raises(RewardError, match=message) as raised:
        trap(item(completion))
    assert type(raised.value) is error
    monkeypatch.undo()
    assert trap(item("fine")).parts == {"trap": 1.0}


def test_a_process_that_died_between_two_items_costs_none(trap: CustomReward) -> None:
    assert trap(item("fine")).parts == {"trap": 1.0}
    (sandbox,) = trap._started
    assert sandbox._process is not None
    sandbox._process.kill()
    sandbox._process.wait()
    assert trap(item("fine")).parts == {"trap": 1.0}


def test_a_module_that_fails_at_a_second_start_is_a_failed_reward_and_no_wrong_setting(tmp_path: Path) -> None:
    module = tmp_path / "fragile.py"
    module.write_text("import os\ndef reward(completion, truth, *, question):\n    os._exit(3)\n")
    reward = CustomReward(f"{module}:reward", 5.0, sandboxes=1).start()
    with pytest.raises(RewardDiedError, match=r"\(exit code 3\)"):
        reward(item("x"))
    module.write_text("import no_such_module_at_all")
    with pytest.raises(RewardError, match="No module named 'no_such_module_at_all'"):
        reward(item("x"))
    reward.stop()


def test_no_sandbox_outlives_a_killed_service() -> None:
    service = subprocess.Popen([sys.executable, "-c", OWNER, SPEC], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert service.stdout is not None
    sandbox = psutil.Process(int(service.stdout.readline()))
    service.kill()
    service.wait()
    sandbox.wait(timeout=20)
    service.stdout.close()


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("surrogate", r"ValueError: a text that no encoder takes: \\ud800"),
        ("text", "ValueError: could not convert string to float: 'good'"),
        ("none", "TypeError"),
        ("empty", "trap returned no parts; expected a number or named parts"),
    ],
)
def test_a_function_that_fails_names_its_error_with_the_traceback_and_goes_on(
    trap: CustomReward, completion: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message) as raised:
        trap(item(completion))
    assert raised.value.reason == "reward failed"
    assert "Traceback" in raised.value.traceback and message.partition(":")[0] in raised.value.traceback
    assert trap(item("fine")).parts == {"trap": 1.0}


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("nan", "c 1: reward part 'trap' is nan; expected a finite number"),
        ("inf", "c 1: reward part 'large' is inf; expected a finite number"),
        ("sum", r"c 1: the sum of the reward's parts \{'a': 1e\+308, 'b': 1e\+308\} is beyond float64"),
    ],
)
def test_a_reward_that_is_not_finite_is_an_error_that_names_completion_and_part(completion: str, message: str) -> None:
    counter = FAILURES.labels(reason="reward is not finite")._value
    before = counter.get()
    with offered(SPEC, time_limit_s=5), pytest.raises(RewardNotFiniteError, match=message):
        score(item(completion), SPEC, what="c 1")
    assert counter.get() == before + 1


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
