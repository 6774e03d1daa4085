"""A reward that fails is never a silent 0: its group is tried again, then kept with the cause, and other groups go on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mars_reward import custom, worker
from mars_reward.app import build_app
from mars_reward.offline import main
from mars_reward.registry import RECIPES, Parts, offered
from mars_reward.worker import MAX_ERRORS, MAX_ERRORS_CPU, RewardWorker
from mars_rollout.adhoc import GroupAnswer, RewardClient
from mars_shared.contracts import RolloutGroup, Score, ScoredGroup, ScoreItem, TextTruth, Unscored
from mars_shared.http import HttpServer, bind
from mars_shared.queue import Claim, DeadLetter, Queue
from mars_shared.server import EmbeddedValkey
from mars_shared.settings import Deployment
from reward_traps import SPEC
from test_reward_worker import STREAMS, group, put, scored_groups, until, with_workers

TRUTH = TextTruth(text="7")
LONG_S = 3600.0
"""A pause that no test waits for."""


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


def trapped(task: str, trap: str, *, at: int = 2) -> RolloutGroup:
    """A group whose completion at that place is a trap; place 2 is that of source visible alone."""
    whole = group(task, "fine", truth=TRUTH)
    texts = [trap if place == at else "fine" for place in range(len(whole.completions))]
    completions = (one.model_copy(update={"text": text}) for one, text in zip(whole.completions, texts, strict=True))
    return whole.model_copy(update={"completions": tuple(completions)})


async def has_dead(queue: Queue, count: int) -> bool:
    return await queue.depth(STREAMS.dead) == count


EXPECTED = {
    "raise": ("reward failed", MAX_ERRORS, "failed: KeyError: 'no such thing'"),
    "surrogate": ("reward failed", MAX_ERRORS, r"failed: ValueError: a text that no encoder takes: \ud800"),
    "exit": ("reward process died", MAX_ERRORS, "ended its process (exit code 0)"),
    "nan": ("reward is not finite", MAX_ERRORS, "reward part 'trap' is nan; expected a finite number"),
    "never": ("reward timed out", MAX_ERRORS, "took longer than 2 s by the clock"),
    "loop": ("reward timed out", MAX_ERRORS_CPU, "used more than 0.5 CPU seconds (reward.time_limit_s)"),
    "regex": ("reward timed out", MAX_ERRORS_CPU, "used more than 0.5 CPU seconds (reward.time_limit_s)"),
}
"""Reason, attempts and message by trap."""


@pytest.mark.parametrize(
    ("traps", "wall_factor"),
    [(("raise", "surrogate", "exit", "nan", "loop", "regex"), custom.WALL_FACTOR), (("never",), 2.0)],
    ids=["not the clock", "the clock"],
)
def test_each_way_to_fail_is_a_dead_letter_with_its_own_reason_and_innocent_groups_are_scored(
    valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch, traps: tuple[str, ...], wall_factor: float
) -> None:
    monkeypatch.setattr(worker, "RETRY_PAUSES_S", (0.1, 0.1))
    monkeypatch.setattr(custom, "WALL_FACTOR", wall_factor)

    async def scenario(queue: Queue) -> tuple[list[DeadLetter], list[ScoredGroup]]:
        await put(queue, *(trapped(trap, trap) for trap in traps), group("innocent", "fine", truth=TRUTH))
        scored = await scored_groups(queue, 1)
        await until(lambda: has_dead(queue, len(traps)))
        assert await queue.depth(STREAMS.rollouts) == await queue.depth(STREAMS.scored("train")) == 0
        return await queue.dead(STREAMS.run), scored

    with offered(SPEC, time_limit_s=0.5):
        letters, (scored,) = with_workers(valkey.url, scenario, recipe=SPEC)
    assert {letter.key: (letter.reason, letter.attempt) for letter in letters} == {trap: EXPECTED[trap][:2] for trap in traps}
    for letter in letters:
        assert letter.detail.startswith(f"group {letter.key}, mono completion 0 of source 'visible': "), letter.detail
        assert EXPECTED[letter.key][2] in letter.detail
        assert ("Traceback" in letter.detail) == (letter.reason == "reward failed")
    assert [score.reward for score in scored.scores] == [1.0] * 4


def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a recipe "breaks" that raises for the completion "bad"."""

    def scorer(item: ScoreItem) -> Parts:
        if item.completion == "bad":
            raise ZeroDivisionError("a slip in a scorer")
        return Parts({"it": 1.0}, parsed=True)

    monkeypatch.setitem(RECIPES, "breaks", {"text": scorer})


