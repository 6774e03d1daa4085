"""The trainer's end of the queue, on a real Valkey; a small worker here stands for replicas and reward service."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from redis import Redis

from builders import make_group, make_prompt, make_score, make_scored
from log_lines import logged
from mars_shared.contracts import PolicyVersion, Prompt, Purpose, RolloutGroup, ScoredGroup
from mars_shared.errors import LeaseLostError, QueueUnavailableError
from mars_shared.queue import Claim, Queue, Streams
from mars_shared.server import EmbeddedValkey
from mars_trainer import exchange as exchange_module
from mars_trainer.exchange import Answer, Death, Exchange, trainer_queue

PATIENT_S = 15.0


def scored(prompt: Prompt) -> ScoredGroup:
    group = make_group(prompt)
    return make_scored(group, [make_score(1.0)] * len(group.completions))


@dataclass
class Worker:
    """Claims prompts, hands them on as rollouts, then as scored groups, as the two services do."""

    queue: Queue
    run: str
    refuse: frozenset[int] = frozenset()
    lose: set[int] = field(default_factory=set)
    seen: list[str] = field(default_factory=list)

    async def step(self) -> bool:
        """Move one entry on; False if there is none."""
        streams = Streams(self.run)
        claim = await self.queue.claim(streams.prompts, "replica", wait_s=0)
        if claim is not None:
            await self._make(claim)
            return True
        claim = await self.queue.claim(streams.rollouts, "scorer", wait_s=0)
        if claim is None:
            return False
        prompt = RolloutGroup.model_validate_json(claim.payload).prompt
        payload = scored(prompt).model_dump_json().encode()
        await self.queue.complete(claim, forward=streams.scored(prompt.purpose), payload=payload)
        return True

    async def _make(self, claim: Claim) -> None:
        prompt = Prompt.model_validate_json(claim.payload)
        self.seen.append(prompt.task_id)
        if prompt.dispatch_index in self.refuse:
            await self.queue.dead_letter(claim, "ImageError", "source 'visible' is torn")
        elif prompt.dispatch_index in self.lose:
            self.lose.remove(prompt.dispatch_index)
            await self.queue.acknowledge([claim])
        else:
            await self.queue.complete(
                claim, forward=Streams(self.run).rollouts, payload=make_group(prompt).model_dump_json().encode()
            )


@asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[Worker]:
    """The worker beside the test, through all failures of Redis."""

    async def work() -> None:
        while True:
            try:
                if not await worker.step():
                    await asyncio.sleep(0.01)
            except QueueUnavailableError:
                await asyncio.sleep(0.05)

    task = asyncio.create_task(work())
    try:
        yield worker
        assert not task.done(), task.exception()
    finally:
        await ended(task)


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel until it is over: one test alone asks for more."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.2)


@pytest.fixture
async def queue(valkey: EmbeddedValkey) -> AsyncIterator[Queue]:
    queue = trainer_queue(valkey.url)
    yield queue
    await queue.close()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks for what is lost or dead every moment, where a run looks every few seconds."""
    monkeypatch.setattr(exchange_module, "RECONCILE_S", 0.3)
    monkeypatch.setattr(exchange_module, "LOOK_FOR_DEAD_S", 0.1)
    monkeypatch.setattr(exchange_module, "RECONNECT_S", 0.1)


@pytest.fixture
def exchange(queue: Queue, run_name: str, fast: None) -> Exchange:
    return make_exchange(queue, run_name)


def make_exchange(
    queue: Queue, run: str, *, purpose: Purpose = Purpose.TRAIN, incarnation: int = 1, bound: int = 1000
) -> Exchange:
    return Exchange(queue, run, purpose, incarnation=incarnation, bound=bound)


def prompts_of(run: str, *indices: int, purpose: Purpose = Purpose.TRAIN) -> list[Prompt]:
    return [make_prompt(index, run=run, purpose=purpose) for index in indices]


