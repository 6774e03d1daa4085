"""Heartbeats of services and a look at the streams, in a real Valkey; what the trainer's monitor makes of them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from mars_shared.contracts import PolicyVersion
from mars_shared.queue import Queue, Streams
from mars_shared.registry import Heard, Heartbeat, Registry, keep_announced
from mars_shared.server import EmbeddedValkey
from mars_shared.telemetry import EventLog, read_events
from mars_trainer.monitor import Monitor, service_state, streams_of
from mars_trainer.progress import Progress


@pytest.fixture
async def registry(valkey: EmbeddedValkey, run_name: str) -> AsyncIterator[Registry]:
    found = Registry(valkey.url, run_name)
    yield found
    await found.close()


def beat(name: str = "replica-0", *, step: int | None = 3, in_hand: int = 2) -> Heartbeat:
    version = None if step is None else PolicyVersion(incarnation=1, step=step)
    return Heartbeat(service="rollout", name=name, started=5.0, in_hand=in_hand, version=version, software={"vllm": "1"})


async def test_a_service_is_heard_of_with_its_starts_until_it_leaves(registry: Registry) -> None:
    await registry.beat(beat(), begins=True)
    await registry.beat(beat(in_hand=4))
    await registry.beat(beat("replica-1"), begins=True)
    await registry.beat(beat("replica-1"), begins=True)
    _, heard = await registry.look({})
    assert [(one.beat.name, one.beat.in_hand, one.starts) for one in heard] == [("replica-0", 4, 1), ("replica-1", 2, 2)]
    assert all(0 <= one.seen_s < 60 for one in heard)
    await registry.leave("replica-0")
    _, heard = await registry.look({})
    assert [one.beat.name for one in heard] == ["replica-1"]


async def test_a_service_that_went_silent_is_forgotten_in_time(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    await registry.beat(beat())
    await asyncio.sleep(0.02)
    monkeypatch.setattr("mars_shared.registry.FORGET_S", 0.005)
    assert (await registry.look({}))[1] == []
    monkeypatch.setattr("mars_shared.registry.FORGET_S", 600)
    assert (await registry.look({}))[1] == [], "it is removed, not hidden"


async def test_streams_are_told_of_with_what_is_claimed_and_how_old_the_oldest_is(
    registry: Registry, patient_queue: Queue, run_name: str
) -> None:
    streams = Streams(run_name)
    for number in range(3):
        await patient_queue.put(streams.prompts, b"x", dedupe_key=str(number), bound=9)
    await patient_queue.claim(streams.prompts, "replica-0", wait_s=0)
    await asyncio.sleep(0.05)
    queues, _ = await registry.look(streams_of(run_name))
    assert set(queues) == {"prompts", "rollouts", "scored:train", "scored:eval", "retries", "dead"}
    assert (queues["prompts"].entries, queues["prompts"].claimed) == (3, 1)
    assert 0.05 <= queues["prompts"].oldest_s < 60
    assert (queues["rollouts"].entries, queues["rollouts"].claimed, queues["rollouts"].oldest_s) == (0, 0, 0)


async def test_heartbeats_go_on_until_the_service_ends_and_then_it_has_left(registry: Registry) -> None:
    telling = asyncio.create_task(keep_announced(registry, beat))
    while not (await registry.look({}))[1]:
        await asyncio.sleep(0.01)
    telling.cancel()
    await asyncio.wait({telling})
    assert (await registry.look({}))[1] == []


async def test_heartbeats_survive_a_redis_that_forgets(
    registry: Registry, valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch, run_name: str
) -> None:
    monkeypatch.setattr("mars_shared.registry.BEAT_S", 0.01)
    telling = asyncio.create_task(keep_announced(registry, beat))
    while not (await registry.look({}))[1]:
        await asyncio.sleep(0.01)
    await registry._redis.delete(f"mars:{run_name}:services", f"mars:{run_name}:starts")
    while not (heard := (await registry.look({}))[1]):
        await asyncio.sleep(0.01)
    assert heard[0].starts == 1
    telling.cancel()
    await asyncio.wait({telling})


def test_a_replicas_lag_is_counted_in_steps_and_never_below_zero() -> None:
    def lag(step: int | None) -> int | None:
        return service_state(Heard(beat=beat(step=step), seen_s=1.0, starts=1), 5).lag

    # The trainer is at step 5; a replica of a dead incarnation may be ahead of it.
    assert [lag(5), lag(3), lag(7), lag(None)] == [0, 2, 0, None]


async def test_the_monitor_writes_what_it_sees_and_once_more_at_the_end(
    registry: Registry, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mars_trainer.monitor.LOOK_S", 0.01)
    events = EventLog(tmp_path / "events.jsonl")
    progress = Progress(run=run_name, steps=9, version=PolicyVersion(incarnation=1, step=4), state="collecting")
    await registry.beat(beat(), begins=True)
    monitor = Monitor(registry, progress, events)
    following = asyncio.create_task(monitor.follow())
    while monitor.newest is None:
        await asyncio.sleep(0.01)
    progress.state = "finished"
    following.cancel()
    await asyncio.wait({following})
    first, last = read_events(events.path, "state")
    assert (first["state"], last["state"], first["step"], first["redis"]) == ("collecting", "finished", 4, True)
    (replica,) = first["services"]
    assert (replica["name"], replica["version"], replica["lag"], replica["starts"]) == ("replica-0", "1.3", 1, 1)
    assert first["queues"]["prompts"] == {"entries": 0, "claimed": 0, "oldest_s": 0}


async def test_a_redis_that_does_not_answer_is_said_and_nothing_else(run_name: str, tmp_path: Path) -> None:
    registry = Registry("redis://127.0.0.1:1/0", run_name)
    progress = Progress(run=run_name, steps=9, version=PolicyVersion(incarnation=1, step=4))
    state = await Monitor(registry, progress, EventLog(tmp_path / "events.jsonl"))._look()
    assert (state.redis, state.queues, state.services) == (False, {}, ())
    await registry.close()


async def test_a_look_that_fails_is_followed_by_another(
    registry: Registry, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mars_trainer.monitor.LOOK_S", 0.01)
    events = EventLog(tmp_path / "events.jsonl")
    monitor = Monitor(registry, Progress(run=run_name, steps=9, version=PolicyVersion(incarnation=1, step=4)), events)
    with monkeypatch.context() as broken:
        broken.setattr(events, "write", disk_error)
        following = asyncio.create_task(monitor.follow())
        while "Input/output error" not in caplog.text:
            await asyncio.sleep(0.01)
    while not read_events(events.path, "state"):
        await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.wait({following})


async def test_what_was_seen_long_ago_is_told_no_more(
    registry: Registry, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(run=run_name, steps=9, version=PolicyVersion(incarnation=1, step=4))
    monitor = Monitor(registry, progress, EventLog(tmp_path / "events.jsonl"))
    following = asyncio.create_task(monitor.follow())
    while monitor.newest is None:
        await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.wait({following})
    assert monitor.newest is not None
    monkeypatch.setattr("mars_trainer.monitor.OLD_S", 0.0)
    assert monitor.newest is None


async def test_a_full_redis_hears_of_the_living(run_name: str, tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as full:
        registry = Registry(full.url, run_name)
        await registry.beat(beat(in_hand=1))
        client = redis.Redis.from_url(full.url)
        client.config_set("maxmemory", 1)
        await registry.beat(beat(in_hand=2))
        client.config_set("maxmemory", 0)
        client.close()
        assert [one.beat.in_hand for one in (await registry.look({}))[1]] == [2]
        await registry.close()


def disk_error(*arguments: object, **options: object) -> None:
    raise OSError(errno.EIO, "Input/output error")
