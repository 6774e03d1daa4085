"""The queue against a real Valkey: every test uses a run, hence streams, of its own."""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from mars_shared.errors import ConfigError, FencedError, LeaseLostError, QueueError, QueueUnavailableError
from mars_shared.queue import Claim, PutResult, Queue, Streams
from mars_shared.server import EmbeddedValkey

LEASE_S = 1.0
PAST_LEASE_S = 1.3
PATIENT_S = 20.0


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def server(valkey: EmbeddedValkey) -> Iterator[redis.Redis]:
    """A plain client, to look behind the queue's back."""
    with redis.Redis.from_url(valkey.url, protocol=2) as client:
        yield client


@pytest.fixture
def streams(request: pytest.FixtureRequest) -> Streams:
    return Streams(re.sub(r"\W", "_", request.node.name))


@pytest.fixture
async def queue(valkey: EmbeddedValkey) -> AsyncIterator[Queue]:
    queue = Queue(valkey.url, lease_s=LEASE_S)
    yield queue
    await queue.close()


async def put(queue: Queue, stream: str, *items: str) -> None:
    for item in items:
        assert await queue.put(stream, item.encode(), dedupe_key=item, bound=1000) is PutResult.PUT


async def claim(queue: Queue, stream: str, consumer: str, wait_s: float = 0.0) -> Claim:
    claim = await queue.claim(stream, consumer, wait_s=wait_s)
    assert claim is not None
    return claim


def test_streams_are_named_after_run_and_stage() -> None:
    streams = Streams("demo")
    assert streams.prompts == "mars:demo:prompts"
    assert streams.rollouts == "mars:demo:rollouts"
    assert streams.scored("train") == "mars:demo:scored:train"
    assert streams.dead == "mars:demo:dead"
    assert Streams.of(streams.scored("train")) == streams
    with pytest.raises(QueueError, match=r"'prompts'.*mars:<run>:<name>"):
        Streams.of("prompts")


async def test_items_come_out_in_the_order_and_with_the_bytes_they_were_put(queue: Queue, streams: Streams) -> None:
    assert await queue.put(streams.prompts, b"\x00\xff first", dedupe_key="a", bound=2) is PutResult.PUT
    assert await queue.put(streams.prompts, b"second", dedupe_key="b", bound=2) is PutResult.PUT
    first, second = await claim(queue, streams.prompts, "w"), await claim(queue, streams.prompts, "w")
    assert (first.payload, first.attempt, first.errors) == (b"\x00\xff first", 1, 0)
    assert (second.payload, second.attempt, second.errors) == (b"second", 1, 0)


async def test_an_empty_stream_yields_nothing(queue: Queue, streams: Streams) -> None:
    assert await queue.claim(streams.prompts, "w", wait_s=0.05) is None
    assert await queue.depth(streams.prompts) == 0


async def test_a_claim_waits_for_an_item_that_comes_later(queue: Queue, streams: Streams) -> None:
    waiting = asyncio.create_task(claim(queue, streams.prompts, "w", PATIENT_S))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await put(queue, streams.prompts, "late")
    assert (await waiting).payload == b"late"


async def test_the_bound_counts_claimed_items_until_they_are_completed(queue: Queue, streams: Streams) -> None:
    async def offer(key: str) -> PutResult:
        return await queue.put(streams.prompts, b"x", dedupe_key=key, bound=2)

    assert [await offer("a"), await offer("b"), await offer("c")] == [PutResult.PUT, PutResult.PUT, PutResult.FULL]
    held = await claim(queue, streams.prompts, "w")
    assert await offer("c") is PutResult.FULL
    assert await queue.depth(streams.prompts) == 2
    await queue.complete(held)
    assert await queue.depth(streams.prompts) == 1
    assert await offer("c") is PutResult.PUT, "a put that was refused as FULL must not count as put"


