"""The queue worker and the policy it follows: real Valkey, real weights store, a scripted engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import redis
import torch

from log_lines import logged
from mars_rollout.group import GroupMaker
from mars_rollout.policy import Policy
from mars_rollout.render import PromptRenderer
from mars_rollout.worker import MAX_DEATHS, MAX_LONE_DEATHS, SUSPECT_DEATHS, RolloutWorker
from mars_shared.contracts import PolicyVersion, RolloutGroup, Source, WeightManifest
from mars_shared.errors import IntegrityError, NotReadyError
from mars_shared.lua import GROUP
from mars_shared.queue import Queue, Streams
from mars_shared.weights import WeightsStore
from rollout_doubles import ScriptedEngine
from rollout_fixtures import DATA, RunFolder, make_prompt, make_run_folder, policy_at, publish
from weights_builders import publish_snapshot, weights


def version(step: int, incarnation: int = 1) -> PolicyVersion:
    return PolicyVersion(incarnation=incarnation, step=step)


def versions_of(group: RolloutGroup) -> list[PolicyVersion]:
    """The versions of a group's spans, which are the same for each completion."""
    (versions,) = {tuple(span.version for span in completion.spans) for completion in group.completions}
    return list(versions)


@dataclass
class Shop:
    """One worker with everything around it."""

    place: RunFolder
    store: WeightsStore
    engine: ScriptedEngine
    policy: Policy
    queue: Queue
    streams: Streams
    worker: RolloutWorker
    server: redis.Redis
    put_count: int = 0

    def publish(self, step: int, incarnation: int = 1) -> WeightManifest:
        tensors = {"weight": torch.full((1,), float(step))}
        return publish(self.store, tensors, version(step, incarnation), self.place.recipe.model.path)

    async def put(self, payload: bytes | None = None, **changes: object) -> None:
        self.put_count += 1
        changes = {"task": f"task-{self.put_count}"} | changes
        data = payload if payload is not None else make_prompt(self.place.blobs, **changes).model_dump_json().encode()  # type: ignore[arg-type]
        await self.queue.put(self.streams.prompts, data, dedupe_key=f"key-{self.put_count}", bound=100)

    async def result(self) -> RolloutGroup:
        claim = None
        while claim is None:
            claim = await self.queue.claim(self.streams.rollouts, "test", wait_s=0.2)
        await self.queue.complete(claim)
        return RolloutGroup.model_validate_json(claim.payload)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)

    async def until_empty(self) -> None:
        while await self.queue.depth(self.streams.prompts):
            await asyncio.sleep(0.01)

    async def make_suspicious(self) -> None:
        """Let attempts at the next entry end without a word; then it is claimable by anyone."""
        claim = await self.queue.claim(self.streams.prompts, "ghost", wait_s=0)
        for _ in range(SUSPECT_DEATHS):
            (claim,) = await self.queue.resume(self.streams.prompts, "ghost")
        await self.queue.hand_back(claim)

    async def until_held_by(self, consumer: str, count: int) -> None:
        """Return once that consumer holds so many prompts."""
        while len(self.server.xpending_range(self.streams.prompts, GROUP, "-", "+", 100, consumer)) != count:
            await asyncio.sleep(0.01)

    @asynccontextmanager
    async def dying(self) -> AsyncIterator[None]:
        """A worker that ends as by kill -9: without a word about what is in its hands. The next one bears its name."""
        work = asyncio.create_task(self.worker.run(asyncio.Event()))
        yield
        self.engine.alive = False
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        self.engine.alive = True

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        work = asyncio.create_task(self.worker.run(stop))
        try:
            yield
        finally:
            stop.set()
            self.engine.gate.set()
            await work


@pytest.fixture
def in_flight() -> str:
    """As the recipe's default; tests of the other value are parametrized by it."""
    return "drain"


