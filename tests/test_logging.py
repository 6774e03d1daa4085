"""The services' logs: one JSON object a line, with the id of the group in hand, and without secrets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from builders import make_group, make_prompt
from log_lines import logged
from mars_shared.contracts import RolloutGroup
from mars_shared.logs import group_named_in, last_words, log_time_s, logged_group, parse_log_line, said_in, tail_for_people
from mars_shared.masking import known_secrets, masked
from mars_shared.queue import Queue, Streams
from mars_shared.server import EmbeddedValkey
from test_reward_process import free_port, start

logger = logging.getLogger("mars_rollout.worker")


def test_a_line_is_an_object_with_time_level_identity_group_logger_message_and_details() -> None:
    with logged() as lines:
        before = datetime.now(UTC).timestamp()
        with logged_group("train-00000007"):
            logger.info("made %s", "it", extra={"seconds": 1.5, "tokens": 96})
        logger.warning("alone")
    first, second = lines.entries
    assert list(first) == ["time", "level", "service", "name", "run", "group", "logger", "message", "seconds", "tokens"]
    told = {key: value for key, value in first.items() if key != "time"}
    assert told == {
        "level": "INFO",
        "service": "rollout",
        "name": "rollout-0",
        "run": "demo",
        "group": "train-00000007",
        "logger": "mars_rollout.worker",
        "message": "made it",
        "seconds": 1.5,
        "tokens": 96,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert 0 <= log_time_s(first) - before + 0.001 < 60  # a thousandth is cut off
    assert "group" not in second and second["level"] == "WARNING"


def test_line_ends_in_messages_and_tracebacks_make_no_second_line() -> None:
    with logged() as lines:
        try:
            raise ValueError("torn\nin two")
        except ValueError:
            logger.exception("two\nlines")
    (entry,) = lines.entries
    assert entry["message"] == "two\nlines"
    assert entry["exception"].startswith("Traceback (most recent call last):\n")
    assert entry["exception"].endswith("ValueError: torn\nin two")


def test_secrets_are_blotted_out_of_message_details_and_traceback() -> None:
    with logged("s3cret", "q") as lines:
        try:
            raise ValueError("key s3cret")
        except ValueError:
            logger.exception("asked with %s", "s3cret", extra={"url": "redis://:s3cret@host"})
    assert "s3cret" not in lines.stream.getvalue()
    (entry,) = lines.entries
    assert (entry["message"], entry["url"]) == ("asked with ***", "redis://***@host")
    assert entry["exception"].endswith("ValueError: key ***")


def test_secrets_are_blotted_out_inside_lists_dicts_and_objects_too() -> None:
    told = {"tried": [{"with": ("s3cret", 7)}], "by s3cret": None, "where": Path("/of/s3cret"), "why": ValueError("no s3cret")}
    with logged("s3cret") as lines:
        logger.info("asked", extra={"attempts": told, "seconds": 1.5})
    (entry,) = lines.entries
    assert entry["attempts"] == {"tried": [{"with": ["***", 7]}], "by ***": None, "where": "/of/***", "why": "ValueError: no ***"}
    assert entry["seconds"] == 1.5


def test_credentials_of_urls_are_blotted_out_though_nobody_knew_them() -> None:
    with logged() as lines:
        try:
            raise ValueError("no answer from 'https://user:pass@host/run?token=t0ken'")
        except ValueError:
            logger.exception("asked %s and more", "s3://key:se/cr@et@bucket/run", extra={"at": {"urls": ["ftp://user@host/x"]}})
    (entry,) = lines.entries
    assert (entry["message"], entry["at"]) == ("asked s3://***@bucket/run and more", {"urls": ["ftp://***@host/x"]})
    assert entry["exception"].endswith("ValueError: no answer from 'https://***@host/run?***")


def test_the_key_and_the_redis_password_are_secrets_as_written_and_as_decoded() -> None:
    found = known_secrets({"MARS_API_KEY": "key", "MARS_REDIS_URL": "redis://:p%40ss@host:1/0"})
    assert set(found) == {"key", "p%40ss", "p@ss"}
    assert known_secrets({}) == () and known_secrets({"MARS_REDIS_URL": "redis://host:1/0"}) == ()


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "oauth_client_secret"])
def test_a_variable_with_a_telling_name_holds_a_secret_unless_it_is_a_mere_word(name: str) -> None:
    assert known_secrets({name: "0123abcd"}) == ("0123abcd",)
    assert known_secrets({name: "true"}) == known_secrets({f"{name}_FILE": "/run/key"}) == ()


def test_passwords_and_queries_of_urls_are_secrets_alone_too() -> None:
    environment = {"HTTPS_PROXY": "http://me:pr0xy-pass@proxy:80", "PLACE": "s3://bucket/run?n=1&sig=5igned%2Ftwice"}
    assert set(known_secrets(environment)) == {"pr0xy-pass", "5igned/twice", "5igned%2Ftwice"}
    assert set(known_secrets({}, "ftp://t0k@host/run", "s3://me:pass@bucket", None)) == {"t0k", "pass"}


def test_a_secret_is_known_in_the_forms_in_which_messages_quote_it() -> None:
    secrets = known_secrets({"SOME_PASSWORD": "it's\\me\nand more"})
    assert masked(repr("it's\\me\nand more"), secrets) == '"***"'
    assert (
        masked("first it's\\me\nthen and more", secrets) == "first ***\nthen ***"
    )  # each line of it, of which a log may have one


async def test_threads_and_tasks_that_begin_inside_take_the_group_along() -> None:
    async def later(name: str) -> None:
        with logged_group(name):
            await asyncio.sleep(0)
            await asyncio.to_thread(logger.info, "in a thread")

    with logged() as lines:
        await asyncio.gather(later("a"), later("b"))
        logger.info("outside")
    assert sorted(entry.get("group", "-") for entry in lines.entries) == ["-", "a", "b"]


def test_a_group_is_named_in_prompts_in_groups_and_in_what_is_torn() -> None:
    prompt = make_prompt(7).model_copy(update={"question": 'say "task_id": "x"'})
    group = make_group(prompt)
    assert group_named_in(prompt.model_dump_json().encode()) == "train-00000007"
    assert group_named_in(group.model_dump_json().encode()) == "train-00000007"
    assert group_named_in(group.model_dump_json().encode()[:200]) == "train-00000007"
    assert group_named_in(b'{"task_id": "a\\"b"}') == 'a"b'
    assert group_named_in(b"garbage") is None and group_named_in(b'{"task_id": "\\x"}') is None


PROCESS = """
    import logging, threading, warnings
    from mars_shared.logs import configure_logging, logged_group
    configure_logging("reward")
    configure_logging("reward", name="reward-1", run="demo")
    def fail():
        raise KeyError("in a thread")
    with logged_group("g"):
        warnings.warn("old\\nways")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    logging.getLogger("httpx").info("not worth a line")
    raise SystemError("the end")