async def until(condition: Callable[[], object], task: asyncio.Task[list[Answer]]) -> None:
    """Wait for what `task` brings about."""
    async with asyncio.timeout(PATIENT_S):
        while not condition():
            assert not task.done(), "it ended before"
            await asyncio.sleep(0.01)


async def filled(queue: Queue, stream: str, entries: int, task: asyncio.Task[list[Answer]]) -> None:
    """Wait until a stream holds so many entries."""
    async with asyncio.timeout(PATIENT_S):
        while await queue.depth(stream) < entries:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)


async def patiently(answer: Awaitable[list[Answer]]) -> list[Answer]:
    async with asyncio.timeout(PATIENT_S):
        return await answer


def indices(answers: list[Answer]) -> list[int]:
    return [answer.scored.group.prompt.dispatch_index for answer in answers]


def claims_of(answers: list[Answer]) -> list[Claim]:
    return [answer.claim for answer in answers]


async def depths(queue: Queue, run: str) -> dict[str, int]:
    streams = Streams(run)
    names = {
        "prompts": streams.prompts,
        "rollouts": streams.rollouts,
        "scored": streams.scored(Purpose.TRAIN),
        "dead": streams.dead,
    }
    return {name: await queue.depth(stream) for name, stream in names.items()}


async def test_answers_come_in_dispatch_order_and_stay_in_the_stream_until_acknowledged(
    exchange: Exchange, patient_queue: Queue, run_name: str
) -> None:
    await exchange.start()
    async with working(Worker(patient_queue, run_name)):
        answers = await patiently(exchange.gather(prompts_of(run_name, 3, 1, 2)))
    assert indices(answers) == [1, 2, 3] and exchange.outstanding == 0
    assert answers[0].scored == scored(make_prompt(1, run=run_name))
    assert await depths(exchange.queue, run_name) == {"prompts": 0, "rollouts": 0, "scored": 3, "dead": 0}
    await exchange.acknowledge(claims_of(answers))
    assert await depths(exchange.queue, run_name) == {"prompts": 0, "rollouts": 0, "scored": 0, "dead": 0}


async def test_whoever_waits_for_the_queue_can_be_cancelled_at_any_moment(
    exchange: Exchange, patient_queue: Queue, run_name: str
) -> None:
    # The cancellation must not get lost in a command that is on its way: services end by it.
    async def look() -> None:
        while True:
            await patient_queue.claim(exchange.streams.rollouts, "somebody", wait_s=0)

    moments = random.Random(0)
    for _ in range(40):
        task = asyncio.create_task(look())
        await asyncio.sleep(0.02 * moments.random())
        task.cancel()
        _, late = await asyncio.wait([task], timeout=5)
        await ended(task)
        assert not late


async def test_nobody_renews_a_lease_after_its_keeper_let_go(valkey: EmbeddedValkey, run_name: str) -> None:
    queue, moments = Queue(valkey.url, lease_s=0.01), random.Random(0)
    before = asyncio.all_tasks()
    try:
        for index in range(40):
            await queue.put(Streams(run_name).prompts, b"", dedupe_key=str(index), bound=99)
            claim = await queue.claim(Streams(run_name).prompts, "keeper", wait_s=1)
            assert claim is not None
            with suppress(LeaseLostError):
                async with queue.keep(claim):
                    await asyncio.sleep(0.02 * moments.random())
            await queue.acknowledge([claim])
        async with asyncio.timeout(PATIENT_S):
            while not asyncio.all_tasks() <= before:
                await asyncio.sleep(0.01)
    finally:
        for task in asyncio.all_tasks() - before:
            await ended(task)
        await queue.close()


async def test_nothing_asked_is_answered_at_once(exchange: Exchange) -> None:
    assert await patiently(exchange.gather([])) == []


