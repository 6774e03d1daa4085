"""`mars trace`: one group through hand-made logs of three services, events, records and a real dead letter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import make_group, make_prompt, make_score, make_scored
from command_line import CommandLine, Done, command_line
from mars_shared.contracts import Purpose
from mars_shared.queue import Queue, Streams
from mars_shared.server import EmbeddedValkey
from mars_shared.trace import group_names, moments_of
from mars_shared.weights import WeightsStore
from mars_trainer.group_log import GroupLog
from weights_builders import publish_snapshot, weights

__all__ = ["command_line"]
GROUP = "train-00000007"
Mars = Callable[..., Done]


def line(second: int, name: str, message: str, group: str | None = GROUP, **more: Any) -> str:
    entry = {"time": f"2026-01-31T12:00:{second:02d}.000Z", "level": "INFO", "service": name.partition("-")[0], "name": name}
    return json.dumps({**entry, **({"group": group} if group else {}), "logger": "x", "message": message, **more})


NOON = 1_769_860_800.0
"""2026-01-31T12:00:00Z: 20484 days of 86400 s, and twelve hours."""


@pytest.fixture
def run_dir(tmp_path: Path, run_name: str) -> Path:
    """A run's folder in which group 7 was asked, made, scored and given up; group 17 is another's."""
    publish_snapshot(WeightsStore(tmp_path / "run" / "weights"), weights(0, run=run_name))
    logs = tmp_path / "run" / "logs"
    logs.mkdir()
    (logs / "trainer.log").write_text(
        "\n".join(
            [
                line(1, "trainer", "asked for the group", prompt_id="digits/train/3"),
                line(1, "trainer", "asked for the group", "train-00000017", prompt_id="digits/train/9"),
                line(2, "trainer", "of it without being about it", "train-00000017", like=GROUP),
                line(8, "trainer", "it is dead", level="ERROR", exception="Traceback:\nValueError: torn"),
                '{"time": "2026-01-31T12:00:09.000Z", "level": "INFO", "group": "train-00000007", "mess',
            ]
        )
    )
    (logs / "rollout-0.log").write_text(f"libiomp is not found\n{line(2, 'rollout-0', 'took the prompt up', attempt=1)}\n")
    (logs / "rollout-1.log").write_text(line(3, "rollout-1", "made the group", seconds=1.25) + "\n")
    (logs / "reward.log").write_text(line(5, "reward-host-8200", "[red]scored\x1b[2J", mean_reward=0.5) + "\n")
    (logs / "valkey.log").write_text(f"1:M 31 Jan 2026 * {GROUP}\n")
    events = [
        {"time": NOON + 4, "event": "step", "step": 1},
        {"time": NOON + 6, "event": "dead", "task_id": GROUP, "prompt_id": "digits/train/3", "reason": "bad image: torn"},
        {"time": NOON + 6, "event": "dead", "task_id": "train-00000017", "prompt_id": "digits/train/9", "reason": "other"},
    ]
    (tmp_path / "run" / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return tmp_path / "run"


@pytest.fixture
def mars(run_dir: Path, command_line: CommandLine, clean_environment: pytest.MonkeyPatch, valkey: EmbeddedValkey) -> Mars:
    """Runs `mars trace RUN ARGUMENTS`."""

    def mars(*arguments: str, redis_url: str | None = valkey.url) -> Done:
        if redis_url:
            clean_environment.setenv("MARS_REDIS_URL", redis_url)
        else:
            clean_environment.delenv("MARS_REDIS_URL", raising=False)
        return command_line("trace", str(run_dir), *arguments)

    return mars


def test_a_group_is_followed_through_all_services_in_the_order_of_time(run_dir: Path) -> None:
    found = [(moment.time - NOON, moment.where, moment.text) for moment in moments_of(run_dir, GROUP)]
    assert found == [
        (1.0, "trainer", "asked for the group  prompt_id digits/train/3"),
        (2.0, "rollout-0", "took the prompt up  attempt 1"),
        (3.0, "rollout-1", "made the group  seconds 1.25"),
        (5.0, "reward-host-8200", "[red]scored�[2J  mean_reward 0.5"),
        (6.0, "events.jsonl", "event dead  prompt_id digits/train/3  reason bad image: torn"),
        (8.0, "trainer", "ERROR: it is dead\n  Traceback:\n  ValueError: torn"),
    ]


def test_the_command_prints_a_line_each_and_says_that_it_saw_no_dead_letters(mars: Mars) -> None:
    done = mars(GROUP, redis_url=None)
    assert done.returncode == 0 and done.stderr.startswith("mars: without dead letters: ")
    lines = done.stdout.splitlines()
    assert [text[25:41].strip() for text in lines if text[:2] == "20"] == [
        "trainer",
        "rollout-0",
        "rollout-1",
        "reward-host-8200",
        "events.jsonl",
        "trainer",
    ]
    assert "[red]scored" in done.stdout and "\x1b" not in done.stdout
    assert lines[-1] == "  ValueError: torn"


async def test_the_dead_letter_is_there_while_redis_is(mars: Mars, patient_queue: Queue, run_name: str) -> None:
    streams = Streams(run_name)
    for index in (7, 17):
        payload = make_prompt(index, run=run_name).model_dump_json().encode()
        await patient_queue.put(streams.prompts, payload, dedupe_key=f"{run_name}-{index}", bound=10)
        claim = await patient_queue.claim(streams.prompts, "w", wait_s=0)
        assert claim is not None
        await patient_queue.dead_letter(claim, "bad image", "torn")
    done = mars(GROUP, "--json")
    assert done.stderr == ""
    moments = [json.loads(text) for text in done.stdout.splitlines()]
    assert [moment["where"] for moment in moments[-2:]] == ["trainer", "dead letters"]  # Redis's clock is today's
    letter = moments[-1]["entry"]
    assert (letter["stage"], letter["attempts"], letter["reason"], letter["detail"]) == ("prompts", 1, "bad image", "torn")
    assert f"`mars dead show {letter['id']}`" in moments[-1]["text"]
    assert moments[2]["entry"]["seconds"] == 1.25


def test_a_record_says_what_was_earned_and_where_the_page_shows_it(run_dir: Path) -> None:
    prompt = make_prompt(7, purpose=Purpose.EVAL).model_copy(update={"prompt_id": "digits/test/7"})
    scored = make_scored(make_group(prompt), [make_score(reward) for reward in (1.0, 0.5, 0.5, 0.0)])
    other = make_group(make_prompt(8).model_copy(update={"question": "eval-00000007"}))
    log = GroupLog(run_dir / "groups")
    log.evaluation(40, [scored, make_scored(other, scored.scores)])
    (moment,) = moments_of(run_dir, "eval-00000007")
    # Multi-source (1 + 0.5) / 2 = 0.75, mono-source (0.5 + 0) / 2 = 0.25.
    said = "record: evaluation 40  digits/test/7  reward 0.750  gain +0.500  policy 1.0  by replica-0"
    assert moment.text == f"{said}  page #/group?name=eval-40-digits%2Ftest%2F7"
    assert [name.group for name in group_names(run_dir, "eval-40-digits/")] == ["eval-00000007"]


def test_a_beginning_that_several_groups_share_lists_them(mars: Mars) -> None:
    several = mars("train-000000", redis_url=None)
    assert several.returncode == 0
    assert several.stdout.splitlines() == ["train-00000007  digits/train/3", "train-00000017  digits/train/9"]
    as_json = [json.loads(text) for text in mars("digits/", "--json", redis_url=None).stdout.splitlines()]
    assert as_json[1] == {"group": "train-00000017", "prompt_id": "digits/train/9", "name": None}


@pytest.mark.parametrize("beginning", ["train-0000000", "digits/train/3"])
def test_a_beginning_that_one_group_has_alone_follows_it(mars: Mars, beginning: str) -> None:
    followed = [json.loads(text) for text in mars(beginning, "--json", redis_url=None).stdout.splitlines()]
    assert [moment["where"] for moment in followed[:4]] == ["trainer", "rollout-0", "rollout-1", "reward-host-8200"]
    assert mars(beginning, redis_url=None).stdout == mars(GROUP, redis_url=None).stdout


def test_a_prompts_whole_id_follows_its_group_though_another_id_begins_so(mars: Mars, run_dir: Path) -> None:
    other = line(9, "trainer", "asked for the group", "train-00000027", prompt_id="digits/train/30")
    (run_dir / "logs" / "more.log").write_text(other + "\n")
    assert mars("digits/train/3", redis_url=None).stdout == mars(GROUP, redis_url=None).stdout


def test_damaged_bytes_in_logs_and_events_cost_a_character_and_no_more(run_dir: Path) -> None:
    before = len(moments_of(run_dir, GROUP))
    with (run_dir / "logs" / "reward.log").open("ab") as file:
        file.write(b"\xff\xfe\n" + line(9, "reward", "sco?ed").encode().replace(b"?", b"\xff") + b"\n")
    with (run_dir / "events.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    *others, damaged = moments_of(run_dir, GROUP)
    assert len(others) == before and damaged.text == "sco\ufffded"


def test_an_unknown_group_is_an_error_that_says_where_ids_stand(mars: Mars) -> None:
    done = mars("train-9", redis_url=None)
    assert done.returncode == 3 and done.stdout == ""
    for words in ("no group 'train-9' in ", "logs/*.log", "`mars dead list`", " train` lists all training groups"):
        assert words in done.stderr