"""


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment)


def test_warnings_threads_and_uncaught_exceptions_of_a_process_are_lines_too() -> None:
    done = python("-c", textwrap.dedent(PROCESS), MARS_API_KEY="in a thread")
    warning, thread, end = (json.loads(line) for line in done.stderr.splitlines())
    assert done.returncode == 1
    assert {entry["name"] for entry in (warning, thread, end)} == {"reward-1"}
    assert warning["group"] == "g" and "old\nways" in warning["message"]
    assert thread["message"] == "ended by KeyError: '***'" and thread["exception"].endswith("KeyError: '***'")
    assert (end["level"], end["message"]) == ("CRITICAL", "ended by SystemError: the end")


CHILD = """
    import logging, multiprocessing
    from mars_shared.logs import configure_logging
    def talk():
        import mars_rollout.engine.child
        logging.getLogger("vllm.core").warning("hot")
        logging.getLogger("vllm.core").info("not worth a line")
    if __name__ == "__main__":
        configure_logging("rollout", name="rollout-3", run="demo")
        process = multiprocessing.get_context("spawn").Process(target=talk, name="EngineCore")
        process.start()
        process.join()
"""


def test_the_engines_process_logs_under_its_replicas_name(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(textwrap.dedent(CHILD))
    done = python(tmp_path / "main.py")
    (entry,) = (json.loads(line) for line in done.stderr.splitlines())
    told = {key: entry[key] for key in ("service", "name", "run", "process", "logger", "message")}
    assert told == {
        "service": "rollout",
        "name": "rollout-3",
        "run": "demo",
        "process": "EngineCore",
        "logger": "vllm.core",
        "message": "hot",
    }


FAILING_SERVER = """
    import asyncio, httpx
    from mars_shared.http import HttpServer, bind
    from mars_shared.logs import configure_logging
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        raise RuntimeError("no answer")
    async def main():
        listener = bind("127.0.0.1", 0)
        server = HttpServer(app, listener)
        await server.start()
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        await server.stop()
    configure_logging("trainer")
    asyncio.run(main())