async def test_no_more_prompts_wait_than_the_bound_and_all_are_answered(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    exchange = make_exchange(queue, run_name, bound=3)
    gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, *range(10))))
    await until(lambda: exchange.outstanding >= 3, gathering)
    await asyncio.sleep(0.4)
    assert await queue.depth(exchange.streams.prompts) == 3 and exchange.outstanding == 10
    async with working(Worker(patient_queue, run_name)):
        assert indices(await patiently(gathering)) == list(range(10))


async def test_a_second_answer_is_dropped(exchange: Exchange, patient_queue: Queue, run_name: str) -> None:
    payload = scored(make_prompt(1, run=run_name)).model_dump_json().encode()
    stream = exchange.streams.scored(Purpose.TRAIN)
    for key in ("1/train-00000001/7", "1/train-00000001/8"):
        await patient_queue.put(stream, payload, dedupe_key=key, bound=10)
    async with working(Worker(patient_queue, run_name)):
        answers = await patiently(exchange.gather(prompts_of(run_name, 1, 2)))
    assert indices(answers) == [1, 2]
    assert await exchange.queue.depth(stream) <= 3  # the two that count, and at most one that comes too late to be looked at
    assert indices(await patiently(answers_after(exchange, patient_queue, run_name))) == [3]
    assert await exchange.queue.depth(stream) == 3


async def test_an_answer_from_before_a_restart_to_the_same_task_is_dropped(
    exchange: Exchange, patient_queue: Queue, run_name: str
) -> None:
    await exchange.start()
    old = make_prompt(1, run=run_name, version=PolicyVersion(incarnation=0, step=3))
    stream = exchange.streams.scored(Purpose.TRAIN)
    await patient_queue.put(stream, scored(old).model_dump_json().encode(), dedupe_key="0/train-00000001/0", bound=9)
    async with working(Worker(patient_queue, run_name)):
        (answer,) = await patiently(exchange.gather(prompts_of(run_name, 1)))
    assert answer.scored.group.prompt == make_prompt(1, run=run_name)
    assert await patient_queue.depth(stream) == 1


async def answers_after(exchange: Exchange, queue: Queue, run: str) -> list[Answer]:
    async with working(Worker(queue, run)):
        return await exchange.gather(prompts_of(run, 3))


async def test_a_dead_prompt_is_reported_with_its_letter_while_the_others_are_answered(
    exchange: Exchange, patient_queue: Queue, run_name: str
) -> None:
    deaths: list[Death] = []
    async with working(Worker(patient_queue, run_name, refuse=frozenset({2}))):
        answers = await patiently(exchange.gather(prompts_of(run_name, 1, 2, 3), on_death=deaths.append))
    assert indices(answers) == [1, 3]
    (death,) = deaths
    assert death.prompt == make_prompt(2, run=run_name)
    assert (death.letter.reason, death.letter.detail) == ("ImageError", "source 'visible' is torn")
    assert (await depths(exchange.queue, run_name))["dead"] == 1


async def test_there_is_one_answer_fewer_for_each_death(exchange: Exchange, patient_queue: Queue, run_name: str) -> None:
    async with working(Worker(patient_queue, run_name, refuse=frozenset({1, 2}))):
        assert indices(await patiently(exchange.gather(prompts_of(run_name, 1, 2, 3)))) == [3]


async def test_more_prompts_may_die_at_once_than_one_look_shows(exchange: Exchange, patient_queue: Queue, run_name: str) -> None:
    deaths: list[Death] = []
    await exchange.start()
    gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, *range(130)), on_death=deaths.append))
    worker = Worker(patient_queue, run_name, refuse=frozenset(range(130)))
    await filled(patient_queue, exchange.streams.prompts, 130, gathering)
    claims = [await patient_queue.claim(exchange.streams.prompts, "replica", wait_s=0) for _ in range(130)]
    for claim in claims:
        assert claim is not None
        await patient_queue.dead_letter(claim, "ImageError", "torn")
    async with working(worker):
        assert await patiently(gathering) == []
    assert sorted(death.prompt.dispatch_index for death in deaths) == list(range(130))


