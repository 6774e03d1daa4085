"""`mars scale` against a running stack of small real processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine, Done, command_line
from mars_shared import cli_scale
from mars_shared import supervisor as supervisor_module
from mars_shared.cli_scale import _replicas_of, _wait_settled
from mars_shared.errors import ConfigError, MarsError
from mars_shared.http import bind
from mars_shared.scale import SCALE_FILE, Replicas, ScaleRequest, check_replicas
from mars_shared.stack import Plan, Ports, Stack, find_stack, read_state
from mars_shared.supervisor import Service
from process_stage import NOTES_ITS_END, SLEEP, STUBBORN, is_alive, wait_until
from process_stage import Stage as Processes

__all__ = ["command_line"]
BROKEN = "print('out of memory'); raise SystemExit(1)"


class Run:
    """A stack whose replicas are small programs; they note their end in the file `ends`."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self.folder = folder
        self.processes = Processes(folder)
        self.supervisor = self.processes.supervisor
        self.said = self.processes.said
        self.ends = folder / "ends"
        self.ports = Ports(free_ports(4))
        self.programs: dict[int, str] = {}
        self.processes.start("reward", SLEEP)
        for index in range(replicas):
            self.supervisor.start(self._service(index))
        scaled = Replicas(
            self.supervisor, folder, host="127.0.0.1", port=self.ports.rollout, service=self._service, say=self.said.append
        )
        plan = Plan(folder / "recipe.toml", "127.0.0.1", self.ports, "linger")
        self.stack = Stack(self.supervisor, scaled, plan, run="scaled", run_dir=folder, say=self.said.append)
        self.until(lambda: self.supervisor.all_ready and all("up" in self.log(i) for i in range(replicas)))

    def _service(self, index: int) -> Service:
        name = f"rollout-{index}"
        program = self.programs.get(index, NOTES_ITS_END)
        unready = {"ready_url": "http://127.0.0.1:9/readyz"} if program == BROKEN else {}
        return Service(name, [sys.executable, "-c", program, str(self.ends), name], optional=True, **unready)

    def log(self, index: int) -> str:
        return self.processes.log(f"rollout-{index}")

    def until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, meanwhile=self.stack.poll)

    def ask(self, replicas: int) -> ScaleRequest:
        request = ScaleRequest(supervisor_pid=os.getpid(), replicas=replicas)
        request.write(self.folder)
        return request

    def settle(self, replicas: int) -> None:
        request = self.ask(replicas)
        self.until(lambda: self.state["settled_request"] == request.id)

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "stack.json").read_text())


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for base in range(20_000 + os.getpid() % 20_000, 60_000, count):
        try:
            for port in range(base, base + count):
                bind("127.0.0.1", port).close()
        except ConfigError:
            continue
        return base
    raise AssertionError("no free ports")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor_module, "GRACE_S", 600.0)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    run = Run(folder, replicas=2)
    yield run
    monkeypatch.setattr(supervisor_module, "GRACE_S", 1.0)
    run.supervisor.stop()


@pytest.fixture
def command(run: Run, command_line: CommandLine) -> Callable[..., Done]:
    """Runs `mars ARGUMENTS` beside the polling stack."""
    return partial(command_line, meanwhile=run.stack.poll)


def test_mars_scale_adds_the_missing_replicas_on_the_next_ports(run: Run, command: Callable[..., Done]) -> None:
    before = run.state["pids"]
    done = command("scale", "rollout=4", str(run.folder))
    assert done.returncode == 0, done.stderr
    assert "scaled has 4 rollout replica(s): started rollout-2, rollout-3" in done.stdout
    base = run.ports.base
    assert run.state["replicas"] == {f"rollout-{i}": base + i for i in range(4)}
    assert all(is_alive(run.state["pids"][f"rollout-{i}"]) for i in range(4))
    assert {name: run.state["pids"][name] for name in before} == before, "the others were left alone"


def test_mars_scale_ends_the_last_replicas_politely(run: Run, command: Callable[..., Done]) -> None:
    run.settle(4)
    run.until(lambda: "up" in run.log(2) and "up" in run.log(3))
    pids = run.state["pids"]
    done = command("scale", "rollout=1", str(run.folder))
    assert done.returncode == 0, done.stderr
    assert "scaled has 1 rollout replica(s): ended rollout-1, rollout-2, rollout-3" in done.stdout
    assert sorted(run.ends.read_text().split()) == ["rollout-1", "rollout-2", "rollout-3"]
    assert list(run.state["replicas"]) == ["rollout-0"] and not is_alive(pids["rollout-3"])
    assert run.state["pids"] == {"reward": pids["reward"], "rollout-0": pids["rollout-0"]}


