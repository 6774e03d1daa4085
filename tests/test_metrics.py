"""What a step reports, the event log it is kept in, and how it is shown."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders import make_completion, make_group, make_prompt, make_score, make_scored, sampling, scored_with
from mars_shared import telemetry
from mars_shared.contracts import FinishReason, Kind, Score, ScoredGroup
from mars_shared.progress import RunDisplay
from mars_shared.settings import TrainSection
from mars_shared.telemetry import EventLog, EventTail, read_events
from mars_trainer.credit import credit
from mars_trainer.metrics import finite, rollout_metrics

TRAIN = TrainSection(steps=1, prompts_per_step=1, learning_rate=1e-3)


def metrics_of(*groups: ScoredGroup) -> dict[str, float]:
    return rollout_metrics(groups, [credit(group, TRAIN, 8) for group in groups])


def test_rewards_and_gains_by_hand() -> None:
    # Group 1: r (1, 0), visible 1, infrared 0: pool (1, 0, 1, 0), sigma = sqrt(4/4 / 3) = 0.57735, gain 0.5 - 0.5 = 0,
    # against visible -0.5, against infrared 0.5, minus the best source 0.5 - 1.
    # Group 2: r (1, 1), visible 0, infrared 0: pool (1, 1, 0, 0), the same sigma, gain 1, minus the best source 1.
    # Group 3: r (0, 0), visible 0, infrared 1: pool (0, 0, 0, 1), sigma = sqrt((3/16 + 9/16) / 3) = 0.5, gain -0.5, best -1.
    # Group 4: all 1: no signal, gain 0, best 0.
    metrics = metrics_of(
        scored_with((1, 0), {"visible": (1,), "infrared": (0,)}),
        scored_with((1, 1), {"visible": (0,), "infrared": (0,)}),
        scored_with((0, 0), {"visible": (0,), "infrared": (1,)}),
        scored_with((1, 1), {"visible": (1,), "infrared": (1,)}),
    )
    expected = {
        "reward": 5 / 8,
        "reward_std": (2 / math.sqrt(3) + 0.5) / 4,
        "no_signal_rate": 0.25,
        "gain": (0 + 1 - 0.5 + 0) / 4,
        "promotion_rate": 0.25,
        "conflict_rate": 0.25,
        "multi_minus_union": (-0.5 + 1 - 1 + 0) / 4,
        "gain/visible": (-0.5 + 1 + 0 + 0) / 4,
        "gain/infrared": (0.5 + 1 - 1 + 0) / 4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_parts_and_lengths_are_of_multi_source_completions_alone() -> None:
    prompt = make_prompt(spec=sampling(num_generations=3, num_mono=1))
    members = list(make_group(prompt).completions)
    for index, (tokens, reason) in enumerate(((2, FinishReason.STOP), (4, FinishReason.STOP), (9, FinishReason.LENGTH))):
        members[index] = make_completion(prompt.task_id, Kind.MULTI, None, index, tokens=tokens, finish_reason=reason)
    members[3] = make_completion(prompt.task_id, Kind.MONO, "visible", 0, tokens=99, finish_reason=FinishReason.LENGTH)
    scores = [
        make_score(1.5, accuracy=1),
        make_score(0.5, accuracy=0),
        make_score(0, accuracy=0),
        *[make_score(9, accuracy=5)] * 2,
    ]
    metrics = metrics_of(make_scored(make_group(prompt, members), scores))
    assert metrics["completions/mean_length"] == 5 and metrics["completions/median_length"] == 4
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert metrics["reward/accuracy"] == pytest.approx(1 / 3) and metrics["reward/format"] == pytest.approx(1 / 3)
    assert metrics["reward"] == pytest.approx(2 / 3)


def test_without_mono_rollouts_nothing_is_said_about_gains() -> None:
    metrics = metrics_of(scored_with((1, 0)))
    assert metrics["reward"] == 0.5
    assert not {name for name in metrics if "gain" in name or name in ("promotion_rate", "conflict_rate", "multi_minus_union")}


def test_sources_and_parts_may_differ_from_prompt_to_prompt() -> None:
    boxes = make_scored(
        make_group(make_prompt(1, sources=("visible", "depth"))),
        [Score(reward=r, parts={"iou": r}, parsed=True) for r in (1.0, 0.0, 1.0, 1.0)],
    )
    metrics = metrics_of(scored_with((1, 1), {"visible": (0,), "infrared": (1,)}), boxes)
    assert metrics["gain/visible"] == pytest.approx((1 - 0.5) / 2)
    assert (metrics["gain/infrared"], metrics["gain/depth"]) == (0, -0.5)
    assert (metrics["reward/accuracy"], metrics["reward/iou"]) == (1, 0.5)


def test_a_step_without_groups_has_nothing_to_average() -> None:
    assert rollout_metrics([], []) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_an_error_that_names_it(value: float) -> None:
    assert finite({"reward": 1.0}) == {"reward": 1.0}
    with pytest.raises(ValueError, match=f"metric kl is {value}; expected a finite number"):
        finite({"reward": 1.0, "kl": value})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def kinds(path: Path) -> list[str]:
    return [event["event"] for event in read_events(path)]


def test_events_are_read_in_order_and_by_kind(log: Path) -> None:
    assert read_events(log) == []
    events = EventLog(log)
    events.write("step", step=1)
    events.write("evaluation", multi=0.5, note="a\nb\u2028c")
    events.write("step", step=2)
    assert kinds(log) == ["step", "evaluation", "step"]
    assert [event["step"] for event in read_events(log, "step")] == [1, 2]
    assert read_events(log, "evaluation")[0]["note"] == "a\nb\u2028c"


def test_an_event_that_is_not_finite_is_refused_and_leaves_no_trace(log: Path) -> None:
    events = EventLog(log)
    with pytest.raises(ValueError, match="JSON"):
        events.write("step", loss=math.nan)
    events.write("step", loss=0.0)
    assert len(read_events(log)) == 1


def test_a_torn_last_line_is_left_out(log: Path) -> None:
    EventLog(log).write("step", step=1)
    with log.open("a") as file:
        file.write('{"time": 3, "event": "st')
    assert kinds(log) == ["step"]
    assert [event["step"] for event in EventTail(log, from_end=False).new()] == [1]


def test_a_writer_that_goes_on_after_a_torn_line_loses_none_of_its_own(log: Path) -> None:
    EventLog(log).write("step", step=1)
    with log.open("a") as file:
        file.write('{"time": 3, "event": "st')
    EventLog(log).write("step", step=2)
    assert [event["step"] for event in read_events(log)] == [1, 2]
    assert [event["step"] for event in EventTail(log, from_end=False).new()] == [1, 2]


def test_the_tail_of_a_log_yields_each_event_once(log: Path) -> None:
    early = EventTail(log, from_end=True)
    assert list(early.new()) == []
    events = EventLog(log)
    events.write("step", step=1)
    late = EventTail(log, from_end=True)
    events.write("step", step=2)
    assert [event["step"] for event in early.new()] == [1, 2]
    assert [event["step"] for event in late.new()] == [2]
    with log.open("a") as file:
        file.write('{"time": 3, "event": "st')
        file.flush()
        assert list(early.new()) == []
        file.write('ep", "step": 3}\n')
    assert [event["step"] for event in early.new()] == [3]
    assert list(early.new()) == []


def test_damaged_bytes_cost_what_they_damage_and_lines_without_an_event_are_counted(log: Path) -> None:
    EventLog(log).write("step", step=1)
    damaged = [b'{"time": 2, "event": "dead", "reason": "to\xff\xfern"}', b"\x80\xff\x00", b"7", b'{"time": 3}', b'{"event": "st']
    with log.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in damaged))
    EventLog(log).write("step", step=2)
    tail = EventTail(log, from_end=False)
    assert [event.get("step", event.get("reason")) for event in tail.new()] == [1, "to\ufffd\ufffdrn", 2]
    assert tail.skipped == 4
    assert kinds(log) == ["step", "dead", "step"]


def line_of(step: int) -> str:
    return json.dumps({"time": 0.0, "event": "step", "step": step}) + "\n"


def append(log: Path, text: str) -> None:
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        file.write(text)


def test_what_comes_between_the_end_of_a_file_and_its_renaming_is_not_lost(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, line_of(1))
    look, coming = telemetry._newest_segment, [lambda: log.write_text(line_of(3)), lambda: append(log, line_of(2))]

    def renamed_before_the_look(path: Path) -> int:
        if armed and coming:
            coming.pop()()  # step 2 comes to the old file, which is renamed; step 3 begins the new one
            log.rename(log.with_name("events.000001.jsonl"))
            coming.pop()()
        return look(path)

    monkeypatch.setattr(telemetry, "_newest_segment", renamed_before_the_look)
    armed, tail = False, EventTail(log, from_end=False)
    events = tail.new()
    seen = [next(events)]
    armed = True  # the next look is the one after the file's end
    seen += events
    assert [event["step"] for event in seen] == [1, 2, 3] and list(tail.new()) == []


def test_a_torn_line_at_the_end_of_a_renamed_file_holds_up_nothing(log: Path) -> None:
    append(log, line_of(1) + '{"time": 1, "event": "st')
    tail = EventTail(log, from_end=False)
    assert [event["step"] for event in tail.new()] == [1] and tail.skipped == 0  # it may still be written
    log.rename(log.with_name("events.000001.jsonl"))
    append(log, line_of(2))
    assert [event["step"] for event in tail.new()] == [2] and tail.skipped == 1


def test_a_tail_from_the_end_begins_at_the_end_of_the_newest_file(log: Path) -> None:
    append(log, line_of(1))
    log.rename(log.with_name("events.000001.jsonl"))
    append(log, line_of(2))
    tail = EventTail(log, from_end=True)
    append(log, line_of(3))
    assert [event["step"] for event in tail.new()] == [3]


def shown(events: list[dict[str, Any]], *, terminal: bool = False) -> str:
    console = Console(force_terminal=terminal, width=300, record=True, quiet=False, file=open("/dev/null", "w"))
    display = RunDisplay(console)
    for event in events:
        display.show(event)
    display.close()
    return console.export_text()


def step_event(step: int, **metrics: float) -> dict[str, Any]:
    means = {"reward": 0.5, "completions/mean_length": 7.25} | metrics
    return {"time": 0.0, "event": "step", "step": step, "steps": 12, "metrics": means}


def test_elsewhere_than_on_a_terminal_some_steps_are_plain_lines() -> None:
    text = shown([step_event(step, gain=-0.25, conflict_rate=0.5) for step in range(1, 13)])
    assert text.splitlines() == [
        f"step {step}/12  reward 0.500  gain -0.250  conflict 0.50  length 7.2" for step in (1, 5, 10, 12)
    ]


def test_a_run_without_mono_rollouts_is_shown_without_gain() -> None:
    assert shown([step_event(1)]) == "step 1/12  reward 0.500  length 7.2\n"


def test_on_a_terminal_steps_move_a_bar() -> None:
    assert "12/12" in shown([step_event(step) for step in (1, 12)], terminal=True)


def test_evaluations_dead_letters_and_the_end_are_lines() -> None:
    evaluation = {"step": 0, "samples": 8, "multi": 0.5, "mono": {"visible": 0.25}, "union": 0.75, "seconds": 3.2}
    text = shown(
        [
            {"event": "evaluation", **evaluation},
            {"event": "dead", "prompt_id": "p-7", "reason": "ImageError [/red]"},
            {"event": "finished", "step": 12, "weights": "ab" * 32},
            {"event": "something else"},
        ]
    )
    assert text.splitlines() == [
        "evaluation at step 0 (8 samples): multi 0.500  visible 0.250  union 0.750  (3 s)",
        "dead letter: p-7 ImageError [/red]",
        f"finished at step 12, weights {'ab' * 8}",
    ]


def test_every_event_line_is_json(log: Path) -> None:
    EventLog(log).write("step", text="é")
    line = log.read_text(encoding="utf-8")
    assert json.loads(line)["text"] == "é" and line.endswith("\n") and set(json.loads(line)) == {"time", "event", "text"}


def test_a_run_that_goes_on_says_from_where() -> None:
    text = shown([{"event": "resumed", "step": 40, "incarnation": 2}])
    assert text.splitlines() == ["going on from step 40 as incarnation 2"]


def test_a_log_that_has_become_large_goes_on_in_another_file_and_is_read_as_one(log: Path) -> None:
    early = EventTail(log, from_end=False)
    events = EventLog(log, segment_bytes=120)  # an event has about 60 bytes: a file takes two or three
    seen = []
    for step in range(1, 11):
        events.write("step", step=step)
        if step % 4 == 0:  # several files may have ended between two looks
            seen += [event["step"] for event in early.new()]
    files = sorted(path.name for path in log.parent.iterdir())
    assert len(files) >= 4 and files[0] == "events.000001.jsonl" and files[-1] == "events.jsonl"
    assert seen + [event["step"] for event in early.new()] == list(range(1, 11))
    assert [event["step"] for event in read_events(log)] == list(range(1, 11))
    late = EventTail(log, from_end=True)
    EventLog(log, segment_bytes=1).write("step", step=11)
    assert [event["step"] for event in late.new()] == [11]


def test_a_writer_whose_log_is_renamed_under_it_loses_nothing(log: Path) -> None:
    other = EventLog(log)
    other.write("step", step=1)
    EventLog(log, segment_bytes=1).write("step", step=2)
    other.write("work", step=3)
    assert {event["step"] for event in read_events(log)} == {1, 2, 3}


def test_a_disk_without_room_for_another_file_lets_the_log_grow(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = EventLog(log, segment_bytes=1)
    events.write("step", step=1)
    for attempt, name in enumerate(("touch", "rename"), start=2):
        with monkeypatch.context() as full:
            full.setattr(Path, name, no_room)
            events.write("step", step=attempt)
    assert [path.name for path in log.parent.glob("events.0*")] == []
    events.write("step", step=4)
    events.write("step", step=5)
    assert sorted(path.name for path in log.parent.glob("events.0*")) == ["events.000001.jsonl", "events.000002.jsonl"]
    assert [event["step"] for event in read_events(log)] == [1, 2, 3, 4, 5]


def no_room(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
