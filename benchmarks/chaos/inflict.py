"""Faults of every kind, each a function that does it to a run.

It returns None when its victim cannot suffer it at this moment (not ready, or it died too often of
late: the supervisor gives a service up after 20 deaths in 300 s or three before it is ready), else
what it hit and whether that took effect.

Fault points are armed for the whole stack from the start and held back by the marker files that say
"has struck"; to inflict one is to take its marker away, so it strikes when the point is next passed.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.plan import FAULT_POINT, FULL_DISK, Fault
from chaos.run import LEASE_S, Run
from mars_shared.stack import TRAINER
from mars_shared.weights import WeightsStore
from mars_shared.weights.route import plan_route

STRIKE_S = 180.0
"""Within this time an armed point must be passed, and a damage be found."""
SETTLE_S = 4.0
FREEZE_S = 2 * LEASE_S


@dataclass(frozen=True)
class Blow:
    """What a fault hit, and whether it took effect."""

    target: str
    effective: bool


def inflict(run: Run, fault: Fault) -> Blow | None:
    """Do it; None if that is not possible at this moment."""
    return _KINDS[fault.kind](run, fault)


def hold_back(folder: Path, points: list[str]) -> None:
    """Before a run starts: nothing strikes until it is let loose."""
    (folder / "faults").mkdir(parents=True)
    for point in points:
        (folder / "faults" / point).touch()


def _one_of(run: Run, fault: Fault) -> str | None:
    """A replica that holds prompts, so that something is there to be lost."""
    able = [name for name in run.replicas if run.can_suffer(name) and run.has_work(name)]
    return able[int(fault.pick * len(able))] if able else None


def _kill(run: Run, name: str | None, number: int = signal.SIGKILL) -> Blow | None:
    if name is None or not run.can_suffer(name):
        return None
    pid = run.kill(name, number)
    return Blow(f"{name} ({pid})", run.wait_gone(name, pid))


def _kill_replica(run: Run, fault: Fault) -> Blow | None:
    return _kill(run, _one_of(run, fault))


def _stop_replica(run: Run, fault: Fault) -> Blow | None:
    return _kill(run, _one_of(run, fault), signal.SIGTERM)


def _kill_engine(run: Run, fault: Fault) -> Blow | None:
    name = _one_of(run, fault)
    pid = run.pid(name) if name else None
    if name is None or pid is None:
        return None
    engine = next((child for child in psutil.Process(pid).children(recursive=True) if "EngineCore" in child.name()), None)
    if engine is None:
        return Blow(f"{name} ({pid}), which has no engine process", False)
    engine.kill()
    return Blow(f"{name}'s engine ({engine.pid})", run.wait_gone(name, pid))


def _kill_reward(run: Run, fault: Fault) -> Blow | None:
    return _kill(run, "reward")


def _kill_trainer(run: Run, fault: Fault) -> Blow | None:
    return _kill(run, TRAINER)


def _restart_redis(run: Run, fault: Fault) -> Blow | None:
    return _kill(run, "valkey")


def _flush_redis(run: Run, fault: Fault) -> Blow | None:
    if not run.can_suffer("valkey"):
        return None
    keys = int(run.redis.dbsize())
    run.redis.flushall()
    return Blow(f"valkey, {keys} keys", keys > 0)


def _lose_redis_file(run: Run, fault: Fault) -> Blow | None:
    blow = _kill(run, "valkey")
    if blow is None:
        return None
    files = run.folder / "valkey" / "appendonlydir"
    there = files.is_dir()
    shutil.rmtree(files, ignore_errors=True)
    return Blow(blow.target, blow.effective and there)


def _freeze(run: Run, name: str, *, with_work: bool) -> Blow | None:
    pid = run.stack.supervisor.pids()[name]
    os.killpg(pid, signal.SIGSTOP)
    try:
        if with_work and not run.has_work(name):
            return None
        thaw_at = time.monotonic() + FREEZE_S
        run.wait_for(lambda: time.monotonic() > thaw_at, 2 * FREEZE_S)
        frozen = run.pid(name) == pid and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    finally:
        if run.pid(name) == pid:
            os.killpg(pid, signal.SIGCONT)
    return Blow(f"{name} ({pid}) for {FREEZE_S:g} s", frozen)


def _freeze_replica(run: Run, fault: Fault) -> Blow | None:
    """Another one lives, which takes over what the frozen one holds."""
    name = _one_of(run, fault)
    if name is None or sum(map(run.can_suffer, run.replicas)) < 2:
        return None
    return _freeze(run, name, with_work=True)


def _freeze_reward(run: Run, fault: Fault) -> Blow | None:
    return _freeze(run, "reward", with_work=False) if run.can_suffer("reward") else None


def _strike(run: Run, fault: Fault) -> Blow | None:
    assert fault.point is not None
    service = {TRAINER: TRAINER, "reward": "reward"}.get(fault.point.partition(".")[0])
    if not (run.can_suffer(service) if service else any(map(run.can_suffer, run.replicas))):
        return None
    marker = run.folder / "faults" / fault.point
    marker.unlink()
    struck = run.wait_for(marker.exists, STRIKE_S)
    return Blow(fault.point, struck)


def _corrupt_snapshot(run: Run, fault: Fault) -> Blow | None:
    """What newcomers read last on their way to the announced version. All replicas are killed, so that the version stays the announced one until newcomers read it."""
    if not all(map(run.can_suffer, (TRAINER, *run.replicas))):
        return None
    for name in run.replicas:
        run.wait_gone(name, run.kill(name))
    settled = run.progress, time.monotonic()

    def quiet() -> bool:
        nonlocal settled
        if run.progress != settled[0]:
            settled = run.progress, time.monotonic()
        return time.monotonic() - settled[1] > SETTLE_S

    run.wait_for(quiet, 10 * SETTLE_S)
    store, mended = WeightsStore(run.folder / "weights"), len(run.events("snapshot_mended"))
    head = store.head()
    assert head is not None
    read_last = plan_route(store.manifests(), None, head.weights_id).hops[-1].manifest
    assert read_last is not None
    flip_byte(store.folder(read_last) / read_last.files[0].name, fault.pick)
    run.wait_for(lambda: len(run.events("snapshot_mended")) > mended or store.head() != head, STRIKE_S)
    if len(run.events("snapshot_mended")) > mended:
        return Blow(read_last.folder_name, True)
    # Another version was announced before a replica read this one: to be tried again.
    return None if store.head() != head else Blow(read_last.folder_name, False)


def _tear_checkpoint(run: Run, fault: Fault) -> Blow | None:
    """The trainer is frozen first, so that no checkpoint comes or goes meanwhile."""
    if not run.can_suffer(TRAINER):
        return None
    os.kill(run.stack.supervisor.pids()[TRAINER], signal.SIGSTOP)
    root = run.folder / "checkpoints"
    steps = sorted(int(path.name[5:]) for path in root.glob("step_*"))
    if len(steps) < 2:
        os.kill(run.stack.supervisor.pids()[TRAINER], signal.SIGCONT)
        return None
    newest, refused = root / f"step_{steps[-1]}", set(root.glob("refused-*"))
    files = sorted(path for path in newest.iterdir())
    file = files[int(fault.pick * len(files))]
    damage, how = (flip_byte, "a byte of it flipped") if fault.pick * 97 % 1 < 0.5 else (cut_short, "cut short")
    damage(file, fault.pick)
    pid = run.kill(TRAINER)
    run.wait_gone(TRAINER, pid)
    found = run.wait_for(lambda: set(root.glob("refused-*")) > refused, STRIKE_S)
    return Blow(f"{newest.name}/{file.name} {how}, trainer ({pid})", found)


def flip_byte(path: Path, where: float) -> None:
    """Change one byte at a place in [0, 1) of a file."""
    with path.open("r+b") as file:
        place = int(where * path.stat().st_size)
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 0x40]))


def cut_short(path: Path, where: float) -> None:
    """Keep what comes before a place in [0, 1) of a file."""
    os.truncate(path, int(where * path.stat().st_size))


_KINDS: dict[str, Callable[[Run, Fault], Blow | None]] = {
    "kill replica": _kill_replica,
    "kill engine": _kill_engine,
    "stop replica": _stop_replica,
    "freeze replica": _freeze_replica,
    "kill reward": _kill_reward,
    "freeze reward": _freeze_reward,
    "kill trainer": _kill_trainer,
    "restart Redis": _restart_redis,
    "flush Redis": _flush_redis,
    "lose Redis's file": _lose_redis_file,
    "corrupt snapshot": _corrupt_snapshot,
    "torn checkpoint": _tear_checkpoint,
    FULL_DISK: _strike,
    FAULT_POINT: _strike,
}