def test_asking_for_what_there_is_changes_nothing_and_says_so(run: Run, command: Callable[..., Done]) -> None:
    pids = run.state["pids"]
    done = command("scale", "rollout=2", str(run.folder))
    assert (done.returncode, run.state["pids"]) == (0, pids)
    assert "scaled has 2 rollout replica(s): nothing to do" in done.stdout


def test_while_a_replica_ends_the_others_are_restarted_and_its_own_death_is_final(run: Run) -> None:
    run.programs[2] = STUBBORN
    run.settle(3)
    run.until(lambda: "up" in run.log(2))
    stubborn, victim = run.state["pids"]["rollout-2"], run.state["pids"]["rollout-0"]
    request = run.ask(2)
    run.until(lambda: run.state["ending"] == ["rollout-2"])
    os.kill(victim, signal.SIGKILL)
    run.until(lambda: run.state["pids"].get("rollout-0", victim) != victim)
    assert is_alive(stubborn) and run.state["settled_request"] != request.id
    os.kill(stubborn, signal.SIGKILL)
    run.until(lambda: run.state["settled_request"] == request.id)
    for _ in range(5):
        run.stack.poll()
    assert run.log(2).count("up") == 1 and list(run.state["replicas"]) == ["rollout-0", "rollout-1"]


def test_a_replica_that_is_wanted_again_while_it_ends_starts_when_it_has_ended(run: Run) -> None:
    run.programs[2] = STUBBORN
    run.settle(3)
    run.until(lambda: "up" in run.log(2))
    first = run.state["pids"]["rollout-2"]
    run.ask(2)
    run.until(lambda: run.state["ending"] == ["rollout-2"])
    request = run.ask(3)
    for _ in range(5):
        run.stack.poll()
    assert list(run.state["replicas"]) == ["rollout-0", "rollout-1"], "two of the same name would share a port and work"
    os.kill(first, signal.SIGKILL)
    run.until(lambda: run.state["settled_request"] == request.id)
    assert is_alive(run.state["pids"]["rollout-2"]) and run.state["pids"]["rollout-2"] != first


def test_a_scaled_up_replica_that_dies_is_restarted(run: Run) -> None:
    run.settle(3)
    run.until(lambda: run.said.count("rollout-2 is ready") == 1)
    first = run.state["pids"]["rollout-2"]
    os.kill(first, signal.SIGKILL)
    run.until(lambda: run.state["pids"].get("rollout-2", first) != first)
    assert any(line.startswith("rollout-2 ended with signal 9; it starts again") for line in run.said)


def test_a_scaled_up_replica_that_cannot_start_is_given_up_and_the_run_goes_on(run: Run) -> None:
    run.programs[2] = BROKEN
    run.settle(3)
    run.until(lambda: run.supervisor.given_up)
    run.stack.poll()
    assert run.log(2).count("out of memory") == 3
    assert run.state["given_up"]["rollout-2"].startswith("rollout-2 ended with exit code 1:\n  out of memory")
    assert list(run.state["replicas"]) == ["rollout-0", "rollout-1"]
    run.programs.clear()
    run.settle(3)
    assert list(run.state["replicas"]) == ["rollout-0", "rollout-1", "rollout-2"] and run.state["given_up"] == {}


def test_a_taken_port_is_said_and_the_run_goes_on(run: Run, command: Callable[..., Done]) -> None:
    port = run.ports.rollout(2)
    listener = bind("127.0.0.1", port)
    try:
        done = command("scale", "rollout=4", str(run.folder))
    finally:
        listener.close()
    assert done.returncode == 1
    assert f"rollout-2 could not be added: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "scaled has 3 rollout replica(s): started rollout-3" in done.stdout
    assert is_alive(run.state["pids"]["rollout-0"]) and is_alive(run.state["pids"]["rollout-3"])