def test_a_group_that_waits_for_another_try_holds_up_none_behind_it(
    valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    monkeypatch.setattr(worker, "RETRY_PAUSES_S", (LONG_S, LONG_S))

    async def scenario(queue: Queue) -> tuple[list[str], dict[str, str]]:
        await put(queue, trapped("poison", "bad"), *(group(f"good-{n}", truth=TRUTH) for n in range(3)))
        found = await scored_groups(queue, 3)
        return [one.group.group_id for one in found], await queue.outstanding(STREAMS.rollouts)

    scored, outstanding = with_workers(valkey.url, scenario, recipe="breaks")
    assert scored == ["good-0", "good-1", "good-2"]
    assert list(outstanding.values()) == ["poison"]


def test_the_lease_of_a_group_that_waits_is_kept(valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch) -> None:
    # The leases of two workers last 2 s and a pause 3: a lapse would begin an attempt that reported no error.
    breaks(monkeypatch)
    monkeypatch.setattr(worker, "RETRY_PAUSES_S", (3.0, 0.1))

    async def scenario(queue: Queue) -> list[DeadLetter]:
        await put(queue, trapped("poison", "bad"))
        await until(lambda: has_dead(queue, 1))
        return await queue.dead(STREAMS.run)

    (letter,) = with_workers(valkey.url, scenario, recipe="breaks", workers=2)
    assert (letter.reason, letter.attempt) == ("reward failed", MAX_ERRORS)


def test_a_worker_that_is_told_to_stop_hands_back_at_once_what_waits(
    valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    monkeypatch.setattr(worker, "RETRY_PAUSES_S", (LONG_S, LONG_S))

    async def scenario(queue: Queue) -> None:
        await put(queue, trapped("poison", "bad"), group("good", truth=TRUTH))
        await scored_groups(queue, 1)

    async def claimed() -> Claim | None:
        queue = Queue(valkey.url, lease_s=1e6)
        claim = await queue.claim(STREAMS.rollouts, "another", wait_s=0)
        await queue.close()
        return claim

    with_workers(valkey.url, scenario, recipe="breaks")
    claim = asyncio.run(claimed())
    assert claim is not None and (claim.attempt, claim.errors) == (2, 1)


def test_a_group_that_waits_over_an_outage_of_redis_is_tried_again(
    valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    monkeypatch.setattr(worker, "RETRY_PAUSES_S", (1.0, 0.1))

    async def scenario() -> list[DeadLetter]:
        stop, mine = asyncio.Event(), Queue(valkey.url)
        one = RewardWorker(Queue(valkey.url, lease_s=1.0), STREAMS, "reward-0", recipe="breaks")
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(one.run(stop))
            await put(mine, trapped("poison", "bad"), group("good", truth=TRUTH))
            await scored_groups(mine, 1)
            valkey.stop()
            while one.problem is None:
                await asyncio.sleep(0.02)
            await asyncio.sleep(1.5)  # the pause ends meanwhile
            valkey.start()
            await until(lambda: has_dead(mine, 1))
            letters = await mine.dead(STREAMS.run)
            stop.set()
        return letters

    (letter,) = asyncio.run(scenario())
    assert (letter.reason, letter.key) == ("reward failed", "poison")


@pytest.mark.parametrize(("trap", "gain"), [("raise", None), ("fine", 0.0)])
async def test_an_adhoc_group_shows_the_error_in_place_of_the_score_and_no_gain(trap: str, gain: float | None) -> None:
    listener = bind("127.0.0.1", 0)
    deployment = Deployment(reward_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    with offered(SPEC, time_limit_s=5):
        server = HttpServer(build_app(deployment, recipe=SPEC, ready=lambda: None), listener)
        await server.start()
        client = RewardClient(deployment)
        answer = await client.answer(trapped("t", trap))
        await client.close()
        await server.stop()
    assert GroupAnswer.model_validate_json(answer.model_dump_json()) == answer
    fine = Score(reward=1.0, parts={"trap": 1.0}, parsed=True)
    error = Unscored(error=f"items.2: reward {SPEC!r} failed: KeyError: 'no such thing'")
    assert answer.scores == (fine, fine, fine if trap == "fine" else error, fine)
    assert answer.gain == gain


def write_rows(path: Path, *completions: str) -> Path:
    rows = ({"task": "vqa", "completion": text, "ground_truth": "7", "error": "of an earlier call"} for text in completions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mars_score_gives_every_row_a_score_or_an_error_in_order_and_counts_the_errors(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", "fine", "raise", "loop", "nan", "good")
    command = [sys.executable, "-m", "mars_shared.cli", "score", "--recipe", SPEC, "--time-limit", "0.5", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["completion"], row["score"]) for row in rows] == [
        ("fine", 1.0),
        ("raise", None),
        ("loop", None),
        ("nan", None),
        ("good", 1.0),
    ]
    assert [row.get("error", "").removeprefix(f"{file} ") for row in rows] == [
        "",
        f"line 2: reward {SPEC!r} failed: KeyError: 'no such thing'",
        f"line 3: reward {SPEC!r} used more than 0.5 CPU seconds (reward.time_limit_s)",
        "line 4: reward part 'trap' is nan; expected a finite number",
        "",
    ]
    assert done.returncode == 3
    assert done.stderr == f"mars: 3 of 5 rows of {file} have no score; their field error says why\n"


def test_mars_score_ends_with_0_when_a_reward_of_ones_own_scored_all_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", SPEC, str(write_rows(tmp_path / "rows.jsonl", "fine", "good"))]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["score"] for line in said.out.splitlines()] == [1.0, 1.0]
    assert said.err == "" and SPEC not in RECIPES


def test_mars_score_hands_a_rows_question_to_a_reward_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tmp_path / "asks.py"
    module.write_text("def asked(completion, truth, *, question):\n    return len(question or '')\n")
    file = tmp_path / "rows.jsonl"
    row = {"task": "vqa", "completion": "x", "ground_truth": "7"}
    file.write_text(f"{json.dumps(row | {'question': 'Which?'})}\n{json.dumps(row)}\n")
    assert main(["--recipe", f"{module}:asked", str(file)]) == 0
    assert [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()] == [6.0, 0.0]


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf"])
def test_mars_score_refuses_a_time_limit_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    assert main([f"--time-limit={limit}", str(write_rows(tmp_path / "rows.jsonl", "fine"))]) == 2
    assert "expected seconds above 0" in capsys.readouterr().err
