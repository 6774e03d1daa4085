"""Rare moments at which something was lost, done twice or waited for in vain."""

from __future__ import annotations

import asyncio
import errno
import resource
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from redis import Redis
from torch import nn

from builders import make_group, make_prompt
from loop_doubles import Pupil, Replies, Shelf, make_run
from mars_shared import faults
from mars_shared.contracts import PolicyVersion, Prompt, Purpose, WeightIdentity
from mars_shared.errors import InputError, QueueUnavailableError
from mars_shared.queue import Claim, PutResult, Queue, Streams
from mars_shared.server import EmbeddedValkey
from mars_shared.telemetry import LineLog
from mars_shared.weights import WeightsStore
from mars_trainer import checkpoint as checkpoint_module
from mars_trainer import publish as publish_module
from mars_trainer.checkpoint import CheckpointStore
from mars_trainer.collector import is_of_lineage
from mars_trainer.exchange import Exchange, Retry, trainer_queue
from mars_trainer.publish import Publisher
from mars_trainer.tensors import save_tensors
from rollout_doubles import ScriptedEngine
from rollout_fixtures import policy_at
from rollout_fixtures import publish as publish_weights
from test_checkpoint import checkpoint
from test_staleness import BATCH, STEPS, Fleet, make_async_run, train, working
from test_weights_store import publish, snapshots


@pytest.fixture
async def queue(valkey: EmbeddedValkey) -> AsyncIterator[Queue]:
    queue = trainer_queue(valkey.url)
    yield queue
    await queue.close()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mars_trainer.exchange.RECONCILE_S", 0.2)
    monkeypatch.setattr("mars_trainer.exchange.LOOK_FOR_DEAD_S", 0.1)
    monkeypatch.setattr("mars_trainer.exchange.RECONNECT_S", 0.1)
    monkeypatch.setattr("mars_trainer.disk.DISK_PAUSE_S", 0.01)


class HeedfulFleet(Fleet):
    """Drops prompts of incarnations that ended, as replicas do."""

    async def replica(self, name: str, seconds_per_token: float) -> None:
        while True:
            claim = await self.queue.claim(self.streams.prompts, name, wait_s=0.05)
            if claim is None:
                continue
            prompt = Prompt.model_validate_json(claim.payload)
            assert prompt.policy_version is not None
            if prompt.policy_version.incarnation < self.shelf.versions[-1].incarnation:
                await self.queue.complete(claim)
            else:
                payload = self._group(prompt).model_dump_json().encode()
                await self.queue.complete(claim, forward=self.streams.rollouts, payload=payload)


async def test_groups_taken_over_from_a_dead_incarnation_and_lost_then_are_asked_of_the_living_one(
    queue: Queue, patient_queue: Queue, run_name: str, tmp_path: Path, fast: None
) -> None:
    shelf, pupil = Shelf(), Pupil()
    run = make_async_run(tmp_path, queue, run_name, pupil, shelf, max_staleness=2)
    fleet = HeedfulFleet(patient_queue, shelf, Streams(run_name))
    async with working(fleet):
        await train(run, to=3)
        ledger = shelf.checkpoints[-1].ledger
        while await queue.depth(Streams(run_name).scored(Purpose.TRAIN)) < 2 * BATCH:
            await asyncio.sleep(0.01)
    pupil.steps = pupil.steps[:3]
    again = make_async_run(tmp_path, queue, run_name, pupil, shelf, checkpoint=ledger, max_staleness=2)
    await again._begin()
    for stream in (Streams(run_name).prompts, Streams(run_name).rollouts, Streams(run_name).scored(Purpose.TRAIN)):
        await queue.purge(stream)
    async with working(fleet), asyncio.timeout(20):
        while again.version.step < STEPS:
            await again._step()
    assert [index for step in pupil.steps for index in step] == list(range(STEPS * BATCH))


def test_a_group_without_version_spans_can_be_taken_over() -> None:
    version = PolicyVersion(incarnation=1, step=2)
    group = make_group(make_prompt(1, version=version))
    assert is_of_lineage(group, version)
    assert not is_of_lineage(group, PolicyVersion(incarnation=1, step=1))
    assert not is_of_lineage(group, None)


async def test_a_snapshot_that_is_damaged_before_the_self_test_is_written_again(tmp_path: Path) -> None:
    exchange = SimpleNamespace()

    async def probe(version: PolicyVersion) -> None:
        await exchange.aside()  # as a real exchange does while it waits

    self_test, shelf = SimpleNamespace(exchange=exchange, run=probe), Shelf()
    shelf.needs_snapshot = lambda: True  # type: ignore[method-assign]
    run = replace(make_run(tmp_path, Replies(range(99)), Pupil(), shelf), self_test=cast(Any, self_test))
    await run.self_test.run(run.version)  # type: ignore[union-attr]
    assert shelf.mended