"""


def test_a_request_that_fails_in_the_server_is_one_line() -> None:
    done = python("-c", textwrap.dedent(FAILING_SERVER))
    (entry,) = (json.loads(line) for line in done.stderr.splitlines())
    assert entry["logger"] == "uvicorn.error" and "RuntimeError: no answer" in entry["exception"]


async def put_groups(url: str, *groups: RolloutGroup) -> None:
    """Give groups to the reward service, and wait until it has dealt with them."""
    queue, streams = Queue(url), Streams("reward-test")
    for group in groups:
        await queue.put(streams.rollouts, group.model_dump_json().encode(), dedupe_key=group.group_id, bound=10)
    async with asyncio.timeout(60):
        while await queue.depth(streams.rollouts):
            await asyncio.sleep(0.02)
    await queue.close()


def test_the_reward_service_names_the_group_that_it_scores_and_the_one_that_it_cannot(tmp_path: Path) -> None:
    good = make_group(make_prompt(1, run="reward-test"))
    hopeless = make_group(make_prompt(2, run="reward-test").model_copy(update={"truth": None}))
    with EmbeddedValkey(tmp_path / "valkey") as valkey, start(tmp_path, valkey.url, free_port()) as process:
        try:
            asyncio.run(put_groups(valkey.url, good, hopeless))
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    entries: list[dict[str, Any]] = [json.loads(line) for line in errors.splitlines()]
    assert {(entry["service"], entry["run"]) for entry in entries} == {("reward", "reward-test")}
    (scored,) = (entry for entry in entries if entry.get("group") == "train-00000001")
    # Completions "7" without any tag: an unreadable answer is 0, and none of the format's parts is there.
    assert (scored["message"], scored["completions"], scored["mean_reward"]) == ("scored the group", 4, 0.0)
    (dead,) = (entry for entry in entries if entry.get("group") == "train-00000002")
    assert dead["level"] == "ERROR" and "given up: bad input: group train-00000002" in dead["message"]


def test_the_error_that_ends_a_service_is_an_event_and_a_line_for_people(tmp_path: Path) -> None:
    process = start(tmp_path, f"redis://:hush-hush@127.0.0.1:{free_port()}/0", free_port())
    with process:
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    *_, event, line = errors.splitlines()
    assert line.startswith("mars_reward: no answer from Redis at ")
    entry = json.loads(event)
    assert (entry["level"], entry["run"]) == ("ERROR", "reward-test")
    assert entry["message"] == f"ended by QueueUnavailableError: {line.removeprefix('mars_reward: ')}"
    assert "hush-hush" not in errors


def test_last_words_lack_what_the_log_s_lines_lack(capsys: pytest.CaptureFixture[str]) -> None:
    with logged("s3cret"):
        last_words("mars_trainer", ValueError("no s3cret at s3://key:pass@bucket"))
    assert capsys.readouterr().err == "mars_trainer: no *** at s3://***@bucket\n"


LEAKING = """
    import logging
    from mars_shared.logs import configure_logging, last_words
    configure_logging("trainer", secret_url="https://user:pass-w@host/run?sig=signature")
    logging.getLogger("x").info("tried pass-w, 0123abcd and signature")
    last_words("mars_trainer", ValueError("pass-w 0123abcd signature"))
"""


def test_a_process_masks_the_recipe_s_url_and_what_its_environment_holds() -> None:
    log, words = python("-c", textwrap.dedent(LEAKING), WANDB_API_KEY="0123abcd").stderr.splitlines()
    assert json.loads(log)["message"] == "tried ***, *** and ***" and words == "mars_trainer: *** *** ***"


@pytest.mark.parametrize(
    "line", ["", "Traceback (most recent call last):", "7", '{"level": "INFO"}', '{"time": 3, "level": "a"}']
)
def test_what_is_no_line_of_ours_is_not_taken_for_one(line: str) -> None:
    assert parse_log_line(line) is None


def test_people_read_sentences_with_details_and_traceback() -> None:
    entry = {"time": "2026-01-31T12:00:00.123Z", "level": "ERROR", "name": "reward", "group": "g", "message": "no\x1b[2J"}
    said = said_in({**entry, "seconds": 1.23456, "exception": "Traceback:\n  here"})
    assert said == "ERROR: no�[2J  seconds 1.235\n  Traceback:\n    here"
    assert said_in({**entry, "level": "INFO", "message": "made it", "tokens": 7}) == "made it  tokens 7"


def test_the_end_of_a_log_is_told_in_sentences_from_a_process_s_own_lines_on(tmp_path: Path) -> None:
    before, own = '{"old": 1}\n', '{"time": "2026-01-31T12:00:00.123Z", "level": "INFO", "message": "begun"}\nFatal: no memory\n'
    (tmp_path / "x.log").write_text(before + own)
    assert tail_for_people(tmp_path / "x.log", start=len(before), lines=12) == ["begun", "Fatal: no memory"]
    assert tail_for_people(tmp_path / "x.log", start=len(before), lines=1) == ["Fatal: no memory"]


def test_the_end_of_a_log_is_told_without_secrets_whoever_wrote_it(tmp_path: Path) -> None:
    own = '{"time": "2026-01-31T12:00:00.123Z", "level": "INFO", "message": "key 0123abcd"}\nFatal: s3://me:pass@host, 0123abcd\n'
    (tmp_path / "x.log").write_text(own)
    told = tail_for_people(tmp_path / "x.log", start=0, lines=12, secrets=("0123abcd",))
    assert told == ["key ***", "Fatal: s3://***@host, ***"]
