"""`mars watch`, and what shows how far long commands are: from hand-made events, by hand-made clocks."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from command_line import CommandLine, command_line
from mars_shared import bars
from mars_shared.bars import progress, tracked
from mars_shared.errors import InputError
from mars_shared.pace import Pace, duration
from mars_shared.progress import RunDisplay
from mars_shared.records.state import QueueState, RunState, ServiceState
from mars_shared.telemetry import EventLog
from mars_shared.terminal import printable
from mars_shared.watch import RunView
from mars_shared.watch_view import picture, sparkline

__all__ = ["command_line"]
HOSTILE = "[red]x\x1b[2J"


def step(number: int, time_s: float, **metrics: float) -> dict[str, Any]:
    common = {"reward": number / 10, "completions/mean_length": 8.0}
    return {"time": time_s, "event": "step", "step": number, "steps": 10, "metrics": common | metrics}


def state(time_s: float, **fields: Any) -> dict[str, Any]:
    told = RunState(
        state="collecting",
        step=3,
        steps=10,
        version="2.3",
        redis=True,
        queues={
            "prompts": QueueState(entries=4, claimed=1, oldest_s=130.0),
            "dead": QueueState(entries=0, claimed=0, oldest_s=0),
        },
        services=(
            ServiceState(service="rollout", name="rollout-0", seen_s=1.0, started=0.0, starts=3, in_hand=2, version="2.2", lag=1),
            ServiceState(service="reward", name=HOSTILE, seen_s=30.0, started=0.0, starts=1, in_hand=0),
        ),
    )
    return {"time": time_s, "event": "state", **told.model_copy(update=fields).model_dump(mode="json")}


EVALUATION = {
    "time": 90.0,
    "event": "evaluation",
    "step": 0,
    "samples": 64,
    "multi": 0.5,
    "mono": {HOSTILE: 0.25},
    "union": 0.75,
    "seconds": 9.0,
}
RUN = [
    {"time": 80.0, "event": "started", "incarnation": 1},
    EVALUATION,
    step(1, 100.0, gain=-0.5, conflict_rate=0.75),
    step(2, 110.0, gain=0.0, conflict_rate=0.5),
    {"time": 111.0, "event": "started", "incarnation": 2},  # and died before it came to anything
    {"time": 112.0, "event": "started", "incarnation": 3},
    {"time": 112.0, "event": "resumed", "step": 2, "incarnation": 3},
    {"time": 115.0, "event": "dead", "reason": "torn", "prompt_id": HOSTILE},
    step(3, 132.0, gain=0.5, conflict_rate=0.25),
    state(133.0),
]


def drawn(events: list[dict[str, Any]], *, now: float) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(picture(RunView.of(events), "runs/demo", now=now))
    return console.export_text()


def test_the_picture_tells_all_that_the_events_tell() -> None:
    text = drawn(RUN, now=135.0)
    lines = [" ".join(part.split()) for part in text.splitlines()]
    assert lines[0] == "runs/demo: collecting, policy 2.3"
    # Steps ended at 100, 110 and 132: two in 32 s, seven to go.
    assert any(line.endswith("step 3/10 16.0 s a step, 2 min left") for line in lines)
    assert "reward 0.300 ▁▅█" in lines and "gain 0.500 ▁▅█" in lines and "conflict 0.250 █▅▁" in lines
    assert "evaluation at step 0 (64 samples): multi 0.500 [red]x�[2J 0.250 union 0.750 (9 s)" in lines
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["rollout-0", "2.2", "1", "2", "3 s ago", "2"] in cells  # 1 s at the event, 2 s since
    assert ["[red]x�[2J", "-", "-", "0", "32 s ago !", "0"] in cells
    assert ["prompts", "4", "1", "2 min"] in cells and ["dead", "0", "0", "-"] in cells
    assert lines[-1] == "dead letters 1 restarts of the trainer 2"
    assert "\x1b" not in text


def test_an_evaluation_under_way_and_a_long_silence_are_told() -> None:
    evaluating = [
        {"time": 140.0 + done, "event": "evaluating", "step": 3, "done": 4 * done, "samples": 64} for done in (0, 5, 10)
    ]
    # 40 samples in 10 s, 24 to go.
    assert drawn([*RUN, *evaluating], now=151.0).startswith("runs/demo: evaluating 40/64 (4.0 samples a second, 6 s left)")
    assert "nothing heard for 50 s" in drawn(RUN, now=183.0)
    over = RunView.of([*RUN, *evaluating, EVALUATION | {"time": 152.0, "step": 3}])
    assert over.evaluating is None and over.evaluation is not None and over.evaluation["step"] == 3


def test_a_run_without_state_events_and_one_without_redis_say_so() -> None:
    assert "has not told of them yet" in drawn(RUN[:-1], now=133.0)
    assert "Redis does not answer" in drawn([*RUN, state(134.0, redis=False)], now=134.0)
    assert "no step yet" in drawn([], now=0.0)


def test_a_state_of_another_version_is_an_error_and_its_further_fields_are_none() -> None:
    assert RunView.of([{**state(1.0), "weather": "fine"}]).state is not None
    with pytest.raises(InputError, match="not of this version of mars"):
        RunView.of([{**state(1.0), "step": "many"}])


def test_the_last_step_ends_the_run_and_a_restart_takes_that_back() -> None:
    done = RunView.of([*RUN, {"time": 140.0, "event": "finished", "step": 10}])
    assert done.finished and done.left_s is None
    finished = {"time": 2.0, "event": "finished", "step": 10}
    assert not RunView.of([step(10, 1.0), finished, {"time": 3.0, "event": "resumed", "step": 8, "incarnation": 2}]).finished


def test_a_stopped_run_says_so_until_it_is_started_again() -> None:
    stopped = [*RUN, {"time": 140.0, "event": "stopped", "step": 3}]
    view = RunView.of(stopped)
    assert (view.stopped, view.ended, view.left_s) == (True, True, None)
    assert drawn(stopped, now=999.0).splitlines()[0].strip() == "runs/demo: stopped, policy 2.3"  # and of no silence
    assert not RunView.of([*stopped, {"time": 150.0, "event": "started", "incarnation": 4}]).ended


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in RUN))
    return tmp_path


def test_json_is_one_object_with_state_metrics_pace_and_counts(run_dir: Path, command_line: CommandLine) -> None:
    said = json.loads(command_line("watch", str(run_dir), "--json").stdout)
    assert said["folder"] == str(run_dir) and (said["step"], said["steps"], said["finished"]) == (3, 10, False)
    assert (said["steps_per_s"], said["left_s"]) == (2 / 32, 7 * 16.0)
    assert said["metrics"]["gain"] == 0.5 and said["evaluation"]["multi"] == 0.5
    assert RunState.model_validate(said["state"]).services[0].lag == 1 and said["state_time"] == 133.0
    assert (said["dead"], said["restarts"], said["time"]) == (1, 2, 133.0)


def test_once_prints_one_picture_and_ends(run_dir: Path, command_line: CommandLine) -> None:
    done = command_line("watch", str(run_dir), "--once")
    assert done.returncode == 0 and done.stdout.startswith(f"{run_dir}: collecting") and "rollout-0" in done.stdout


def test_elsewhere_than_on_a_terminal_lines_follow_until_the_run_has_finished(run_dir: Path, command_line: CommandLine) -> None:
    events, began = EventLog(run_dir / "events.jsonl"), time.monotonic()
    coming = [
        ("step", {key: value for key, value in step(10, 0.0).items() if key not in ("time", "event")}),
        ("dead", {"reason": "torn\x1b[2J", "prompt_id": HOSTILE}),
        ("finished", {"step": 10, "weights": "f" * 64}),
    ]

    def write() -> None:
        if coming and time.monotonic() - began > 0.3:
            kind, fields = coming.pop(0)
            events.write(kind, **fields)

    lines = command_line("watch", str(run_dir), meanwhile=write).stdout.splitlines()
    assert lines[0] == f"{run_dir}: collecting, step 3/10"
    assert lines[1].startswith("step 10/10  reward 1.000  length 8.0")
    assert lines[2:] == ["dead letter: [red]x�[2J torn�[2J", f"finished at step 10, weights {'f' * 16}"]


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path, command_line: CommandLine) -> None:
    done = command_line("watch", str(tmp_path))
    assert done.returncode == 2 and f"{tmp_path} is no run folder" in done.stderr


@pytest.mark.parametrize(
    ("values", "blocks"), [([1.0], "▅"), ([2.0, 2.0], "▅▅"), ([0.0, 7.0], "▁█"), ([0.0, 1.0, 3.0, 7.0], "▁▂▄█")]
)
def test_a_sparkline_has_a_block_a_value_from_the_least_to_the_greatest(values: list[float], blocks: str) -> None:
    assert sparkline(values) == blocks


def test_a_pace_is_that_of_the_last_moments_and_begins_anew_when_less_is_done() -> None:
    pace = Pace()
    assert pace.rate is None and pace.text(10, "row") == ""
    for time_s, done in ((0.0, 0), (0.1, 2), (0.2, 4), (1.0, 20)):  # what is closer than half a second is one moment
        pace.see(time_s, done)
    assert (pace.rate, pace.left_s(100), pace.text(100, "row")) == (20.0, 4.0, "20.0 rows a second, 4 s left")
    pace.see(5.0, 1)
    assert pace.rate is None
    pace.see(15.0, 2)
    assert pace.text(None, "step") == "10.0 s a step"


def test_a_pace_looks_back_over_seconds_however_quick_the_beat() -> None:
    pace = Pace()
    for number in range(50):
        pace.see(0.1 * number, number)
    for number in range(1, 51):
        pace.see(4.9 + 0.02 * number, 49 + number)
    assert pace.rate == pytest.approx(99 / 5.9)  # of the last 20 alone it would be 50


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5_900, "98 min"), (11_100, "3 h 05 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_rounded_to_what_people_ask_for(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("char", ["\x1b", "\n", "\r", "\x07", "\u202e", "\u200b", "\x9b"])
def test_what_could_act_on_a_terminal_is_replaced(char: str) -> None:
    assert printable(f"a{char}b") == "a�b"
    assert printable("ä 字 ▁ [red]") == "ä 字 ▁ [red]"


class Clock:
    """Stands in for `time` where bars look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_plain_progress_is_a_line_every_ten_seconds_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(), io.StringIO()
    monkeypatch.setattr(bars, "time", clock)
    with progress("checking", "row", 100, console=Console(file=said, width=20)) as advance:
        for done in range(1, 25):
            clock.now += 1.0
            advance(done)
    assert said.getvalue().splitlines() == [
        "checking: 10 of 100 rows, 1.0 s a row, 90 s left",
        "checking: 20 of 100 rows, 1.0 s a row, 80 s left",
    ]


