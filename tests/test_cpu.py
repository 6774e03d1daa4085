"""CPU time of process sessions, with real processes that burn a known amount of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO

import pytest

from mars_shared.cpu import WorkMeter, cpu_seconds

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"
SAY_AND_WAIT = "print('burnt', flush=True)\ninput()\n"
Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program in a session of its own and returns when it says that it has burnt its CPU time."""
    running: list[subprocess.Popen[str]] = []

    def run(program: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        running.append(process)
        assert line_of(process.stdout) == "burnt"
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def seconds_of(pid: int) -> float:
    return cpu_seconds([pid])[pid]


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


def test_a_session_that_ended_has_used_nothing_more() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    ended.wait()
    assert cpu_seconds([ended.pid]) == {ended.pid: 0}


def test_a_session_has_used_what_its_process_burnt(start: Start) -> None:
    worker = start(BURN.format(seconds=0.3) + SAY_AND_WAIT)
    used = seconds_of(worker.pid)
    # The kernel counts in ticks of 10 ms; the program itself ends within a tick or two of 0.3.
    assert 0.25 <= used <= 2
    assert seconds_of(worker.pid) >= used


def test_only_the_named_sessions_count(start: Start) -> None:
    busy, idle = start(BURN.format(seconds=0.3) + SAY_AND_WAIT), start(SAY_AND_WAIT)
    assert seconds_of(idle.pid) < 0.25 <= seconds_of(busy.pid)
    assert cpu_seconds([busy.pid, idle.pid]).keys() == {busy.pid, idle.pid}
    assert cpu_seconds([]) == {}
    assert os.getsid(0) not in (busy.pid, idle.pid)


@pytest.mark.parametrize("reaped", [True, False])
def test_children_of_the_session_count_whether_they_live_or_were_reaped(start: Start, reaped: bool) -> None:
    child = BURN.format(seconds=0.3) + ("" if reaped else SAY_AND_WAIT)
    program = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=sys.stdin)\n"
    program += ("child.wait()\n" + SAY_AND_WAIT) if reaped else "child.wait()\n"
    assert 0.25 <= seconds_of(start(program).pid) <= 2


def test_a_command_with_spaces_and_parentheses_in_its_name_is_counted(start: Start) -> None:
    rename = "import ctypes\nctypes.CDLL(None).prctl(15, b'a) R 1 (b', 0, 0, 0)\n"
    assert seconds_of(start(rename + BURN.format(seconds=0.3) + SAY_AND_WAIT).pid) >= 0.25


def test_efficiency_is_the_share_of_all_cores_between_the_first_evaluation_and_the_last_step(start: Start) -> None:
    worker = start(SAY_AND_WAIT + BURN.format(seconds=0.4) + SAY_AND_WAIT)
    meter = WorkMeter()
    meter.see({"event": "step", "time": 50.0}, [worker.pid])
    assert meter.result is None
    meter.see({"event": "evaluation", "time": 100.0}, [worker.pid])
    assert meter.result is None
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    assert line_of(worker.stdout) == "burnt"
    meter.see({"event": "step", "time": 110.0}, [worker.pid])
    meter.see({"event": "evaluation", "time": 200.0}, [worker.pid])
    assert meter.result is not None
    cores = len(os.sched_getaffinity(0))
    assert meter.result["wall_s"] == 10 and meter.result["cores"] == cores
    assert 0.2 <= meter.result["cpu_s"] <= 2
    assert meter.result["efficiency"] == pytest.approx(meter.result["cpu_s"] / (10 * cores))


def test_a_service_that_died_does_not_take_back_the_work_it_did(start: Start) -> None:
    first, second = start(BURN.format(seconds=0.4) + SAY_AND_WAIT), start(SAY_AND_WAIT)
    meter = WorkMeter()
    meter.see({"event": "evaluation", "time": 100.0}, [second.pid])
    meter.see({"event": "step", "time": 110.0}, [first.pid, second.pid])
    assert meter.result is not None
    before = meter.result["cpu_s"]
    assert before >= 0.35
    first.kill()
    first.wait()
    meter.see({"event": "step", "time": 120.0}, [second.pid])
    assert meter.result["cpu_s"] >= before
