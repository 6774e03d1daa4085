"""Asynchronous training over a real Valkey: replicas of different speed work ahead, and nothing is thrown away.

Replicas and reward service are small stand-ins that answer with completions of known lengths, slower the longer they are.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from redis import Redis

from builders import make_group, make_score, make_scored
from loop_doubles import Pupil, Shelf, make_run
from mars_shared.contracts import Prompt, Purpose, RolloutGroup, VersionSpan
from mars_shared.errors import LeaseLostError
from mars_shared.queue import Queue, Streams
from mars_shared.server import EmbeddedValkey
from mars_shared.telemetry import read_events
from mars_trainer.checkpoint import Ledger
from mars_trainer.exchange import Exchange, trainer_queue
from mars_trainer.loop import TrainingRun

STEPS, BATCH = 8, 4
LONGEST = 40


def length_of(dispatch_index: int) -> int:
    """Mostly short, some ten times as long."""
    return random.Random(dispatch_index).choice((2, 3, 4, LONGEST))


@dataclass
class Fleet:
    """Replicas and one scorer on a run's streams."""

    queue: Queue
    shelf: Shelf
    streams: Streams
    text: str = "7"
    """Of every completion."""
    sampled: list[int] = field(default_factory=list)

    async def replica(self, name: str, seconds_per_token: float) -> None:
        while True:
            claim = await self.queue.claim(self.streams.prompts, name, wait_s=0.05)
            if claim is not None:
                prompt = Prompt.model_validate_json(claim.payload)
                group = self._group(prompt)
                self.sampled.append(length_of(prompt.dispatch_index))
                await asyncio.sleep(seconds_per_token * length_of(prompt.dispatch_index))
                payload = group.model_dump_json().encode()
                with suppress(LeaseLostError):  # a trainer that starts takes away what its predecessor asked
                    await self.queue.complete(claim, forward=self.streams.rollouts, payload=payload)

    def _group(self, prompt: Prompt) -> RolloutGroup:
        length, version = length_of(prompt.dispatch_index), self.shelf.versions[-1]
        update = {
            "text": self.text,
            "token_ids": (5,) * length,
            "logprobs": (-0.5,) * length,
            "spans": (VersionSpan(version=version, start=0, end=length),),
        }
        group = make_group(prompt)
        completions = tuple(completion.model_copy(update=update) for completion in group.completions)
        return group.model_copy(update={"completions": completions, "policy_version": version})

    async def scorer(self) -> None:
        while True:
            claim = await self.queue.claim(self.streams.rollouts, "scorer", wait_s=0.05)
            if claim is not None:
                group = RolloutGroup.model_validate_json(claim.payload)
                scored = make_scored(group, [make_score(float(index)) for index, _ in enumerate(group.completions)])
                payload = scored.model_dump_json().encode()
                with suppress(LeaseLostError):
                    await self.queue.complete(claim, forward=self.streams.scored(Purpose.TRAIN), payload=payload)