@pytest.mark.parametrize("incarnation", [1, 2])
async def test_dead_letters_from_before_the_start_bury_nobody(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None, incarnation: int
) -> None:
    # A trainer has its predecessor's incarnation again where the run's folder was deleted and an outside Redis kept its data.
    async with working(Worker(patient_queue, run_name, refuse=frozenset({1}))):
        assert await patiently(make_exchange(queue, run_name).gather(prompts_of(run_name, 1))) == []
    again = make_exchange(queue, run_name, incarnation=incarnation)
    await again.start()
    async with working(Worker(patient_queue, run_name)):
        assert indices(await patiently(again.gather(prompts_of(run_name, 1)))) == [1]


async def test_a_prompt_of_another_incarnation_may_die_beside_ours(
    exchange: Exchange, patient_queue: Queue, run_name: str
) -> None:
    await exchange.start()
    stream = exchange.streams.prompts
    prompt = make_prompt(1, run=run_name)
    await patient_queue.put(stream, prompt.model_dump_json().encode(), dedupe_key=f"0/{prompt.task_id}/0", bound=9)
    claim = await patient_queue.claim(stream, "replica", wait_s=0)
    assert claim is not None
    await patient_queue.dead_letter(claim, "Superseded", "of a dead incarnation")
    gathering = asyncio.create_task(exchange.gather([prompt]))
    await asyncio.sleep(0.5)  # time to look at the dead
    async with working(Worker(patient_queue, run_name)):
        assert indices(await patiently(gathering)) == [1]


async def test_a_scored_entry_that_is_rubbish_is_dead_lettered_and_the_run_goes_on(
    exchange: Exchange, patient_queue: Queue, run_name: str
) -> None:
    await exchange.start()
    stream = exchange.streams.scored(Purpose.TRAIN)
    for key, payload in (("rubbish", b"\xff"), ("", b"{}"), ("1/train-00000009", b"[]")):
        await patient_queue.put(stream, payload, dedupe_key=key, bound=10)
    worker = Worker(patient_queue, run_name)
    gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, 1)))
    await filled(patient_queue, exchange.streams.dead, 3, gathering)
    await asyncio.sleep(0.5)  # time to look at the dead
    async with working(worker):
        assert indices(await patiently(gathering)) == [1]
    letters = await patient_queue.dead(run_name)
    assert {letter.reason for letter in letters} == {"not a scored group of schema 1"}


async def test_a_prompt_that_redis_lost_is_asked_again(
    exchange: Exchange, patient_queue: Queue, run_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(Worker(patient_queue, run_name, lose={1, 3})) as worker:
        with caplog.at_level(logging.WARNING):
            answers = await patiently(exchange.gather(prompts_of(run_name, 1, 2, 3)))
    assert indices(answers) == [1, 2, 3]
    assert sorted(worker.seen) == sorted(["train-00000001", "train-00000003"] * 2 + ["train-00000002"])
    assert "prompt train-00000001 is in no stream" in caplog.text


async def test_a_prompt_lost_twice_is_asked_a_third_time(exchange: Exchange, patient_queue: Queue, run_name: str) -> None:
    async with working(Worker(patient_queue, run_name, lose={1})) as worker:
        gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, 1)))
        await until(lambda: not worker.lose, gathering)
        worker.lose.add(1)
        assert indices(await patiently(gathering)) == [1]
    assert worker.seen == ["train-00000001"] * 3


