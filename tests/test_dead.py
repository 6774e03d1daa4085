"""`mars dead` as a user runs it, on letters that real consumers left in a real Valkey."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import make_group, make_prompt
from command_line import CommandLine, Done, command_line
from mars_shared.contracts import Prompt, Purpose
from mars_shared.errors import InputError
from mars_shared.letters import FaultyRow
from mars_shared.queue import Queue, Streams
from mars_shared.server import EmbeddedValkey
from mars_shared.telemetry import EventLog
from mars_shared.weights import WeightsStore
from weights_builders import publish_snapshot, weights

__all__ = ["command_line"]
TRACEBACK = "Traceback (most recent call last):\n  File x.py, line 3\nValueError: [bold] no"
Mars = Callable[..., Done]


@pytest.fixture
def run_dir(tmp_path: Path, run_name: str) -> Path:
    """A run's folder, where published weights tell its name."""
    publish_snapshot(WeightsStore(tmp_path / "run" / "weights"), weights(0, run=run_name))
    return tmp_path / "run"


@pytest.fixture
def mars(run_dir: Path, valkey: EmbeddedValkey, clean_environment: pytest.MonkeyPatch, command_line: CommandLine) -> Mars:
    """Runs `mars dead ARGUMENTS` on the run."""

    def mars(*arguments: str, redis_url: str | None = valkey.url, run: Path = run_dir) -> Done:
        if redis_url:
            clean_environment.setenv("MARS_REDIS_URL", redis_url)
        else:
            clean_environment.delenv("MARS_REDIS_URL", raising=False)
        return command_line("dead", *arguments, "--run", str(run))

    return mars


@pytest.fixture
def streams(run_name: str) -> Streams:
    return Streams(run_name)


async def bury(queue: Queue, stream: str, payload: bytes, *, reason: str = "bad image", key: str = "") -> str:
    """Have an item die in a stream; returns the letter's id."""
    streams = Streams.of(stream)
    await queue.put(stream, payload, dedupe_key=key or f"key-{reason}-{hash(payload)}", bound=100)
    claim = await queue.claim(stream, "worker", wait_s=0)
    assert claim is not None
    await queue.dead_letter(claim, reason, TRACEBACK)
    return (await queue.dead(streams.run, limit=1))[0].entry_id


async def bury_prompt(queue: Queue, streams: Streams, index: int, purpose: Purpose = Purpose.TRAIN) -> tuple[Prompt, str]:
    prompt = make_prompt(index, run=streams.run, purpose=purpose)
    return prompt, await bury(queue, streams.prompts, prompt.model_dump_json().encode())


async def retried(queue: Queue, streams: Streams) -> list[Prompt]:
    """The prompts that the trainer would find."""
    found = []
    while claim := await queue.claim(streams.retries, "trainer", wait_s=0):
        found.append(Prompt.model_validate_json(claim.payload))
    return found