async def test_a_prompt_whose_group_is_cut_off_during_a_weight_change_is_not_held_for_ever(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine, store = ScriptedEngine(), WeightsStore(tmp_path / "weights")

    def announce(step: int) -> None:
        publish_weights(store, {"weight": torch.full((2,), float(step))}, PolicyVersion(incarnation=1, step=step), tmp_path)

    announce(0)
    policy = policy_at(engine, store, tmp_path, tmp_path / "scratch", in_flight="continue")
    prompt = make_prompt(1).model_copy(update={"max_staleness": 1})
    made, changing, change = asyncio.Event(), asyncio.Event(), asyncio.Event()
    update = engine.update

    async def slow_update(weights: WeightIdentity, files: Sequence[Path]) -> dict[str, float]:
        if weights.version.step == 1:
            changing.set()
            await change.wait()
        return await update(weights, files)

    engine.update = slow_update  # type: ignore[method-assign]

    async def make() -> None:
        async with policy.hold(prompt):
            await made.wait()

    making = asyncio.create_task(make())
    while not policy._held:
        await asyncio.sleep(0.01)
    announce(1)
    following = asyncio.create_task(policy.follow())
    await changing.wait()
    made.set()
    await asyncio.sleep(0.01)
    making.cancel()  # its lease is lost
    await asyncio.wait({making})
    change.set()
    announce(2)
    async with asyncio.timeout(10):
        while engine.version.step < 2:
            await asyncio.sleep(0.01)
    following.cancel()


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after_half(tensors: object, path: Path, **_: Any) -> None:
    path.write_bytes(b"half a file")
    disk_full()


def test_a_snapshot_that_did_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    recipe = SimpleNamespace(
        model=SimpleNamespace(path=tmp_path, dtype="float32"),
        run=SimpleNamespace(name="r"),
        weights=SimpleNamespace(keep_snapshots=2, snapshot_every=10, url=None),
    )
    publisher = Publisher(cast(Any, recipe), WeightsStore(tmp_path / "weights"))
    monkeypatch.setattr(publish_module, "write_tensors", lambda path, tensors: full_after_half(tensors, path))
    with pytest.raises(OSError, match="No space"):
        publisher.publish(nn.Linear(1, 1), PolicyVersion(incarnation=1, step=0))
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_checkpoint_that_did_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    monkeypatch.setattr(checkpoint_module, "save_tensors", full_after_half)
    with pytest.raises(OSError, match="No space"):
        store.save(checkpoint(1))
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("point", ["trainer.before_checkpoint", "trainer.before_commit"])
async def test_a_disk_that_is_full_at_a_checkpoint_makes_the_run_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None, point: str
) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"{point}:full")
    run = make_run(tmp_path, Replies(range(99)), Pupil(), Shelf())
    run.checkpoints = CheckpointStore(tmp_path / "checkpoints", keep=2)
    faults.arm(tmp_path)
    try:
        await run._step()
    finally:
        monkeypatch.delenv(faults.VARIABLE)
        faults.arm(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def letter_of(index: int, entry: str) -> Retry:
    return Retry(Claim("mars:test:retries", entry, "trainer", 1, b""), make_prompt(index))


async def test_a_retry_that_a_checkpoint_knows_of_is_not_trained_on_again_after_a_restart(tmp_path: Path) -> None:
    shelf, pupil = Shelf(), Pupil()
    replies = Replies(range(99), deadly={1})
    run = make_run(tmp_path, replies, pupil, shelf, steps=3)
    await run._step()
    assert pupil.steps == [[0, 2, 3]]
    replies.retries.append(letter_of(1, "700"))
    await run._step()
    assert 4 in pupil.steps[1], "prompt 1, as dispatch index 4"
    # Killed between the checkpoint and the acknowledgement of the entry 700, so that it is there again.
    second = Replies(range(99))
    second.retries.append(letter_of(1, "700"))
    taught: list[str] = []
    again = make_run(tmp_path, second, pupil, shelf, checkpoint=shelf.checkpoints[-1].ledger, steps=3)
    again.learner.step = lambda scored, credits: taught.extend(s.group.prompt.prompt_id for s in scored) or {}  # type: ignore
    await again._step()
    assert "sample-1" not in taught
    assert second.acknowledged.count(700) == 1, "the entry goes with the next checkpoint"


async def test_a_retry_of_a_prompt_that_is_still_asked_for_is_no_second_group(tmp_path: Path) -> None:
    """Its letter was moved before the trainer had seen it, so that the prompt itself is asked again."""
    replies = Replies(range(99))
    run = make_run(tmp_path, replies, Pupil(), Shelf())
    taught: list[str] = []
    run.learner.step = lambda scored, credits: taught.extend(s.group.prompt.prompt_id for s in scored) or {}  # type: ignore
    replies.retries.append(letter_of(1, "700"))
    await run._step()
    assert "sample-1" not in taught


async def test_an_unusable_sample_is_reported_even_when_redis_is_at_its_memory_limit(tmp_path: Path, run_name: str) -> None:
    with EmbeddedValkey(tmp_path / "valkey") as small:
        queue = Queue(small.url)
        await queue.ping()
        with Redis.from_url(small.url, protocol=2) as client:
            client.config_set("maxmemory", int(client.info("memory")["used_memory"]) // 2)
        assert await queue.put(Streams(run_name).prompts, b"x", dedupe_key="k", bound=9) is PutResult.FULL
        exchange = Exchange(queue, run_name, Purpose.TRAIN, incarnation=1, bound=9)
        async with asyncio.timeout(10):
            await exchange.report_dead(3, InputError("torn"))
        (letter,) = await queue.dead(run_name)
        assert (letter.reason, letter.detail) == ("InputError", "torn")
        await queue.close()


async def test_a_start_that_redis_cut_off_begins_anew(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, prompt = Streams(run_name), make_prompt(1, run=run_name)
    await patient_queue.put(streams.rollouts, make_group(prompt).model_dump_json().encode(), dedupe_key="1/x/0", bound=9)
    exchange = Exchange(queue, run_name, Purpose.TRAIN, incarnation=2, bound=9)
    entries, calls = queue.entries, 0

    async def cut_off_once(stream: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            await queue.purge(streams.rollouts)  # flushed, and the connection broke
            raise QueueUnavailableError("gone")
        return await entries(stream)

    monkeypatch.setattr(queue, "entries", cut_off_once)
    assert await exchange.start([prompt]) == [prompt]


async def test_when_redis_is_full_a_lost_prompt_makes_room_too(
    queue: Queue, patient_queue: Queue, run_name: str, fast: None
) -> None:
    exchange, (prompt,) = Exchange(queue, run_name, Purpose.TRAIN, incarnation=1, bound=2), [make_prompt(1, run=run_name)]
    asked_for_room = asyncio.Event()

    async def make_room() -> None:
        asked_for_room.set()

    exchange.relieve = make_room
    exchange.ask([prompt])
    await exchange.receive()
    claim = await patient_queue.claim(exchange.streams.prompts, "replica", wait_s=0)
    assert claim is not None
    await patient_queue.complete(claim)
    for key in "ab":
        await patient_queue.put(exchange.streams.prompts, b"", dedupe_key=key, bound=9)
    async with asyncio.timeout(5):
        while not asked_for_room.is_set():
            await exchange.receive()


async def test_what_the_trainer_holds_is_not_sent_to_it_again_and_again(queue: Queue, run_name: str) -> None:
    stream = Streams(run_name).scored(Purpose.TRAIN)
    for key in "ab":
        await queue.put(stream, key.encode(), dedupe_key=key, bound=9)
    first = await queue.claim(stream, "trainer", wait_s=0)
    await queue.claim(stream, "trainer", wait_s=0)
    assert first is not None
    (other,) = await queue.resume(stream, "trainer", besides=[first.entry_id])
    assert other.payload == b"b" and other.attempt == 2
    await queue.heartbeat(first)


def test_a_snapshot_whose_removal_was_cut_off_is_removed_later(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path / "weights")
    (store.folder(publish(store, 0)) / "manifest.json").unlink()
    for step in (1, 2):
        publish(store, step)
    store.prune(keep_snapshots=2)
    assert snapshots(tmp_path) == ["1.1", "1.2"]


async def test_an_event_log_on_a_full_disk_does_not_end_the_run(tmp_path: Path, fast: None) -> None:
    run = make_run(tmp_path, Replies(range(99)), Pupil(), Shelf())
    (tmp_path / "full").symlink_to("/dev/full")
    run.events = type(run.events)(tmp_path / "full")
    await run._step()
    assert run.version.step == 1


def test_what_an_event_log_could_not_write_is_written_when_there_is_room(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "log")
    full = open("/dev/full", "wb", buffering=0)
    file, log._file = log._file, full
    log.append("first")
    log._file = file
    log.append("second")
    assert (tmp_path / "log").read_text() == "first\nsecond\n"
    full.close()


def test_tensors_that_do_not_fit_are_an_error_of_the_operating_system(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_tensors({"weight": torch.zeros(1000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


async def test_places_that_a_step_gives_free_are_asked_for_though_the_next_step_has_all_it_needs(tmp_path: Path) -> None:
    replies = Replies(range(99))
    run = make_run(tmp_path, replies, Pupil(), Shelf(), max_staleness=2, steps=9)
    for _ in range(3):
        await run._step()
    assert replies.asked == [list(range(9)), [9, 10, 11], [12, 13, 14]]
