"""The reward worker on a real Valkey: whole groups in, whole groups out, nothing lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mars_reward.registry import RECIPES, Parts
from mars_reward.worker import MAX_DEATHS, MAX_ERRORS, RewardWorker, read_group, score_group
from mars_shared.contracts import (
    BoxesTruth,
    BoxFrame,
    Completion,
    FinishReason,
    FrameKind,
    Kind,
    PolicyVersion,
    Prompt,
    Purpose,
    ReleasedEval,
    RenderedView,
    RolloutGroup,
    SamplingSpec,
    ScoredGroup,
    ScoreItem,
    Source,
    TextTruth,
    Truth,
    expected_members,
)
from mars_shared.errors import ConfigError, InputError, RewardNotFiniteError
from mars_shared.queue import Queue, Streams
from mars_shared.server import EmbeddedValkey

STREAMS = Streams("reward-worker-test")
SOURCES = ("visible", "infrared")
FRAME_WIDTHS = {None: 100.0, "visible": 50.0, "infrared": 200.0}
BOXES = BoxesTruth(boxes=((0, 0, 20, 10),), width_px=100, height_px=100)
ONE_BOX = '<think>r</think><answer>```json\n[{"bbox_2d": [0, 0, 10, 10]}]\n```</answer>'


def group(task: str, text: str = "<answer>7</answer>", *, truth: Truth | None, purpose: Purpose = Purpose.TRAIN) -> RolloutGroup:
    """Two multi-source completions and one of each source, all with the same text."""
    prompt = Prompt(
        task_id=task,
        prompt_id=f"sample-{task}",
        run="reward-worker-test",
        purpose=purpose,
        epoch=0,
        dispatch_index=0,
        question="Where?",
        sources=tuple(Source(name=name, blob="0" * 64, media_type="image/png") for name in SOURCES),
        truth=truth,
        box_frame=FrameKind.RESIZED,
        sampling=SamplingSpec(num_generations=2, num_mono=1, temperature=1, top_p=1, max_completion_length=8, seed=0),
    )
    return RolloutGroup(
        prompt=prompt,
        views=tuple(
            RenderedView(
                source=source,
                token_ids=(1,),
                images=SOURCES if source is None else (source,),
                frame=BoxFrame(kind=FrameKind.RESIZED, width=width, height=100),
            )
            for source, width in FRAME_WIDTHS.items()
        ),
        completions=tuple(
            Completion(
                group_id=task,
                kind=kind,
                source=source,
                index=index,
                text=text,
                token_ids=(5,),
                logprobs=(-0.5,),
                finish_reason=FinishReason.STOP,
                seed=1,
            )
            for kind, source, index in expected_members(prompt)
        ),
        policy_version=PolicyVersion(incarnation=0, step=0),
        weights_id="w",
        replica="r",
        started_at=0,
        generation_s=1,
    )


def test_every_completion_is_scored_in_the_frame_of_the_view_it_saw() -> None:
    # [0, 0, 10, 10] is 10, 20 or 5 pixels wide in frames 100, 50 and 200 wide; the object is 20 x 10.
    scored = score_group(group("t", ONE_BOX, truth=BOXES), "paper")
    assert [score.parts["iou"] for score in scored.scores] == pytest.approx([0.5, 0.5, 1.0, 0.25], abs=1e-12)
    assert scored.rewards(Kind.MONO, "visible") == pytest.approx((1.75,), abs=1e-12)


def test_a_group_without_truth_is_an_error_that_names_prompt_and_group() -> None:
    with pytest.raises(InputError, match="group t: prompt 'sample-t' has no truth"):
        score_group(group("t", truth=None), "paper")


def test_an_error_names_the_completion_in_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_for_infrared(item: ScoreItem) -> Parts:
        return Parts({"iou": float("nan") if item.frame and item.frame.width == 200 else 0.0}, parsed=True)

    monkeypatch.setitem(RECIPES, "nan", {"text": nan_for_infrared})
    with pytest.raises(RewardNotFiniteError, match="group t, mono completion 0 of source 'infrared': reward part 'iou' is nan"):
        score_group(group("t", truth=TextTruth(text="7")), "nan")


def test_a_payload_that_is_no_group_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="no RolloutGroup: prompt: Field required"):
        read_group(b'{"schema_version": 1}')


def test_a_worker_with_an_unknown_recipe_is_not_made() -> None:
    with pytest.raises(ConfigError, match="'mine' is unknown"):
        RewardWorker(Queue("redis://127.0.0.1:1/0"), STREAMS, "w", recipe="mine")


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


async def put(queue: Queue, *groups: RolloutGroup) -> None:
    for one in groups:
        await queue.put(STREAMS.rollouts, one.model_dump_json().encode(), dedupe_key=one.group_id, bound=1000)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.02)


async def scored_groups(queue: Queue, count: int, purpose: str = "train") -> list[ScoredGroup]:
    found: list[ScoredGroup] = []
    while len(found) < count:
        claim = await queue.claim(STREAMS.scored(purpose), "trainer", wait_s=1)
        if claim is not None:
            found.append(ScoredGroup.model_validate_json(claim.payload))
            await queue.complete(claim)
    return found


def with_workers(url: str, scenario: Callable[[Queue], Awaitable[Any]], *, recipe: str = "paper", workers: int = 1) -> Any:
    """Run a scenario beside workers; a scenario that waits for ever is a failure."""

    async def run() -> Any:
        stop = asyncio.Event()
        queues = [Queue(url, lease_s=2.0) for _ in range(workers + 1)]
        async with asyncio.timeout(180), asyncio.TaskGroup() as tasks:
            for index in range(workers):
                worker = RewardWorker(queues[index], STREAMS, f"reward-{index}", recipe=recipe)
                tasks.create_task(worker.run(stop))
            try:
                return await scenario(queues[-1])
            finally:
                stop.set()
                await asyncio.sleep(0)

    return asyncio.run(run())


@pytest.mark.parametrize("purpose", [Purpose.TRAIN, Purpose.EVAL])
def test_a_scored_group_goes_to_the_stream_of_its_purpose(valkey: EmbeddedValkey, purpose: Purpose) -> None:
    sent = group("t", truth=TextTruth(text="7"), purpose=purpose)

    async def scenario(queue: Queue) -> tuple[ScoredGroup, int]:
        await put(queue, sent)
        (scored,) = await scored_groups(queue, 1, purpose)
        return scored, await queue.depth(STREAMS.rollouts)

    scored, depth = with_workers(valkey.url, scenario)
    assert scored.group == sent
    assert [score.reward for score in scored.scores] == [1.25] * 4
    assert (scored.recipe, depth) == ("paper", 0)
    # The released evaluation script's verdict stands beside the scores of evaluation groups alone.
    assert scored.released == ((ReleasedEval(value=1.0, correct=True),) * 4 if purpose is Purpose.EVAL else None)


def test_bad_groups_are_dead_letters_with_reasons_and_the_next_group_is_scored(valkey: EmbeddedValkey) -> None:
    async def scenario(queue: Queue) -> tuple[list[ScoredGroup], list[tuple[str, str]]]:
        await put(queue, group("no-truth", truth=None))
        await queue.put(STREAMS.rollouts, b"\xff garbage", dedupe_key="garbage", bound=1000)
        await put(queue, group("good", truth=TextTruth(text="7")))
        scored = await scored_groups(queue, 1)
        return scored, [(letter.key, letter.detail) for letter in await queue.dead(STREAMS.run)]

    scored, dead = with_workers(valkey.url, scenario)
    assert [one.group.group_id for one in scored] == ["good"]
    assert [key for key, _ in dead] == ["garbage", "no-truth"]
    assert "is no RolloutGroup" in dead[0][1] and "has no truth" in dead[1][1]


def test_an_unexpected_error_is_tried_three_times_then_kept_with_its_traceback(
    valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def explode(item: ScoreItem) -> Parts:
        calls.append(item.completion)
        raise ZeroDivisionError("a slip in a scorer")

    monkeypatch.setitem(RECIPES, "broken", {"text": explode})

    async def scenario(queue: Queue) -> list[Any]:
        await put(queue, group("t", truth=TextTruth(text="7")))
        await until(lambda: is_dead(queue))
        assert await queue.depth(STREAMS.scored("train")) == 0
        return await queue.dead(STREAMS.run)

    (letter,) = with_workers(valkey.url, scenario, recipe="broken")
    assert len(calls) == MAX_ERRORS == 3
    assert letter.reason == "reward failed"
    assert "Traceback" in letter.detail and "ZeroDivisionError: a slip in a scorer" in letter.detail
    assert "while scoring group t, multi completion 0" in letter.detail
    assert json.loads(letter.payload)["prompt"]["task_id"] == "t"


async def is_dead(queue: Queue) -> bool:
    return await queue.depth(STREAMS.dead) == 1


def test_a_group_that_killed_its_workers_again_and_again_is_given_up(valkey: EmbeddedValkey) -> None:
    async def die_often() -> None:
        queue = Queue(valkey.url)
        await put(queue, group("t", truth=TextTruth(text="7")))
        assert await queue.claim(STREAMS.rollouts, "reward-0", wait_s=1)
        for _ in range(MAX_DEATHS - 1):
            await queue.resume(STREAMS.rollouts, "reward-0")
        await queue.close()

    async def scenario(queue: Queue) -> list[Any]:
        await until(lambda: is_dead(queue))
        return await queue.dead(STREAMS.run)

    asyncio.run(die_often())
    (letter,) = with_workers(valkey.url, scenario)
    assert (letter.reason, letter.attempt) == ("worker died", MAX_DEATHS + 1)


def test_three_workers_score_each_group_exactly_once(valkey: EmbeddedValkey) -> None:
    tasks = [f"t{index}" for index in range(30)]

    async def scenario(queue: Queue) -> list[ScoredGroup]:
        await put(queue, *(group(task, truth=TextTruth(text="7")) for task in tasks))
        found = await scored_groups(queue, len(tasks))
        assert await queue.depth(STREAMS.rollouts) == await queue.depth(STREAMS.scored("train")) == 0
        return found

    found = with_workers(valkey.url, scenario, workers=3)
    assert sorted(one.group.group_id for one in found) == sorted(tasks)


def test_a_restarted_worker_takes_up_what_it_held_without_waiting_for_the_lease(valkey: EmbeddedValkey) -> None:
    async def scenario() -> list[ScoredGroup]:
        queue = Queue(valkey.url, lease_s=1e6)
        await put(queue, group("held", truth=TextTruth(text="7")))
        assert await queue.claim(STREAMS.rollouts, "reward-0", wait_s=1)
        stop = asyncio.Event()
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(RewardWorker(queue, STREAMS, "reward-0", recipe="paper").run(stop))
            found = await scored_groups(queue, 1)
            stop.set()
        return found

    assert [one.group.group_id for one in asyncio.run(scenario())] == ["held"]


def test_the_worker_waits_for_a_redis_that_is_away_and_goes_on(valkey: EmbeddedValkey) -> None:
    async def scenario() -> tuple[str | None, list[ScoredGroup], str | None]:
        stop = asyncio.Event()
        queue, mine = Queue(valkey.url), Queue(valkey.url)
        worker = RewardWorker(queue, STREAMS, "reward-0", recipe="paper")
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(worker.run(stop))
            await put(mine, group("before", truth=TextTruth(text="7")))
            found = await scored_groups(mine, 1)
            valkey.stop()
            await until(lambda: has_problem(worker, True))
            away = worker.problem
            valkey.start()
            await put(mine, group("after", truth=TextTruth(text="7")))
            found += await scored_groups(mine, 1)
            await until(lambda: has_problem(worker, False))
            stop.set()
        return away, found, worker.problem

    away, found, problem = asyncio.run(scenario())
    assert away is not None and "no answer from Redis" in away
    assert [one.group.group_id for one in found] == ["before", "after"]
    assert problem is None


async def has_problem(worker: RewardWorker, expected: bool) -> bool:
    return (worker.problem is not None) == expected