@pytest.fixture
async def shop(
    tmp_path: Path, model_dir: Path, redis_url: str, renderer: PromptRenderer, in_flight: Literal["drain", "continue"]
) -> AsyncIterator[Shop]:
    place = make_run_folder(tmp_path, model_dir)
    engine, store = ScriptedEngine(), WeightsStore(tmp_path / "weights")
    policy = policy_at(engine, store, model_dir, tmp_path / "scratch", in_flight=in_flight)
    queue, streams = Queue(redis_url, lease_s=60.0), Streams(f"w-{tmp_path.name}")
    maker = GroupMaker(engine, renderer, place.blobs, replica="replica-0", data=DATA)
    worker = RolloutWorker(
        queue,
        streams,
        maker,
        policy,
        consumer="replica-0",
        concurrency=2,
        healthy=lambda: engine.alive and policy.fault is None,
    )
    with redis.Redis.from_url(redis_url, protocol=2) as server:
        yield Shop(place, store, engine, policy, queue, streams, worker, server)
    await queue.close()


async def test_a_prompt_is_answered_with_the_version_it_asks_for(shop: Shop) -> None:
    manifest = shop.publish(3)
    await shop.put(policy_version=version(3))
    async with shop.working():
        group = await shop.result()
        await shop.until_empty()
    assert group.policy_version == version(3)
    assert group.weights_id == manifest.weights_id
    assert group.pull_s > 0