def test_mars_status_names_the_replicas_that_are_there_with_their_pids(run: Run, command: Callable[..., Done]) -> None:
    run.settle(3)
    os.kill(run.state["pids"]["rollout-1"], signal.SIGKILL)
    run.until(lambda: "rollout-1" not in run.state["pids"])
    run.until(lambda: "rollout-1" in run.state["pids"])
    shown = command("status", str(run.folder)).stdout
    cells = {row[0]: row[1] for line in shown.splitlines() if len(row := [cell.strip() for cell in line.split("│")[1:-1]]) == 4}
    pids = run.state["pids"]
    assert cells == {"trainer": "-", **{name: str(pid) for name, pid in pids.items()}}
    assert set(pids) == {"reward", "rollout-0", "rollout-1", "rollout-2"}


def test_a_request_that_an_earlier_run_left_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ScaleRequest(supervisor_pid=os.getpid(), replicas=4).write(folder)
    run = Run(folder, replicas=1)
    try:
        assert not (folder / SCALE_FILE).exists()
        ScaleRequest(supervisor_pid=os.getpid() + 1, replicas=4).write(folder)
        for _ in range(5):
            run.stack.poll()
        assert list(run.state["replicas"]) == ["rollout-0"]
    finally:
        monkeypatch.setattr(supervisor_module, "GRACE_S", 1.0)
        run.supervisor.stop()


def test_a_damaged_request_is_said_once_and_ends_nothing(run: Run) -> None:
    (run.folder / SCALE_FILE).write_text('{"replicas": 0}')
    for _ in range(5):
        run.stack.poll()
    assert len([line for line in run.said if "not a request to scale" in line]) == 1
    assert list(run.state["replicas"]) == ["rollout-0", "rollout-1"]


@pytest.mark.parametrize("wrong", ["rollout", "rollout=", "rollout=two", "rollout=-1", "rollout=1.5", "reward=2", "3"])
def test_what_is_no_number_of_replicas_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="expected rollout=N"):
        _replicas_of(wrong)


@pytest.mark.parametrize("wrong", [0, 101])
def test_so_many_replicas_that_there_is_none_or_a_port_collides_are_refused(wrong: int) -> None:
    # replica 99 listens on base + 99, the reward service on base + 100
    with pytest.raises(ConfigError, match=f"{wrong} rollout replicas were asked for; expected 1 to 100"):
        _replicas_of(f"rollout={wrong}")
    check_replicas(100)


def test_where_nothing_runs_there_is_nothing_to_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    monkeypatch.chdir(tmp_path)
    named, unnamed = command_line("scale", "rollout=2", str(tmp_path)), command_line("scale", "rollout=2")
    assert (named.returncode, unnamed.returncode) == (2, 2)
    assert f"no stack runs in {tmp_path}" in named.stderr and "no stack runs in runs/*" in unnamed.stderr
    assert list(tmp_path.iterdir()) == []


def test_of_several_stacks_one_must_be_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run.stack.write_state()
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/a/stack.json").write_text((run.folder / "stack.json").read_text())
    assert find_stack(None) == (Path("runs/a"), read_state(run.folder))
    (tmp_path / "runs/b/stack.json").write_text((run.folder / "stack.json").read_text())
    with pytest.raises(ConfigError, match="several stacks run .runs/a, runs/b.; say which"):
        find_stack(None)


def test_a_stack_that_does_not_answer_is_not_waited_for_forever(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_scale, "WAIT_S", 0.2)
    with pytest.raises(MarsError, match=f"process {os.getpid()}, which runs .*, has not made it 3 replica"):
        _wait_settled(run.folder, run.ask(3))
    foreign = ScaleRequest(supervisor_pid=os.getpid() + 1, replicas=3)
    with pytest.raises(ConfigError, match=r"ended before it had 3 replica"):
        _wait_settled(run.folder, foreign)


def test_a_state_that_cannot_be_written_ends_nothing_and_is_written_later(run: Run) -> None:
    path = run.folder / "stack.json"
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    run.processes.start("another", SLEEP)
    for _ in range(5):
        run.stack.poll()
    assert len([line for line in run.said if "stack.json cannot be written" in line]) == 1
    assert [file.name for file in run.folder.glob(".*")] == [], "no half-written file is left"
    (path / "in the way").rmdir()
    path.rmdir()
    run.stack.poll()
    assert "another" in run.state["pids"]