async def test_what_is_only_slow_is_not_asked_again(exchange: Exchange, patient_queue: Queue, run_name: str) -> None:
    gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, 1, 2)))
    claim = await patient_queue.claim(exchange.streams.prompts, "slow", wait_s=PATIENT_S)
    await asyncio.sleep(1.0)  # several reconciliations, with one prompt waiting and one in a replica's hands
    assert claim is not None
    prompt = Prompt.model_validate_json(claim.payload)
    await patient_queue.complete(claim, forward=exchange.streams.rollouts, payload=make_group(prompt).model_dump_json().encode())
    await asyncio.sleep(0.5)
    async with working(Worker(patient_queue, run_name)) as worker:
        assert indices(await patiently(gathering)) == [1, 2]
    assert len(worker.seen) == 1


async def test_an_answer_whose_delivery_was_lost_on_the_way_still_arrives(
    exchange: Exchange, patient_queue: Queue, run_name: str
) -> None:
    # The server handed the entry to the trainer, and the connection broke before the trainer saw it.
    (prompt,) = prompts_of(run_name, 1)
    streams, payload = exchange.streams, prompt.model_dump_json().encode()
    await patient_queue.put(streams.prompts, payload, dedupe_key="1/train-00000001/0", bound=10)
    worker = Worker(patient_queue, run_name)
    assert await worker.step() and await worker.step()
    assert await patient_queue.claim(streams.scored(Purpose.TRAIN), "trainer", wait_s=0) is not None
    assert indices(await patiently(exchange.gather([prompt]))) == [1]
    assert len(worker.seen) == 1


async def test_the_same_prompts_can_be_asked_again_later(exchange: Exchange, patient_queue: Queue, run_name: str) -> None:
    async with working(Worker(patient_queue, run_name)):
        for _ in range(2):
            answers = await patiently(exchange.gather(prompts_of(run_name, 1, 2)))
            assert indices(answers) == [1, 2]
            await exchange.acknowledge(claims_of(answers))