async def test_list_names_what_died_where_and_why_newest_first(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    _, first = await bury_prompt(patient_queue, streams, 3)
    group = make_group(make_prompt(4, run=streams.run))
    second = await bury(patient_queue, streams.rollouts, group.model_dump_json().encode(), reason="reward failed")
    third = await bury(patient_queue, streams.prompts, b"{", reason="unreadable")
    rows = [json.loads(line) for line in mars("list", "--json").stdout.splitlines()]
    seen = [tuple(row[key] for key in ("id", "purpose", "task_id", "prompt_id", "stage", "attempts", "reason")) for row in rows]
    assert seen == [
        (third, None, None, None, "prompts", 1, "unreadable"),
        (second, "train", "train-00000004", "sample-4", "rollouts", 1, "reward failed"),
        (first, "train", "train-00000003", "sample-3", "prompts", 1, "bad image"),
    ]
    (limited,) = mars("list", "--json", "--limit", "1").stdout.splitlines()
    assert json.loads(limited)["id"] == third
    table = mars("list", "--limit", "2").stdout
    assert "2 of 3" in table and "reward failed" in table and second in table and first not in table


async def test_show_tells_everything_of_a_prompt(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    prompt, letter = await bury_prompt(patient_queue, streams, 3)
    shown = mars("show", letter)
    assert shown.returncode == 0, shown.stderr
    assert TRACEBACK in shown.stdout and "reason: bad image" in shown.stdout and "attempts: 1" in shown.stdout
    assert Prompt.model_validate_json(shown.stdout.partition("prompt:\n")[2]) == prompt


async def test_show_tells_the_completions_of_a_group(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    group = make_group(make_prompt(4, run=streams.run))
    letter = await bury(patient_queue, streams.rollouts, group.model_dump_json().encode())
    completions = json.loads(mars("show", letter).stdout.partition("log-probabilities:\n")[2])
    # G = 2 multi-source completions, and M = 1 of each of visible and infrared
    assert [(item["kind"], item["source"], item["text"]) for item in completions] == [
        ("multi", None, "7"),
        ("multi", None, "7"),
        ("mono", "visible", "7"),
        ("mono", "infrared", "7"),
    ]


async def test_show_tells_an_unreadable_item_as_it_is(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    letter = await bury(patient_queue, streams.prompts, b'{"broken": \xff')
    assert '{"broken": \\xff' in mars("show", letter).stdout


async def test_retry_hands_the_prompts_of_dead_letters_to_the_trainer(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    prompt, first = await bury_prompt(patient_queue, streams, 3)
    group = make_group(make_prompt(4, run=streams.run))
    second = await bury(patient_queue, streams.rollouts, group.model_dump_json().encode())
    _, third = await bury_prompt(patient_queue, streams, 5)
    done = mars("retry", first, second, first)
    assert done.returncode == 0, done.stderr
    assert f"2 prompt(s) moved to {streams.retries}" in done.stdout
    assert await retried(patient_queue, streams) == [prompt, group.prompt]
    assert [letter.entry_id for letter in await patient_queue.dead(streams.run)] == [third]


async def test_retry_refuses_by_name_what_cannot_be_asked_again_and_moves_nothing(
    patient_queue: Queue, streams: Streams, mars: Mars
) -> None:
    _, good = await bury_prompt(patient_queue, streams, 3)
    _, held_out = await bury_prompt(patient_queue, streams, 0, Purpose.EVAL)
    broken = await bury(patient_queue, streams.prompts, b"{")
    for bad, why in ((held_out, "its purpose is eval"), (broken, "cannot be read"), ("5-0", "no dead letter 5-0")):
        done = mars("retry", good, bad)
        assert done.returncode == 3
        assert bad in done.stderr and why in done.stderr
    assert await patient_queue.depth(streams.dead) == 3 and await patient_queue.depth(streams.retries) == 0


async def test_retry_all_moves_what_can_be_asked_again_oldest_first_and_names_the_rest(
    patient_queue: Queue, streams: Streams, mars: Mars
) -> None:
    prompts = [(await bury_prompt(patient_queue, streams, index))[0] for index in (3, 4)]
    _, probe = await bury_prompt(patient_queue, streams, 0, Purpose.PROBE)
    done = mars("retry", "all")
    assert done.returncode == 0, done.stderr
    assert "2 prompt(s) moved" in done.stdout
    assert f"dead letter {probe}: its purpose is probe" in done.stderr
    assert await retried(patient_queue, streams) == prompts
    assert [letter.entry_id for letter in await patient_queue.dead(streams.run)] == [probe]


async def test_a_letter_is_moved_as_a_whole_or_not_at_all(patient_queue: Queue, streams: Streams) -> None:
    prompt, letter = await bury_prompt(patient_queue, streams, 3)
    with pytest.raises(InputError, match=r"no dead letter 9-9 in mars:.*:dead"):
        await patient_queue.revive(streams.run, {letter: b"again", "9-9": b"again"})
    assert [found.payload for found in await patient_queue.dead(streams.run)] == [prompt.model_dump_json().encode()]
    assert await patient_queue.depth(streams.retries) == 0
    await patient_queue.revive(streams.run, {letter: b"again"})
    with pytest.raises(InputError, match=f"no dead letter {letter}"):
        await patient_queue.revive(streams.run, {letter: b"again"})
    assert (await patient_queue.depth(streams.dead), await patient_queue.depth(streams.retries)) == (0, 1)


async def test_a_retried_prompt_keeps_its_dedupe_key(patient_queue: Queue, streams: Streams) -> None:
    letter = await bury(patient_queue, streams.prompts, b"item", key="the-key")
    await patient_queue.revive(streams.run, {letter: b"again"})
    assert list((await patient_queue.outstanding(streams.retries)).values()) == ["the-key"]


async def test_drop_removes_letters_for_good(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    ids = [(await bury_prompt(patient_queue, streams, index))[1] for index in (3, 4, 5)]
    done = mars("drop", ids[0], "5-0")
    assert done.returncode == 3 and "no dead letter 5-0" in done.stderr
    assert await patient_queue.depth(streams.dead) == 3
    assert "1 dead letter(s) removed" in mars("drop", ids[1]).stdout
    assert [letter.entry_id for letter in await patient_queue.dead(streams.run)] == [ids[2], ids[0]]
    assert "2 dead letter(s) removed" in mars("drop", "all").stdout
    assert await patient_queue.depth(streams.dead) == await patient_queue.depth(streams.retries) == 0


@pytest.mark.parametrize("command", ["show", "retry", "drop"])
def test_what_is_no_id_is_refused(mars: Mars, command: str) -> None:
    done = mars(command, "5")
    assert done.returncode == 3 and "'5' is no dead letter's id; expected one like 1700000000000-0" in done.stderr


def test_an_empty_list_says_so_and_what_the_event_log_knows(mars: Mars, run_dir: Path, run_name: str) -> None:
    assert mars("list").stdout.strip() == f"no dead letters of {run_name}"
    EventLog(run_dir / "events.jsonl").write("dead", reason="bad image")
    assert f"{run_dir}/events.jsonl knows of 1 death(s)" in mars("list").stdout


def test_a_run_whose_redis_is_gone_shows_the_deaths_of_its_event_log(mars: Mars, run_dir: Path) -> None:
    log = EventLog(run_dir / "events.jsonl")
    log.write("dead", task_id="train-00000003", prompt_id="sample-3", reason="bad image: no PNG")
    log.write("step", step=1)
    log.write("dead", reason="row 7 cannot be opened")
    with EmbeddedValkey(run_dir / "valkey"):
        assert "no dead letters of" in mars("list", redis_url=None).stdout
    for redis_url, why in ((None, "its Valkey neither"), ("redis://127.0.0.1:9/0", "at 127.0.0.1:9 ")):
        done = mars("list", "--json", redis_url=redis_url)
        assert done.returncode == 0 and why in done.stderr and "events.jsonl knows of deaths" in done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(row["id"], row["task_id"], row["prompt_id"], row["reason"]) for row in rows] == [
            (None, None, None, "row 7 cannot be opened"),
            (None, "train-00000003", "sample-3", "bad image: no PNG"),
        ]
    retry = mars("retry", "all", redis_url=None)
    assert retry.returncode == 1 and "its Valkey neither" in retry.stderr
    shutil.rmtree(run_dir / "valkey")
    gone = mars("drop", "all", redis_url=None)
    assert gone.returncode == 1 and "MARS_REDIS_URL is not set and there is no" in gone.stderr
    assert not (run_dir / "valkey").exists()


async def test_a_recipe_names_the_run_too(patient_queue: Queue, streams: Streams, mars: Mars, tmp_path: Path, root: Path) -> None:
    _, letter = await bury_prompt(patient_queue, streams, 3)
    recipe = tmp_path / "recipe.toml"
    text = (root / "recipes/digits.toml").read_text()
    name = next(line for line in text.splitlines() if line.startswith("name = "))
    recipe.write_text(text.replace(name, f'name = "{streams.run}"', 1))
    assert json.loads(mars("list", "--json", run=recipe).stdout)["id"] == letter


def test_a_folder_that_tells_no_run_is_refused(mars: Mars, tmp_path: Path) -> None:
    done = mars("list", run=tmp_path)
    assert done.returncode == 2 and f"{tmp_path}: no stack runs there" in done.stderr
    assert "name the run's recipe" in done.stderr


async def test_a_row_that_never_became_a_prompt_is_named_and_not_asked_again(
    patient_queue: Queue, streams: Streams, mars: Mars
) -> None:
    item = FaultyRow(dispatch_index=70, purpose="train").model_dump_json().encode()
    await patient_queue.report_dead(streams.run, item, key="1/70", reason="InputError", detail="rows.jsonl line 4: no such image")
    (row,) = [json.loads(line) for line in mars("list", "--json").stdout.splitlines()]
    assert (row["purpose"], row["prompt_id"]) == ("train", "dispatch index 70")
    assert row["reason"] == "InputError: rows.jsonl line 4: no such image"
    shown = mars("show", row["id"]).stdout
    assert "It never became a prompt: mend the row" in shown
    refused = mars("retry", row["id"])
    assert refused.returncode == 3 and "mend the row" in refused.stderr
    assert await retried(patient_queue, streams) == []


async def test_ids_stay_whole_in_the_table_wherever_it_is_printed(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    _, letter = await bury_prompt(patient_queue, streams, 3)
    assert letter in mars("list").stdout


def test_what_is_neither_folder_nor_recipe_is_said(mars: Mars, tmp_path: Path) -> None:
    (tmp_path / "rew.py").write_text("")
    refused = mars("list", run=tmp_path / "rew.py")
    assert refused.returncode == 2
    assert "is neither a run's folder nor a TOML recipe" in refused.stderr


def test_letters_of_a_run_that_has_ended_wait_for_its_next_start(mars: Mars, run_dir: Path) -> None:
    valkey = EmbeddedValkey(run_dir / "valkey")
    valkey.write_config()
    refused = mars("drop", "all", redis_url=None)
    assert refused.returncode == 1
    assert "`mars up` with the run's recipe brings them back" in refused.stderr


async def test_show_as_json_is_the_row_with_detail_prompt_and_completions(
    patient_queue: Queue, streams: Streams, mars: Mars
) -> None:
    group = make_group(make_prompt(4, run=streams.run))
    letter = await bury(patient_queue, streams.rollouts, group.model_dump_json().encode())
    torn = await bury(patient_queue, streams.prompts, b"\xff")
    shown, other = (json.loads(mars("show", entry, "--json").stdout) for entry in (letter, torn))
    assert (shown["id"], shown["stage"], shown["reason"]) == (letter, "rollouts", "bad image")
    assert shown["detail"] == TRACEBACK
    assert Prompt.model_validate(shown["prompt"]) == group.prompt and len(shown["completions"]) == 4
    assert other["item"] == "\\xff" and "prompt" not in other


async def test_what_a_letter_holds_cannot_act_on_the_terminal(patient_queue: Queue, streams: Streams, mars: Mars) -> None:
    letter = await bury(patient_queue, streams.prompts, b"\x1b[2J", reason="bad \x1b]0;title\x07")
    for command in (["list"], ["show", letter]):
        said = mars(*command).stdout
        assert "\x1b" not in said and "\x07" not in said and "bad �]0;title�" in said