def test_a_bar_on_a_terminal_counts_and_leaves_what_was_printed(capsys: pytest.CaptureFixture[str]) -> None:
    said = io.StringIO()
    console = Console(file=said, width=100, force_terminal=True)
    with progress("[red]check\x1b", "row", 4, console=console) as advance:
        advance(3)
        print("data")
        time.sleep(0.2)
    assert "3/4" in said.getvalue() and "[red]check�" in said.getvalue() and "data" not in said.getvalue()
    assert capsys.readouterr().out == "data\n"


def test_tracked_items_come_through_as_they_are() -> None:
    with tracked("abc", "reading", "letter") as letters:
        assert list(letters) == ["a", "b", "c"]


def shown(events: list[dict[str, Any]], *, terminal: bool) -> str:
    said = io.StringIO()
    display = RunDisplay(Console(file=said, width=150, force_terminal=terminal))
    for event in events:
        display.show(event)
    display.close()
    return said.getvalue()


def test_plain_lines_of_a_run_tell_pace_and_time_left_of_steps_and_evaluations() -> None:
    steps = [step(number, 10.0 * number) for number in range(1, 11)]
    evaluating = [{"time": 200.0 + at, "event": "evaluating", "step": 10, "done": at, "samples": 40} for at in (0, 5, 12, 15, 23)]
    assert shown([*steps, *evaluating], terminal=False).splitlines() == [
        "step 1/10  reward 0.100  length 8.0",
        "step 5/10  reward 0.500  length 8.0  (10.0 s a step, 50 s left)",
        "step 10/10  reward 1.000  length 8.0",
        "evaluating 5/40  (1.0 s a sample, 35 s left)",
        "evaluating 15/40  (1.0 s a sample, 25 s left)",
    ]


def test_a_terminal_shows_bars_of_starting_training_and_evaluating() -> None:
    said = io.StringIO()
    display = RunDisplay(Console(file=said, width=150, force_terminal=True))
    display.starting(2, 5)
    display.show(step(4, 40.0))
    display.show({"time": 41.0, "event": "evaluating", "step": 4, "done": 7, "samples": 40})
    time.sleep(0.2)
    display.starting(5, 5)
    display.close()
    for words in ("starting", "2/5", "training", "4/10", "reward 0.400", "evaluating", "7/40"):
        assert words in said.getvalue()


def test_steps_that_a_restart_repeats_count_as_done_last() -> None:
    first = [step(number, 10.0 * number) for number in (1, 2, 3)]
    again = [step(number, 50.0 + number, reward=0.9) for number in (2, 3)]
    view = RunView.of([*first, state(45.0), *again])
    assert [metrics["reward"] for metrics in view.metrics] == [0.1, 0.9, 0.9]