async def test_a_restarted_trainer_clears_what_its_predecessor_left(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    before = make_exchange(queue, run_name)
    gathering = asyncio.create_task(before.gather(prompts_of(run_name, *range(4))))
    worker = Worker(patient_queue, run_name)
    await filled(queue, before.streams.prompts, 4, gathering)
    for _ in range(2):
        assert await worker.step()
    gathering.cancel()
    again = make_exchange(queue, run_name, incarnation=2)
    await again.start()
    assert await depths(queue, run_name) == {"prompts": 0, "rollouts": 0, "scored": 0, "dead": 0}
    async with working(worker):
        assert indices(await patiently(again.gather(prompts_of(run_name, *range(4))))) == [0, 1, 2, 3]


async def test_a_restarted_trainer_keeps_groups_of_what_its_checkpoint_lists_and_asks_the_rest_again(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    before = make_exchange(queue, run_name)
    dispatched = prompts_of(run_name, *range(5))
    gathering = asyncio.create_task(before.gather(dispatched))
    worker = Worker(patient_queue, run_name)
    await filled(queue, before.streams.prompts, 5, gathering)
    for _ in range(3):
        assert await worker.step()
    gathering.cancel()
    assert await depths(queue, run_name) == {"prompts": 2, "rollouts": 3, "scored": 0, "dead": 0}
    claim = await patient_queue.claim(before.streams.rollouts, "scorer", wait_s=0)
    assert claim is not None
    payload = scored(dispatched[0]).model_dump_json().encode()
    await patient_queue.complete(claim, forward=before.streams.scored(Purpose.TRAIN), payload=payload)
    again = make_exchange(queue, run_name, incarnation=2)
    # Of group 0 there is a score, of 1 and 2 there are rollouts; the policy that made 2 is no ancestor; 3 and 4 are not made.
    lost = await again.start(dispatched[:4], usable=lambda group: group.prompt.dispatch_index != 2)
    assert [prompt.dispatch_index for prompt in lost] == [2, 3]
    assert await depths(queue, run_name) == {"prompts": 0, "rollouts": 1, "scored": 1, "dead": 0}
    worker.seen.clear()
    async with working(worker):
        assert indices(await patiently(again.gather(lost))) == [0, 1, 2, 3]
    assert worker.seen == [prompt.task_id for prompt in lost]


async def test_a_group_of_a_dead_incarnation_that_redis_loses_is_asked_again_as_the_living_one_asks(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    before = make_exchange(queue, run_name)
    (old,) = prompts_of(run_name, 1)
    gathering = asyncio.create_task(before.gather([old]))
    worker = Worker(patient_queue, run_name)
    await filled(queue, before.streams.prompts, 1, gathering)
    assert await worker.step()
    gathering.cancel()
    again = make_exchange(queue, run_name, incarnation=2)
    version = PolicyVersion(incarnation=2, step=3)
    again.renew = lambda prompt: prompt.model_copy(update={"policy_version": version})
    assert await again.start([old]) == [] and again.outstanding == 1
    await queue.purge(again.streams.rollouts)
    async with working(worker):
        (answer,) = await patiently(again.gather([]))
    assert answer.scored.group.prompt.policy_version == version


async def test_a_prompt_that_shall_be_asked_again_is_offered_until_it_is_acknowledged(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    prompt = make_prompt(7, run=run_name)
    await patient_queue.put(Streams(run_name).retries, prompt.model_dump_json().encode(), dedupe_key="k", bound=9)
    for incarnation in (1, 2):
        exchange = make_exchange(queue, run_name, incarnation=incarnation)
        await exchange.start()
        await exchange.receive()
        retry = exchange.take_retry()
        assert retry is not None and retry.prompt == prompt
        assert exchange.take_retry() is None
    await exchange.acknowledge([retry.claim])
    assert await queue.depth(exchange.streams.retries) == 0


async def test_when_redis_is_full_of_what_the_trainer_holds_it_makes_room(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    exchange = make_exchange(queue, run_name, bound=2)
    other = prompts_of(run_name, 8, 9)
    for prompt in other:
        await patient_queue.put(exchange.streams.prompts, prompt.model_dump_json().encode(), dedupe_key=prompt.task_id, bound=9)
    asked_for_room = asyncio.Event()

    async def make_room() -> None:
        asked_for_room.set()
        await queue.purge(exchange.streams.prompts)

    exchange.relieve = make_room
    gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, 1, 2)))
    await until(asked_for_room.is_set, gathering)
    async with working(Worker(patient_queue, run_name)):
        assert indices(await patiently(gathering)) == [1, 2]


async def test_training_and_evaluation_do_not_take_each_others_answers(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    training, evaluation = (make_exchange(queue, run_name, purpose=purpose) for purpose in (Purpose.TRAIN, Purpose.EVAL))
    for exchange in (training, evaluation):
        await exchange.start()
    async with working(Worker(patient_queue, run_name, refuse=frozenset({2}))):
        trained, evaluated = await asyncio.gather(
            patiently(training.gather(prompts_of(run_name, 1, 2))),
            patiently(evaluation.gather(prompts_of(run_name, 1, 2, 3, purpose=Purpose.EVAL))),
        )
    assert indices(trained) == [1] and indices(evaluated) == [1, 3]
    assert {answer.scored.group.prompt.purpose for answer in evaluated} == {Purpose.EVAL}


@pytest.fixture
def own_valkey(tmp_path: Path) -> EmbeddedValkey:
    return EmbeddedValkey(tmp_path / "valkey")


@pytest.mark.parametrize("keeps_its_data", [True, False])
async def test_redis_may_die_in_the_middle_with_its_data_or_without(
    own_valkey: EmbeddedValkey, run_name: str, fast: None, keeps_its_data: bool
) -> None:
    own_valkey.start()
    queue, worker_queue = trainer_queue(own_valkey.url), Queue(own_valkey.url, lease_s=1.0)
    try:
        exchange = make_exchange(queue, run_name)
        await exchange.start()
        gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, *range(6))))
        worker = Worker(worker_queue, run_name)
        await until(lambda: exchange.outstanding >= 6, gathering)
        for _ in range(4):
            assert await worker.step()
        await asyncio.to_thread(own_valkey.stop)
        if not keeps_its_data:
            for path in (own_valkey.dir / "appendonlydir").iterdir():
                path.unlink()
        await asyncio.sleep(0.2)
        await asyncio.to_thread(own_valkey.start)
        async with working(worker):
            answers = await patiently(gathering)
            assert indices(answers) == list(range(6))
            await exchange.acknowledge(claims_of(answers))
    finally:
        await queue.close()
        await worker_queue.close()
        await asyncio.to_thread(own_valkey.stop)