@pytest.mark.parametrize("in_flight", ["drain", "continue"])
async def test_a_change_waits_for_groups_in_flight_that_do_not_tolerate_it(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.gate.clear()
    await shop.put(policy_version=version(1))
    async with shop.working():
        await shop.until(lambda: shop.engine.running == 3)
        shop.publish(2)
        await shop.put(policy_version=version(2))
        following = asyncio.create_task(shop.policy.follow())
        await asyncio.sleep(0.3)
        assert shop.engine.updates == [version(1)]
        shop.engine.gate.set()
        groups = [await shop.result(), await shop.result()]
        following.cancel()
    assert sorted(group.policy_version for group in groups) == [version(1), version(2)]
    assert shop.engine.running_at_update == [0, 0]


async def test_an_adhoc_request_delays_no_change(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.gate.clear()
    adhoc = asyncio.create_task(shop.worker._maker.make(make_prompt(shop.place.blobs, purpose="adhoc", policy_version=None)))
    await shop.until(lambda: shop.engine.running == 3)
    following = asyncio.create_task(shop.policy.follow())
    await shop.until(lambda: shop.engine.updates == [version(1)])
    shop.engine.gate.set()
    await adhoc
    following.cancel()


async def test_a_newer_version_may_answer_within_the_tolerated_and_an_older_one_never(shop: Shop) -> None:
    shop.publish(4)
    await shop.put(policy_version=version(3), max_staleness=1, task="3 or 4")
    await shop.put(policy_version=version(5), max_staleness=1, task="5 or 6")
    async with shop.working():
        first = await shop.result()
        await asyncio.sleep(0.4)
        assert len(shop.engine.requests) == 3
        shop.publish(5)
        second = await shop.result()
    assert (first.group_id, first.policy_version) == ("3 or 4", version(4))
    assert (second.group_id, second.policy_version) == ("5 or 6", version(5))


async def test_drain_lets_groups_in_flight_finish_and_begins_nothing_on_old_weights(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.gate.clear()
    await shop.put(policy_version=version(1), max_staleness=1)
    async with shop.working():
        await shop.engine.until_running(3)
        shop.publish(2)
        await shop.put(policy_version=version(1), max_staleness=1)
        await shop.until_held_by("replica-0", 2)
        await asyncio.sleep(0.3)
        assert (len(shop.engine.requests), shop.engine.updates) == (3, [version(1)])
        shop.engine.gate.set()
        groups = [await shop.result(), await shop.result()]
    assert [versions_of(group) for group in groups] == [[version(1)], [version(2)]]


@pytest.mark.parametrize("in_flight", ["continue"])
async def test_continue_changes_the_weights_under_groups_that_tolerate_it(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.gate.clear()
    await shop.put(policy_version=version(1), max_staleness=1)
    async with shop.working():
        await shop.engine.until_running(3)
        shop.publish(2)
        await shop.put(policy_version=version(1), max_staleness=1)
        await shop.engine.until_running(6)
        shop.engine.gate.set()
        groups = sorted([await shop.result(), await shop.result()], key=lambda group: group.group_id)
    assert shop.engine.running_at_update == [0, 3]
    assert [group.policy_version for group in groups] == [version(1), version(2)]
    assert [versions_of(group) for group in groups] == [[version(1), version(2)], [version(2)]]


async def test_a_prompt_older_than_it_tolerates_is_dead_and_says_why(shop: Shop) -> None:
    shop.publish(4)
    await shop.put(policy_version=version(3))
    async with shop.working():
        await shop.until_empty()
    (letter,) = await shop.queue.dead(shop.streams.run)
    assert "asks for version 1.3 with max_staleness 0, but 1.4 is current" in letter.detail


async def test_a_prompt_of_a_dead_incarnation_is_dropped_without_a_trace(shop: Shop) -> None:
    shop.publish(4, incarnation=2)
    await shop.put(policy_version=version(4, incarnation=1))
    async with shop.working():
        await shop.until_empty()
    assert await shop.queue.dead(shop.streams.run) == []
    assert await shop.queue.depth(shop.streams.rollouts) == 0


async def test_a_replica_ahead_in_a_dead_incarnation_pulls_back(shop: Shop) -> None:
    shop.publish(7, incarnation=1)
    await shop.put(policy_version=version(7, incarnation=1))
    async with shop.working():
        await shop.result()
        shop.publish(5, incarnation=2)
        await shop.put(policy_version=version(5, incarnation=2))
        group = await shop.result()
    assert group.policy_version == version(5, incarnation=2)


async def test_a_prompt_waits_for_its_version_to_be_announced(shop: Shop) -> None:
    shop.publish(1)
    await shop.put(policy_version=version(2))
    async with shop.working():
        await asyncio.sleep(0.4)
        assert shop.engine.requests == []
        shop.publish(2)
        assert (await shop.result()).policy_version == version(2)


async def test_bad_input_is_a_dead_letter_at_once_and_others_go_on(shop: Shop) -> None:
    shop.publish(1)
    await shop.put(policy_version=version(1), question="Which <|image_pad|>?")
    await shop.put(b'{"schema_version": 1}')
    await shop.put(policy_version=version(1))
    async with shop.working():
        assert (await shop.result()).group_id == "task-3"
        await shop.until_empty()
    letters = {letter.reason: letter.detail for letter in await shop.queue.dead(shop.streams.run)}
    assert set(letters) == {"InputError", "unreadable"}
    assert "<|image_pad|>" in letters["InputError"]
    assert "no Prompt" in letters["unreadable"]


async def test_an_engine_error_is_retried_twice_and_then_given_up(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.failures = [NotReadyError("dropped once"), NotReadyError("dropped twice")]
    await shop.put(policy_version=version(1))
    async with shop.working():
        await shop.result()
        shop.engine.failures = [NotReadyError(f"dropped {i}") for i in range(9)]
        await shop.put(policy_version=version(1))
        await shop.until_empty()
    (letter,) = await shop.queue.dead(shop.streams.run)
    assert letter.reason == "NotReadyError"


async def test_a_dead_engine_ends_the_worker_and_leaves_the_prompt_uncounted(shop: Shop) -> None:
    shop.publish(1)
    await shop.put(policy_version=version(1))
    shop.engine.alive = False
    with pytest.raises(ExceptionGroup) as raised:
        await shop.worker.run(asyncio.Event())
    assert raised.group_contains(NotReadyError)
    (claim,) = await shop.queue.resume(shop.streams.prompts, "replica-0")
    assert (claim.errors, claim.handed_back, claim.deaths) == (0, 0, 1)


async def test_damaged_weights_are_refused_by_name_until_they_are_written_again(shop: Shop) -> None:
    manifest = shop.publish(1)
    file = shop.store.folder(manifest) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    following = asyncio.create_task(shop.policy.follow())
    await shop.until(shop.store.needs_snapshot)
    assert shop.policy.damage is not None and re.search(r"weights 1\.1: .*model\.safetensors", shop.policy.damage)
    assert shop.engine.updates == [] and shop.policy.fault is None
    file.write_bytes(whole)
    await shop.until(lambda: shop.policy.current)
    assert shop.policy.damage is None
    following.cancel()


async def test_weights_of_another_model_end_the_replica(shop: Shop) -> None:
    publish_snapshot(shop.store, weights(1).model_copy(update={"model": "0" * 64}))
    with pytest.raises(IntegrityError, match="are of a model with fingerprint 000"):
        await shop.policy.follow()


async def test_a_lost_lease_drops_the_result(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.gate.clear()
    await shop.put(policy_version=version(1))
    async with shop.working():
        await shop.until(lambda: shop.engine.running == 3)
        await shop.queue.purge(shop.streams.prompts)
        shop.engine.gate.set()
        await shop.until(lambda: shop.engine.running == 0)
        await asyncio.sleep(0.1)
        assert await shop.queue.depth(shop.streams.rollouts) == 0
        await shop.put(policy_version=version(1))
        await shop.result()


async def test_a_restarted_replica_takes_up_what_it_held_without_waiting_for_its_lease(shop: Shop) -> None:
    shop.publish(1)
    await shop.put(policy_version=version(1), task="held")
    assert await shop.queue.claim(shop.streams.prompts, "replica-0", wait_s=0) is not None
    await shop.put(policy_version=version(1), task="later")
    async with shop.working():
        assert {(await shop.result()).group_id, (await shop.result()).group_id} == {"held", "later"}


async def test_a_prompt_that_replicas_died_of_in_whatever_company_is_given_up_late(shop: Shop) -> None:
    shop.publish(1)
    await shop.put(policy_version=version(1))
    await shop.queue.claim(shop.streams.prompts, "replica-0", wait_s=0)
    for _ in range(MAX_DEATHS - 1):
        await shop.queue.resume(shop.streams.prompts, "replica-0")
    async with shop.working():
        await shop.until_empty()
    (letter,) = await shop.queue.dead(shop.streams.run)
    assert (letter.reason, letter.attempt) == ("replica died", MAX_DEATHS + 1)
    assert "20 attempts to make its group ended without a word, 0 of them with no other group" in letter.detail
    assert shop.engine.requests == []


async def test_a_poison_is_found_after_five_deaths_and_what_was_in_hand_beside_it_is_innocent(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.gate.clear()
    await shop.put(policy_version=version(1), task="poison")
    await shop.put(policy_version=version(1), task="healthy")
    for _ in range(SUSPECT_DEATHS):
        async with shop.dying():
            await shop.engine.until_running(6)
    for _ in range(MAX_LONE_DEATHS):
        async with shop.dying():
            await shop.engine.until_running(3)
            await asyncio.sleep(0.2)
            assert shop.engine.running == 3, "nothing else is in hand"
    shop.engine.gate.set()
    async with shop.working():
        assert (await shop.result()).group_id == "healthy"
        await shop.until_empty()
    (letter,) = await shop.queue.dead(shop.streams.run)
    assert (letter.key, letter.reason, letter.attempt) == ("key-1", "replica died", 6)
    assert "5 attempts to make its group ended without a word, 3 of them with no other group" in letter.detail


async def test_a_suspicious_prompt_waits_until_nothing_else_is_in_hand_and_keeps_its_lease(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.gate.clear()
    await shop.put(policy_version=version(1), task="first")
    async with shop.working():
        await shop.engine.until_running(3)
        await shop.put(policy_version=version(1), task="suspicious")
        await shop.make_suspicious()
        await shop.until_held_by("replica-0", 2)
        await shop.put(policy_version=version(1), task="last")
        await asyncio.sleep(0.2)
        assert len(shop.engine.requests) == 3
        shop.engine.gate.set()
        groups = [await shop.result() for _ in range(3)]
    assert [group.group_id for group in groups] == ["first", "suspicious", "last"]


async def test_a_death_before_the_making_began_is_no_lone_one(shop: Shop) -> None:
    """Waiting for weights no replica dies of the prompt."""
    await shop.put(policy_version=version(1))
    await shop.make_suspicious()
    async with shop.dying():
        await shop.until_held_by("replica-0", 1)
        await asyncio.sleep(0.2)
    (claim,) = await shop.queue.resume(shop.streams.prompts, "replica-0")
    assert (claim.deaths, claim.lone_deaths) == (SUSPECT_DEATHS + 1, 0)


async def test_lone_attempts_that_end_with_an_error_are_no_lone_deaths(shop: Shop) -> None:
    """Two lone deaths and two errors: four lone attempts, of which only the deaths count."""
    shop.publish(1)
    await shop.put(policy_version=version(1))
    await shop.make_suspicious()
    shop.engine.gate.clear()
    for _ in range(MAX_LONE_DEATHS - 1):
        async with shop.dying():
            await shop.engine.until_running(3)
    shop.engine.gate.set()
    shop.engine.failures = [NotReadyError(f"dropped {i}") for i in range(6)]
    async with shop.working():
        await shop.result()
    assert shop.engine.failures == []


async def test_what_is_not_finished_when_the_worker_is_ended_is_handed_back(shop: Shop) -> None:
    """Two groups are in the engine, a third was held by this name before and waits for a place."""
    shop.publish(1)
    shop.engine.gate.clear()
    for _ in range(3):
        await shop.put(policy_version=version(1))
        await shop.queue.claim(shop.streams.prompts, "replica-0", wait_s=0)
    work = asyncio.create_task(shop.worker.run(asyncio.Event()))
    await shop.engine.until_running(6)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    claims = [await shop.queue.claim(shop.streams.prompts, "another", wait_s=0) for _ in range(3)]
    # The first attempts died with the replica's predecessor; the second ones were handed back.
    assert [(c.attempt, c.handed_back, c.deaths, c.errors) for c in claims if c is not None] == [(3, 1, 1, 0)] * 3


async def test_the_log_follows_a_group_that_is_tried_again_then_made_and_one_that_is_given_up(shop: Shop) -> None:
    shop.publish(1)
    shop.engine.failures = [NotReadyError("hiccup")]
    with logged() as lines:
        async with shop.working():
            await shop.put(task="again", policy_version=version(1))
            await shop.result()
            gone = (Source(name="visible", blob="0" * 64, media_type="image/png"),)
            await shop.put(task="never", policy_version=version(1), sources=gone)
            await shop.until_empty()
    again, never = (re.sub(r"mars:\S+ entry \S+, ", "", "\n".join(lines.of(group))).splitlines() for group in ("again", "never"))
    pulled = "serving version 1.1: snapshot 1.1 (108 B)"
    retried = "attempt 1, error 1: NotReadyError: hiccup"
    assert again == ["took the prompt up", pulled, retried, "took the prompt up", "made the group"]
    assert never[0] == "took the prompt up" and never[1].startswith("attempt 1, given up: BlobMissingError: prompt sample-1")
    (made,) = (entry for entry in lines.entries if entry["message"] == "made the group")
    assert (made["version"], made["tokens"]) == ("1.1", 8)  # 4 multi-source and 2 * 2 mono-source completions of one token