async def test_a_duplicate_is_refused_even_after_the_first_was_completed(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    assert await queue.put(streams.prompts, b"again", dedupe_key="a", bound=1) is PutResult.DUPLICATE
    await queue.complete(await claim(queue, streams.prompts, "w"))
    assert await queue.put(streams.prompts, b"again", dedupe_key="a", bound=1) is PutResult.DUPLICATE
    assert await queue.put(streams.rollouts, b"a", dedupe_key="a", bound=1) is PutResult.PUT, "keys are per stream"


async def test_puts_of_an_older_incarnation_are_refused_from_the_moment_a_newer_one_begins(
    queue: Queue, streams: Streams
) -> None:
    async def offer(key: str, incarnation: int | None) -> PutResult:
        return await queue.put(streams.prompts, b"x", dedupe_key=key, bound=3, incarnation=incarnation)

    await queue.begin_incarnation(streams.run, 9)
    assert await offer("a", 9) is PutResult.PUT
    await queue.begin_incarnation(streams.run, 10)
    await queue.begin_incarnation(streams.run, 10)
    with pytest.raises(FencedError, match=f"'{streams.run}': incarnation 9 .* incarnation 10 is recorded: another trainer"):
        await offer("a", 9)
    with pytest.raises(FencedError, match="another trainer has taken over"):
        await queue.begin_incarnation(streams.run, 9)
    assert await offer("b", 10) is PutResult.PUT, "the refused ones have not set the record back"
    assert await offer("c", None) is PutResult.PUT
    assert list((await queue.outstanding(streams.prompts)).values()) == ["a", "b", "c"]
    await queue.begin_incarnation(f"{streams.run}-2", 1)


async def test_after_a_flush_the_living_incarnations_next_put_fences_again(
    queue: Queue, streams: Streams, server: redis.Redis
) -> None:
    async def offer(key: str, incarnation: int) -> PutResult:
        return await queue.put(streams.prompts, b"x", dedupe_key=key, bound=9, incarnation=incarnation)

    await queue.begin_incarnation(streams.run, 2)
    server.flushall()
    assert await offer("late", 1) is PutResult.PUT, "nothing is left that could refuse it"
    assert await offer("mine", 2) is PutResult.PUT
    with pytest.raises(FencedError):
        await offer("later", 1)


async def test_a_dead_consumers_item_is_taken_over_after_the_lease_and_not_before(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    first = await claim(queue, streams.prompts, "dead")
    assert await queue.claim(streams.prompts, "alive", wait_s=0) is None
    await asyncio.sleep(PAST_LEASE_S)
    second = await claim(queue, streams.prompts, "alive")
    assert (second.entry_id, second.payload, second.attempt) == (first.entry_id, b"a", 2)


async def test_all_that_a_late_consumer_says_is_fenced_off(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    late = await claim(queue, streams.prompts, "late")
    await asyncio.sleep(PAST_LEASE_S)
    current = await claim(queue, streams.prompts, "current")
    with pytest.raises(LeaseLostError, match=f"{streams.prompts} entry {late.entry_id}.*late.*attempt 1"):
        await queue.complete(late, forward=streams.rollouts, payload=b"late")
    with pytest.raises(LeaseLostError):
        await queue.complete(late)
    with pytest.raises(LeaseLostError):
        await queue.heartbeat(late)
    with pytest.raises(LeaseLostError):
        await queue.retry(late, "late")
    with pytest.raises(LeaseLostError):
        await queue.dead_letter(late, "late", "late")
    assert [await queue.depth(s) for s in (streams.prompts, streams.rollouts, streams.dead)] == [1, 0, 0]
    await queue.complete(current, forward=streams.rollouts, payload=b"current")
    assert (await claim(queue, streams.rollouts, "w")).payload == b"current"


async def test_an_earlier_attempt_of_the_same_consumer_is_fenced_off(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    first = await claim(queue, streams.prompts, "w")
    await asyncio.sleep(PAST_LEASE_S)
    second = await claim(queue, streams.prompts, "w")
    assert (first.attempt, second.attempt) == (1, 2)
    with pytest.raises(LeaseLostError):
        await queue.complete(first)
    await queue.complete(second)


async def test_many_live_items_do_not_hide_an_abandoned_one(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, *(str(i) for i in range(50)))
    held = [await claim(queue, streams.prompts, "w") for _ in range(50)]
    await asyncio.sleep(PAST_LEASE_S)
    await asyncio.gather(*(queue.heartbeat(each) for each in held[:49]))
    assert (await claim(queue, streams.prompts, "other")).payload == b"49"


async def test_a_heartbeat_keeps_the_item_and_is_no_attempt(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    held = await claim(queue, streams.prompts, "w")
    async with queue.keep(held):
        await asyncio.sleep(3 * LEASE_S)
        assert await queue.claim(streams.prompts, "thief", wait_s=0) is None
    await queue.complete(held, forward=streams.rollouts, payload=b"done")
    assert (await claim(queue, streams.rollouts, "w")).payload == b"done"


async def test_keep_ends_the_body_when_the_lease_is_lost(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    held = await claim(queue, streams.prompts, "w")
    with pytest.raises(LeaseLostError):
        async with queue.keep(held):
            await queue.remove(streams.prompts, [held.entry_id])
            await asyncio.sleep(PATIENT_S)
            pytest.fail("the body went on without its lease")


async def test_keep_lets_the_bodys_own_errors_and_its_cancellation_through(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    held = await claim(queue, streams.prompts, "w")
    for error in (ValueError("mine"), TimeoutError("mine")):
        with pytest.raises(type(error), match="mine"):
            async with queue.keep(held):
                raise error
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), queue.keep(held):
            await asyncio.sleep(PATIENT_S)


async def test_a_claim_that_its_body_ended_is_not_taken_for_lost(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a", "b", "c")
    for end in (queue.complete, lambda c: queue.retry(c, "e"), lambda c: queue.dead_letter(c, "r", "d")):
        held = await claim(queue, streams.prompts, "w")
        async with queue.keep(held):
            await end(held)
            await asyncio.sleep(LEASE_S)


async def test_a_retried_item_is_claimable_at_once_and_its_errors_are_counted(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    first = await claim(queue, streams.prompts, "w1")
    assert await queue.retry(first, "no luck") == 1
    second = await claim(queue, streams.prompts, "w2")
    assert (second.entry_id, second.attempt, second.errors) == (first.entry_id, 2, 1)
    assert await queue.retry(second, "no luck again") == 2
    with pytest.raises(LeaseLostError):
        await queue.complete(second)
    third = await claim(queue, streams.prompts, "w1")
    assert (third.attempt, third.errors) == (3, 2)


async def test_a_death_counts_as_an_attempt_and_not_as_an_error(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    await claim(queue, streams.prompts, "w1")
    await asyncio.sleep(PAST_LEASE_S)
    second = await claim(queue, streams.prompts, "w2")
    assert (second.attempt, second.errors) == (2, 0)


async def test_an_item_handed_back_is_claimable_at_once_and_counts_as_neither_error_nor_death(
    queue: Queue, streams: Streams
) -> None:
    await put(queue, streams.prompts, "a")
    first = await claim(queue, streams.prompts, "w1")
    await queue.hand_back(first)
    with pytest.raises(LeaseLostError):
        await queue.hand_back(first)
    second = await claim(queue, streams.prompts, "w2")
    assert (second.entry_id, second.attempt, second.errors, second.handed_back) == (first.entry_id, 2, 0, 1)
    assert second.deaths == 0
    await queue.retry(second, "no luck")
    await claim(queue, streams.prompts, "w3")
    (fourth,) = await queue.resume(streams.prompts, "w3")
    # Four attempts: one handed back, one error, one death, and this one.
    assert (fourth.attempt, fourth.errors, fourth.handed_back, fourth.deaths) == (4, 1, 1, 1)


async def test_lone_deaths_are_the_lone_attempts_that_ended_without_a_word(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    held = await claim(queue, streams.prompts, "w")
    await queue.begin_alone(held)
    await queue.begin_alone(held)
    (held,) = await queue.resume(streams.prompts, "w")
    assert (held.deaths, held.lone_deaths) == (1, 1)
    (held,) = await queue.resume(streams.prompts, "w")
    assert (held.deaths, held.lone_deaths) == (2, 1), "that attempt was not a lone one"
    await queue.begin_alone(held)
    await queue.hand_back(held)
    held = await claim(queue, streams.prompts, "w")
    assert (held.deaths, held.lone_deaths) == (2, 1), "handed back: it ended with a word"
    await queue.begin_alone(held)
    await queue.retry(held, "no luck")
    held = await claim(queue, streams.prompts, "w")
    assert (held.deaths, held.lone_deaths) == (2, 1), "an error: it ended with a word"
    await queue.retry(held, "no luck either")
    held = await claim(queue, streams.prompts, "w")
    assert (held.attempt, held.deaths, held.lone_deaths) == (6, 2, 1), "an attempt that was no lone one takes none off"


async def test_a_late_consumer_begins_nothing_and_hands_nothing_back(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    late = await claim(queue, streams.prompts, "w")
    (current,) = await queue.resume(streams.prompts, "w")
    for say in (queue.begin_alone, queue.hand_back):
        with pytest.raises(LeaseLostError):
            await say(late)
    await queue.heartbeat(current)
    (again,) = await queue.resume(streams.prompts, "w")
    assert (again.handed_back, again.lone_deaths) == (0, 0)


async def test_a_returned_item_is_claimable_whatever_the_lease(valkey: EmbeddedValkey, streams: Streams) -> None:
    queue = Queue(valkey.url, lease_s=math.inf)
    await put(queue, streams.prompts, "a")
    held = await claim(queue, streams.prompts, "w")
    assert await queue.claim(streams.prompts, "w", wait_s=0.05) is None
    await queue.retry(held, "e")
    assert (await claim(queue, streams.prompts, "w")).attempt == 2
    await queue.close()


@pytest.mark.parametrize("end", ["complete", "acknowledge", "remove", "dead_letter", "deleted"])
async def test_counts_of_attempts_end_with_their_item(queue: Queue, streams: Streams, server: redis.Redis, end: str) -> None:
    await put(queue, streams.prompts, "a")
    await queue.retry(await claim(queue, streams.prompts, "w"), "e")
    await queue.hand_back(await claim(queue, streams.prompts, "w"))
    for _ in range(2):
        held = await claim(queue, streams.prompts, "w")
        await queue.begin_alone(held)
        (held,) = await queue.resume(streams.prompts, "w")
        await queue.retry(held, "e")
    held = await claim(queue, streams.prompts, "w")
    await queue.begin_alone(held)
    counts = {"": "3", ":handed_back": "1", ":alone": "3", ":alone_attempt": str(held.attempt)}
    assert server.hgetall(f"{streams.prompts}:errors") == {
        f"{held.entry_id}{field}".encode(): count.encode() for field, count in counts.items()
    }
    if end == "complete":
        await queue.complete(held)
    elif end == "acknowledge":
        await queue.acknowledge([held])
    elif end == "remove":
        await queue.remove(streams.prompts, [held.entry_id])
    elif end == "dead_letter":
        await queue.dead_letter(held, "r", "d")
    else:
        server.xdel(streams.prompts, held.entry_id)
        await queue.resume(streams.prompts, "w")
    assert server.exists(f"{streams.prompts}:errors") == 0


async def test_completing_forwards_the_result_under_the_items_key(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "task-7")
    held = await claim(queue, streams.prompts, "w")
    await queue.complete(held, forward=streams.rollouts, payload=b"group")
    assert await queue.depth(streams.prompts) == 0
    assert list((await queue.outstanding(streams.rollouts)).values()) == ["task-7"]
    assert (await claim(queue, streams.rollouts, "r")).payload == b"group"


async def test_completing_twice_forwards_once(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    held = await claim(queue, streams.prompts, "w")
    outcomes = await asyncio.gather(
        *(queue.complete(held, forward=streams.rollouts, payload=b"group") for _ in range(8)), return_exceptions=True
    )
    assert Counter(type(outcome) for outcome in outcomes) == {type(None): 1, LeaseLostError: 7}
    assert await queue.depth(streams.rollouts) == 1


async def test_forward_and_payload_go_together(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    held = await claim(queue, streams.prompts, "w")
    with pytest.raises(ValueError, match="expected both or none"):
        await queue.complete(held, forward=streams.rollouts)
    assert await queue.depth(streams.prompts) == 1


async def test_a_dead_letter_says_everything_about_its_item(queue: Queue, streams: Streams, server: redis.Redis) -> None:
    await put(queue, streams.prompts, "bad", "worse")
    seconds, microseconds = server.time()
    await queue.retry(await claim(queue, streams.prompts, "w"), "first failure")
    bad = await claim(queue, streams.prompts, "w")
    await queue.dead_letter(bad, "image", "source visible: not an image: 12 bytes")
    await queue.dead_letter(await claim(queue, streams.prompts, "w"), "length", "ünïcode")
    worse_letter, bad_letter = await queue.dead(streams.run)
    assert (bad_letter.payload, bad_letter.key, bad_letter.stream, bad_letter.attempt) == (b"bad", "bad", streams.prompts, 2)
    assert (bad_letter.reason, bad_letter.detail) == ("image", "source visible: not an image: 12 bytes")
    assert (worse_letter.payload, worse_letter.reason, worse_letter.detail) == (b"worse", "length", "ünïcode")
    assert 0 <= bad_letter.time_s - (seconds + microseconds / 1e6) < 60
    assert [letter.payload for letter in await queue.dead(streams.run, limit=1)] == [b"worse"]
    assert [await queue.depth(streams.prompts), await queue.depth(streams.dead)] == [0, 2]


async def test_a_restarted_consumer_gets_what_it_held_and_its_predecessor_is_fenced_off(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a", "b", "c", "d")
    old = [await claim(queue, streams.prompts, "trainer") for _ in range(2)]
    await claim(queue, streams.prompts, "other")
    resumed = await queue.resume(streams.prompts, "trainer")
    assert [(each.payload, each.attempt) for each in resumed] == [(b"a", 2), (b"b", 2)]
    with pytest.raises(LeaseLostError):
        await queue.complete(old[0])
    await queue.complete(resumed[0])
    assert await queue.resume(streams.prompts, "stranger") == []
    assert await queue.resume(streams.rollouts, "trainer") == []


async def test_acknowledging_removes_items_of_several_streams_whoever_holds_them(queue: Queue, streams: Streams) -> None:
    train, evaluation = streams.scored("train"), streams.scored("eval")
    await put(queue, train, "a", "b", "c")
    await put(queue, evaluation, "d")
    claims = [await claim(queue, train, "t"), await claim(queue, train, "t"), await claim(queue, evaluation, "t")]
    await asyncio.sleep(PAST_LEASE_S)
    await claim(queue, train, "other")
    assert await queue.acknowledge(claims) == 3
    assert await queue.acknowledge(claims) == 0
    assert [await queue.depth(train), await queue.depth(evaluation)] == [1, 0]
    assert (await claim(queue, train, "t")).payload == b"c"


async def test_outstanding_lists_keys_and_remove_takes_single_items_out(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a", "b", "c")
    held = await claim(queue, streams.prompts, "w")
    ids = await queue.outstanding(streams.prompts)
    assert list(ids.values()) == ["a", "b", "c"]
    assert await queue.remove(streams.prompts, [entry_id for entry_id, key in ids.items() if key != "b"]) == 2
    with pytest.raises(LeaseLostError):
        await queue.complete(held)
    assert (await claim(queue, streams.prompts, "w")).payload == b"b"


async def test_purging_ends_all_claims_and_leaves_a_usable_stream(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "old-a", "old-b")
    held = await claim(queue, streams.prompts, "w")
    await queue.purge(streams.prompts)
    with pytest.raises(LeaseLostError):
        await queue.complete(held, forward=streams.rollouts, payload=b"stale")
    assert [await queue.depth(streams.prompts), await queue.depth(streams.rollouts)] == [0, 0]
    await put(queue, streams.prompts, "new")
    assert (await claim(queue, streams.prompts, "w")).payload == b"new"


async def test_a_flushed_server_heals(queue: Queue, streams: Streams, server: redis.Redis) -> None:
    await put(queue, streams.prompts, "a", "b")
    held = await claim(queue, streams.prompts, "w")
    waiting = asyncio.create_task(claim(queue, streams.rollouts, "r", PATIENT_S))
    await asyncio.sleep(0.05)
    server.flushall()
    server.script_flush()
    with pytest.raises(LeaseLostError):
        await queue.heartbeat(held)
    with pytest.raises(LeaseLostError):
        await queue.complete(held, forward=streams.rollouts, payload=b"lost")
    assert await queue.resume(streams.prompts, "w") == []
    await put(queue, streams.prompts, "a")
    again = await claim(queue, streams.prompts, "w")
    assert (again.payload, again.attempt) == (b"a", 1)
    await queue.complete(again, forward=streams.rollouts, payload=b"group")
    assert (await waiting).payload == b"group"


async def test_a_stream_whose_group_was_lost_loses_no_item(queue: Queue, streams: Streams, server: redis.Redis) -> None:
    await put(queue, streams.prompts, "a")
    server.xgroup_destroy(streams.prompts, "mars")
    assert (await claim(queue, streams.prompts, "w", PATIENT_S)).payload == b"a"


async def test_a_full_memory_is_back_pressure_and_drains(queue: Queue, streams: Streams, server: redis.Redis) -> None:
    await put(queue, streams.prompts, "a", "b", "c")
    server.config_set("maxmemory", 1)
    try:
        await queue.begin_incarnation(streams.run, 4)
        assert await queue.put(streams.prompts, b"d", dedupe_key="d", bound=10) is PutResult.FULL
        assert await queue.put(streams.scored("new"), b"d", dedupe_key="d", bound=10) is PutResult.FULL
        await queue.complete(await claim(queue, streams.prompts, "w"), forward=streams.rollouts, payload=b"group")
        await queue.complete(await claim(queue, streams.rollouts, "r"))
        assert await queue.retry(await claim(queue, streams.prompts, "w"), "e") == 1
        await queue.hand_back(await claim(queue, streams.prompts, "w"))
        suspect = await claim(queue, streams.prompts, "w")
        await queue.begin_alone(suspect)
        await queue.dead_letter(suspect, "r", "d")
        assert await queue.claim(streams.scored("new"), "w", wait_s=0) is None
    finally:
        server.config_set("maxmemory", 0)
    assert await queue.put(streams.prompts, b"d", dedupe_key="d", bound=10) is PutResult.PUT
    assert [await queue.depth(streams.prompts), await queue.depth(streams.dead)] == [2, 1]
    with pytest.raises(FencedError):
        await queue.begin_incarnation(streams.run, 3)


async def test_many_concurrent_consumers_get_each_item_exactly_once(valkey: EmbeddedValkey, streams: Streams) -> None:
    queues = [Queue(valkey.url, lease_s=60) for _ in range(4)]
    done: list[bytes] = []

    async def consume(queue: Queue, name: str) -> None:
        while held := await queue.claim(streams.prompts, name, wait_s=0.2):
            await queue.complete(held, forward=streams.rollouts, payload=held.payload)
            done.append(held.payload)

    async def produce(queue: Queue) -> None:
        for i in range(200):
            await queue.put(streams.prompts, b"%d" % i, dedupe_key=str(i), bound=1000)

    consumers = [consume(queue, f"w{n}-{i}") for n, queue in enumerate(queues) for i in range(4)]
    await asyncio.gather(*(produce(queue) for queue in queues), *consumers)
    assert Counter(done) == {b"%d" % i: 1 for i in range(200)}
    assert await queues[0].depth(streams.prompts) == 0
    assert sorted(map(int, (await queues[0].outstanding(streams.rollouts)).values())) == list(range(200))
    for queue in queues:
        await queue.close()


async def test_a_cancelled_command_leaves_no_answer_for_the_next_one(queue: Queue, streams: Streams) -> None:
    await put(queue, streams.prompts, "a")
    for delay_s in (0, 0.0001, 0.0003, 0.0005, 0.001) * 10:
        waiting = asyncio.create_task(queue.outstanding(streams.prompts))
        await asyncio.sleep(delay_s)
        waiting.cancel()
        assert await queue.depth(streams.prompts) == 1


async def test_nothing_listening_is_one_clear_error_without_the_password(streams: Streams) -> None:
    queue = Queue("redis://:s3cret@127.0.0.1:1/0")
    attempts = [
        queue.ping(),
        queue.depth(streams.prompts),
        queue.put(streams.prompts, b"a", dedupe_key="a", bound=1),
        queue.claim(streams.prompts, "w", wait_s=0),
        queue.heartbeat(Claim(streams.prompts, "1-0", "w", 1, b"")),
        queue.purge(streams.prompts),
        queue.dead(streams.run),
    ]
    for outcome in await asyncio.gather(*attempts, return_exceptions=True):
        assert isinstance(outcome, QueueUnavailableError)
        assert re.search(r"127\.0\.0\.1:1 .*is Redis or Valkey running there\? MARS_REDIS_URL=", str(outcome))
        assert "s3cret" not in str(outcome)
    await queue.close()


@pytest.mark.parametrize("login", [":wr0ng@", ""])
async def test_a_wrong_or_missing_password_is_named_and_not_shown(valkey: EmbeddedValkey, login: str) -> None:
    queue = Queue(f"redis://{login}127.0.0.1:{valkey.port}/0")
    with pytest.raises(QueueUnavailableError, match=rf"127\.0\.0\.1:{valkey.port} refused the login.*MARS_REDIS_URL") as caught:
        await queue.ping()
    assert "wr0ng" not in str(caught.value)
    await queue.close()


@pytest.mark.parametrize("url", ["http://:s3cret@host/0", "redis://:s3/cret@host:1/0"])
def test_a_malformed_url_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError, match="MARS_REDIS_URL: expected redis://") as caught:
        Queue(url)
    assert "s3" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize("lease_s", [0.0, -1.0, math.nan])
def test_a_lease_takes_time(lease_s: float) -> None:
    with pytest.raises(ConfigError, match="expected seconds above 0"):
        Queue("redis://127.0.0.1/0", lease_s=lease_s)


async def test_a_command_that_the_server_refuses_is_a_queue_error(queue: Queue, streams: Streams, server: redis.Redis) -> None:
    server.set(streams.prompts, "not a stream")
    with pytest.raises(QueueError, match=r"refused a command: .*WRONGTYPE"):
        await queue.claim(streams.prompts, "w", wait_s=0)
