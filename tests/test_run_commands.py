"""The commands that tell of runs, beside a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from live_run import KEY, STEPS, LiveRun
from mars_shared.records.groups import GroupRecord, read_groups

pytestmark = pytest.mark.engine


def json_of(run: LiveRun, *arguments: str | Path) -> Any:
    done = run.mars(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def a_trained_group(run: LiveRun) -> GroupRecord:
    return next(group for group in read_groups(run.folder / "groups") if (group.occasion, group.step) == ("step", 2))


def test_a_group_is_followed_through_all_services_by_its_id(live_run: LiveRun) -> None:
    live_run.until_finished()
    group = a_trained_group(live_run)
    done = live_run.mars("trace", live_run.folder, group.task_id, "--json")
    moments = [json.loads(line) for line in done.stdout.splitlines()]
    assert [moment["time"] for moment in moments] == sorted(moment["time"] for moment in moments)
    services = [moment["entry"]["service"] for moment in moments if "service" in moment["entry"]]
    # Asked by the trainer, taken up and made by the replica, scored, and taken and trained on by the trainer.
    assert list(dict.fromkeys(services)) == ["trainer", "rollout", "reward"] and services[-1] == "trainer"
    assert {moment["entry"].get("run") for moment in moments if "service" in moment["entry"]} == {"live"}
    (record,) = [moment for moment in moments if moment["where"] == "groups"]
    assert record["entry"]["step"] == 2 and f"page #/group?name={group.task_id}" in record["text"]


def test_every_line_of_the_services_logs_is_one_json_object_without_a_secret(live_run: LiveRun) -> None:
    live_run.until_finished()
    password = next(
        line.split()[1]
        for line in (live_run.folder / "valkey/valkey.conf").read_text().splitlines()
        if line.startswith("requirepass")
    )
    logs = [path for path in (live_run.folder / "logs").glob("*.log") if path.stem != "valkey"]
    assert {path.stem for path in logs} == {"trainer", "reward", "rollout-0"}
    for path in logs:
        text = path.read_text()
        entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert entries and all(entry["service"] and entry["message"] is not None for entry in entries)
        assert all(entry.get("run") == "live" for entry in entries[1:]), path
        assert KEY not in text and password.strip('"') not in text


def test_watch_and_status_tell_where_the_run_is(live_run: LiveRun) -> None:
    live_run.until_finished()
    seen = json_of(live_run, "watch", live_run.folder)
    assert seen["step"] == STEPS and seen["finished"]
    status = live_run.mars("status", live_run.folder, "--json")
    assert status.returncode == 0 and f"{STEPS}" in status.stdout
    assert "rollout-0" in live_run.mars("watch", live_run.folder, "--once").stdout


def test_the_report_of_a_real_run_opens_without_anything_from_elsewhere(live_run: LiveRun, tmp_path: Path) -> None:
    live_run.until_finished()
    done = live_run.mars("report", live_run.folder, "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("finished", "[train]", "learning_rate", "0.0003", "vllm"))
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "<script" not in page


def test_tensorboard_has_the_run(live_run: LiveRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    live_run.until_finished()

    def shown() -> EventAccumulator:
        found = EventAccumulator(str(live_run.folder / "tensorboard"))
        found.Reload()
        return found

    live_run.wait(
        "the last step in TensorBoard", lambda: "loss" in shown().Tags()["scalars"] and len(shown().Scalars("loss")) == STEPS
    )
    rewards = {event["step"]: event["metrics"]["reward"] for event in live_run.events("step")}
    assert {point.step: point.value for point in shown().Scalars("reward")} == pytest.approx(rewards)
    assert [point.step for point in shown().Scalars("eval/multi")] == [0, STEPS]
    assert len(shown().Images("samples/evaluation")) == 2