@asynccontextmanager
async def working(fleet: Fleet) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(work)
        for work in (fleet.replica("slow", 0.01), fleet.replica("fast", 0.002), fleet.replica("other", 0.004), fleet.scorer())
    ]
    try:
        yield
        assert not [task.exception() for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.fixture
async def queue(valkey: EmbeddedValkey) -> AsyncIterator[Queue]:
    queue = trainer_queue(valkey.url)
    yield queue
    await queue.close()


def make_async_run(
    folder: Path,
    queue: Queue,
    run_name: str,
    pupil: Pupil,
    shelf: Shelf,
    *,
    checkpoint: Ledger | None = None,
    max_staleness: int,
    checkpoint_every: int = 3,
) -> TrainingRun:
    incarnation = checkpoint.version.incarnation + 1 if checkpoint else 1
    training, evaluation = (
        Exchange(queue, run_name, purpose, incarnation=incarnation, bound=99) for purpose in (Purpose.TRAIN, Purpose.EVAL)
    )
    return make_run(
        folder,
        training,
        pupil,
        shelf,
        evaluation=evaluation,
        checkpoint=checkpoint,
        steps=STEPS,
        prompts_per_step=BATCH,
        dynamic_sampling="none",
        checkpoint_every=checkpoint_every,
        max_staleness=max_staleness,
    )


async def train(run: TrainingRun, *, to: int = STEPS) -> None:
    async with asyncio.timeout(60):
        await run._begin()
        while run.version.step < to:
            await run._step()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_what_is_trained_is_all_that_was_sampled_in_order_and_within_the_bound(
    queue: Queue, patient_queue: Queue, run_name: str, tmp_path: Path, max_staleness: int
) -> None:
    shelf, pupil = Shelf(), Pupil()
    run = make_async_run(tmp_path, queue, run_name, pupil, shelf, max_staleness=max_staleness)
    fleet = Fleet(patient_queue, shelf, Streams(run_name))
    async with working(fleet):
        await train(run)
    flat = [index for step in pupil.steps for index in step]
    assert flat == list(range(STEPS * BATCH)), "every group, each once, in dispatch order"
    trained_lengths = Counter(length_of(index) for index in flat)
    assert trained_lengths == Counter(fleet.sampled), "the long ones are trained as often as they were sampled"
    lags = [event["metrics"]["staleness/max"] for event in read_events(tmp_path / "events.jsonl", "step")]
    assert max(lags) <= max_staleness
    assert (max(lags) > 0) == (max_staleness > 0), "with staleness the replicas work ahead"
    assert run.ledger.dispatched == () and run.ledger.next_dispatch_index == STEPS * BATCH


async def test_a_restarted_trainer_takes_up_what_was_dispatched_and_ends_with_the_same_groups(
    queue: Queue, patient_queue: Queue, run_name: str, tmp_path: Path
) -> None:
    shelf, pupil = Shelf(), Pupil()
    run = make_async_run(tmp_path, queue, run_name, pupil, shelf, max_staleness=2)
    fleet = Fleet(patient_queue, shelf, Streams(run_name))
    async with working(fleet):
        await train(run, to=5)
        # Killed here: of the steps 4 and 5 no checkpoint tells.
        ledger = shelf.checkpoints[-1].ledger
        assert ledger.version.step == 3 and [prompt.dispatch_index for prompt in ledger.dispatched] == list(range(12, 20))
        pupil.steps = pupil.steps[:3]
        again = make_async_run(tmp_path, queue, run_name, pupil, shelf, checkpoint=ledger, max_staleness=2)
        await train(again)
    assert [index for step in pupil.steps for index in step] == list(range(STEPS * BATCH))
    assert again.ledger.consumed == tuple(tuple(range(4 * step, 4 * step + 4)) for step in range(STEPS))


async def test_no_stream_ever_holds_more_than_admission_allows(
    queue: Queue, patient_queue: Queue, run_name: str, tmp_path: Path
) -> None:
    shelf, streams = Shelf(), Streams(run_name)
    run = make_async_run(tmp_path, queue, run_name, Pupil(), shelf, max_staleness=1)
    highest: Counter[str] = Counter()

    async def look() -> None:
        while True:
            for stream in (streams.prompts, streams.rollouts, streams.scored(Purpose.TRAIN)):
                highest[stream] = max(highest[stream], await patient_queue.depth(stream))
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(look())
    async with working(Fleet(patient_queue, shelf, streams)):
        await train(run)
    watching.cancel()
    assert highest[streams.prompts] <= 2 * BATCH and highest[streams.rollouts] <= 2 * BATCH
    # Trained groups stay until the checkpoint, every third step; those of two steps may come in meanwhile.
    assert BATCH <= highest[streams.scored(Purpose.TRAIN)] <= (3 + 2) * BATCH


async def test_a_redis_at_its_memory_limit_slows_the_run_and_does_not_break_it(
    tmp_path: Path, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mars_trainer.exchange.RECONCILE_S", 0.5)
    with EmbeddedValkey(tmp_path / "valkey") as small:
        queue, patient_queue = trainer_queue(small.url), Queue(small.url, lease_s=600)
        used = int(small_client(small).info("memory")["used_memory"])
        # A group has about 40 kB: the four of a step fit, the 32 of the run don't.
        small_client(small).config_set("maxmemory", used + 900_000)
        shelf, pupil = Shelf(), Pupil()
        run = make_async_run(tmp_path, queue, run_name, pupil, shelf, checkpoint_every=STEPS, max_staleness=0)
        async with working(Fleet(patient_queue, shelf, Streams(run_name), text="x" * 10_000)):
            await train(run)
        await queue.close()
        await patient_queue.close()
    assert [index for step in pupil.steps for index in step] == list(range(STEPS * BATCH))
    early = [checkpoint.ledger.version.step for checkpoint in shelf.checkpoints[:-1]]
    assert early and max(early) < STEPS, "a checkpoint came before its time, to let Redis forget"


def small_client(valkey: EmbeddedValkey) -> Redis:
    return Redis.from_url(valkey.url, protocol=2)