async def test_a_flushed_redis_costs_only_what_the_trainer_had_not_read(
    own_valkey: EmbeddedValkey, run_name: str, fast: None
) -> None:
    own_valkey.start()
    queue, worker_queue = trainer_queue(own_valkey.url), Queue(own_valkey.url, lease_s=600)
    try:
        exchange = make_exchange(queue, run_name)
        await exchange.start()
        gathering = asyncio.create_task(exchange.gather(prompts_of(run_name, *range(6))))
        worker = Worker(worker_queue, run_name)
        await filled(worker_queue, exchange.streams.prompts, 6, gathering)
        while len(worker.seen) < 4:
            assert await worker.step()
        for _ in range(3):
            await move_one(worker_queue, exchange.streams)
        await until(lambda: exchange.outstanding == 3, gathering)
        with Redis.from_url(own_valkey.url, protocol=2) as client:
            client.flushall()
        async with working(worker):
            answers = await patiently(gathering)
        assert indices(answers) == list(range(6))
        # Three were read before; the fourth was made, not read and lost; two were not made yet.
        assert sorted(worker.seen) == sorted(f"train-{index:08d}" for index in (0, 1, 2, 3, 3, 4, 5))
        await exchange.acknowledge(claims_of(answers))
    finally:
        await queue.close()
        await worker_queue.close()
        await asyncio.to_thread(own_valkey.stop)


async def move_one(queue: Queue, streams: Streams) -> None:
    """Score one rollout."""
    claim = await queue.claim(streams.rollouts, "scorer", wait_s=PATIENT_S)
    assert claim is not None
    prompt = RolloutGroup.model_validate_json(claim.payload).prompt
    await queue.complete(claim, forward=streams.scored(prompt.purpose), payload=scored(prompt).model_dump_json().encode())


async def test_acknowledging_waits_for_redis(own_valkey: EmbeddedValkey, run_name: str, fast: None) -> None:
    own_valkey.start()
    queue = trainer_queue(own_valkey.url)
    try:
        exchange = make_exchange(queue, run_name)
        async with working(Worker(queue, run_name)):
            answers = await patiently(exchange.gather(prompts_of(run_name, 1)))
        await asyncio.to_thread(own_valkey.stop)
        acknowledging = asyncio.create_task(exchange.acknowledge(claims_of(answers)))
        await asyncio.sleep(0.3)
        assert not acknowledging.done()
        await asyncio.to_thread(own_valkey.start)
        async with asyncio.timeout(PATIENT_S):
            await acknowledging
        assert await queue.depth(exchange.streams.scored(Purpose.TRAIN)) == 0
    finally:
        await queue.close()
        await asyncio.to_thread(own_valkey.stop)


async def test_the_log_follows_a_group_from_question_to_answer_and_one_that_dies(
    exchange: Exchange, patient_queue: Queue, run_name: str, fast: None
) -> None:
    async with working(Worker(patient_queue, run_name, refuse=frozenset({1}))):
        with logged() as lines:
            await patiently(exchange.gather([make_prompt(0, run=run_name), make_prompt(1, run=run_name)]))
    assert lines.of("train-00000000") == ["asked for the group", "received the scored group"]
    assert lines.of("train-00000001") == ["asked for the group", "prompt train-00000001 (sample-1) is dead: ImageError"]
