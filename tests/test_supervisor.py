"""The supervisor with real processes: restarts, refusals with the log's end, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mars_shared import supervisor as supervisor_module
from mars_shared.errors import ConfigError
from mars_shared.processes import kill_group, spawn, stop_all
from mars_shared.stack import Ports, StackState, read_state
from mars_shared.supervisor import Service, ServiceFailedError, Supervisor

PATIENT_S = 20.0
SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
WITH_CHILD = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); print('child', c.pid, flush=True); c.wait()"
HTTP_READY = textwrap.dedent("""
    import http.server, pathlib, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if pathlib.Path(sys.argv[1]).exists() else 503); self.end_headers()
        def log_message(self, *_): pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print("port", server.server_port, flush=True)
    server.serve_forever()
""")


class Stage:
    """A supervisor, what it said, and how to wait for what it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.supervisor = Supervisor(
            log_dir=folder / "logs", environment=dict(os.environ) | {"STAGE": "test"}, say=self.said.append
        )

    def start(self, name: str, program: str, *arguments: str, **options: object) -> None:
        self.supervisor.start(Service(name, [sys.executable, "-c", program, *arguments], **options))  # type: ignore[arg-type]

    def until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, meanwhile=self.supervisor.poll)

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()

    def pid(self, name: str) -> int:
        return self.supervisor.pids()[name]


def wait_until(condition: Callable[[], object], *, meanwhile: Callable[[], None] = lambda: None) -> None:
    """For what takes milliseconds; patient, so that a busy machine fails no test."""
    deadline = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        meanwhile()
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor_module, "GRACE_S", 1.0)
    stage = Stage(tmp_path)
    yield stage
    stage.supervisor.stop()


def test_output_and_errors_go_to_one_log_per_service(stage: Stage) -> None:
    stage.start(
        "talker", "import os, sys; print('out', os.environ['STAGE'], flush=True); print('err', file=sys.stderr)", finishes=True
    )
    stage.until(lambda: stage.supervisor.finished("talker"))
    assert stage.log("talker").split() == ["out", "test", "err"]


def test_a_service_is_ready_once_its_address_answers_200(stage: Stage) -> None:
    flag = stage.folder / "ready"
    stage.start("plain", SLEEP)
    stage.supervisor.poll()
    assert stage.said == ["plain is ready"]
    listener = spawn([sys.executable, "-c", HTTP_READY, str(flag)], log_path=stage.folder / "http.log")
    try:
        wait_until(lambda: "port" in (stage.folder / "http.log").read_text())
        port = (stage.folder / "http.log").read_text().split()[1]
        stage.start("web", SLEEP, ready_url=f"http://127.0.0.1:{port}/readyz")
        for _ in range(3):
            stage.supervisor.poll()
        assert stage.said == ["plain is ready"]
        flag.touch()
        stage.supervisor.wait_ready()
        assert stage.said == ["plain is ready", "web is ready"]
    finally:
        kill_group(listener)
        listener.wait()


def test_work_that_is_done_is_not_started_again(stage: Stage) -> None:
    stage.start("once", "print('done')", finishes=True)
    stage.until(lambda: stage.supervisor.finished("once"))
    for _ in range(5):
        stage.supervisor.poll()
    assert stage.log("once") == "done\n" and stage.supervisor.pids() == {}
    stage.supervisor.wait_ready()


def test_what_should_serve_on_is_started_again_even_after_exit_code_0(stage: Stage) -> None:
    stage.start("server", "print('life')")
    stage.until(lambda: stage.log("server").count("life") >= 2)
    assert any(line.startswith("server ended with exit code 0; it starts again") for line in stage.said)


def test_a_killed_service_starts_again_under_another_pid_and_says_so(stage: Stage) -> None:
    stage.start("server", SLEEP)
    stage.supervisor.wait_ready()
    first = stage.pid("server")
    os.kill(first, signal.SIGKILL)
    stage.until(lambda: stage.supervisor.pids().get("server", first) != first)
    assert any(
        re.match(r"server ended with signal 9; it starts again in 0.01 s \(log: .*server.log\)", line) for line in stage.said
    )
    assert not is_alive(first)


def test_what_a_dead_service_left_of_its_session_is_killed(stage: Stage) -> None:
    stage.start("parent", WITH_CHILD)
    stage.until(lambda: "child" in stage.log("parent") and "up" in stage.log("parent"))
    child = int(re.findall(r"child (\d+)", stage.log("parent"))[0])
    assert is_alive(child)
    os.kill(stage.pid("parent"), signal.SIGKILL)
    stage.until(lambda: stage.log("parent").count("child") >= 2)
    wait_until(lambda: not is_alive(child))


def test_a_service_that_never_gets_ready_is_given_up_with_the_end_of_its_log(stage: Stage) -> None:
    program = "import sys; print('\\n'.join(f'line {i}' for i in range(30))); sys.exit(7)"
    stage.start("broken", program, ready_url="http://127.0.0.1:9/readyz")
    with pytest.raises(ServiceFailedError, match=r"broken ended with exit code 7:\n") as caught:
        stage.until(lambda: False)
    message = str(caught.value)
    assert "line 29" in message and "line 17" not in message and "broken.log" in message
    assert stage.log("broken").count("line 29") == 3


def test_a_service_that_gets_ready_and_dies_again_and_again_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "MANY_DEATHS", 5)
    stage.start("doomed", "import time, sys; time.sleep(0.1); print('dies', flush=True); sys.exit(7)")
    with pytest.raises(ServiceFailedError, match="doomed ended with exit code 7"):
        stage.until(lambda: False)
    assert stage.log("doomed").count("dies") == 5
    assert "doomed is ready" in stage.said


def test_a_wrong_configuration_is_not_tried_again(stage: Stage) -> None:
    stage.start("misled", "import sys; print('unknown key'); sys.exit(2)", ready_url="http://127.0.0.1:9/readyz")
    with pytest.raises(ServiceFailedError, match=r"misled ended with exit code 2:\n  unknown key"):
        stage.until(lambda: False)
    assert stage.log("misled") == "unknown key\n"


def test_stopping_is_polite_and_leaves_the_needed_one_until_last(stage: Stage) -> None:
    order = stage.folder / "order"
    program = textwrap.dedent("""
        import signal, sys, time
        def stop(*_):
            with open(sys.argv[1], "a") as file:
                file.write(sys.argv[2] + "\\n")
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        print("up", flush=True)
        time.sleep(600)
    """)
    stage.start("valkey", program, str(order), "valkey", needed_to_stop=True)
    stage.start("worker", program, str(order), "worker")
    stage.until(lambda: "up" in stage.log("valkey") and "up" in stage.log("worker"))
    pids = list(stage.supervisor.pids().values())
    stage.supervisor.stop()
    assert order.read_text().split() == ["worker", "valkey"]
    assert not any(is_alive(pid) for pid in pids)


def test_stopping_kills_what_ignores_it_and_all_its_children(stage: Stage) -> None:
    stage.start("stubborn", STUBBORN)
    stage.start("parent", WITH_CHILD)
    stage.until(lambda: "up" in stage.log("stubborn") and "up" in stage.log("parent"))
    child = int(re.findall(r"child (\d+)", stage.log("parent"))[0])
    pids = [*stage.supervisor.pids().values(), child]
    stage.supervisor.stop()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_second_ctrl_c_while_stopping_still_leaves_nothing_behind(tmp_path: Path) -> None:
    processes = [spawn([sys.executable, "-c", STUBBORN], log_path=tmp_path / f"{i}.log") for i in range(3)]
    try:
        wait_until(lambda: all("up" in (tmp_path / f"{i}.log").read_text() for i in range(3)))
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                stop_all(processes, grace_s=PATIENT_S)
        finally:
            signal.signal(signal.SIGALRM, before)
        wait_until(lambda: not any(is_alive(process.pid) for process in processes))
    finally:
        for process in processes:
            kill_group(process)
            process.wait()


def test_children_get_sigterm_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import pathlib, sys, time
        from mars_shared.processes import spawn
        child = spawn([sys.executable, "-c", "import time; time.sleep(600)"], log_path=pathlib.Path(sys.argv[1]))
        print(child.pid, flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child) and os.getsid(child) == child
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_alive(child))


def test_an_ended_process_can_be_stopped_again(tmp_path: Path) -> None:
    process = spawn([sys.executable, "-c", ""], log_path=tmp_path / "log")
    process.wait()
    stop_all([process], grace_s=1)
    kill_group(process)


STATE = StackState(
    run="r", supervisor_pid=os.getpid(), host="127.0.0.1", rollout_ports=[8100, 8101], reward_port=8200, trainer_port=8300
)


def test_ports_of_a_stack_stand_in_a_row() -> None:
    ports = Ports(9000)
    assert (ports.rollout(0), ports.rollout(1), ports.reward, ports.trainer) == (9000, 9001, 9100, 9200)


def test_the_state_of_a_stack_is_known_while_its_supervisor_lives(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    (tmp_path / "stack.json").write_text(STATE.model_dump_json())
    assert read_state(tmp_path) == STATE
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "stack.json").write_text(STATE.model_copy(update={"supervisor_pid": ended.pid}).model_dump_json())
    assert read_state(tmp_path) is None


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(ConfigError, match=r"stack.json: not a stack's state; delete it"):
        read_state(tmp_path)


def test_addresses_of_ipv6_hosts_stand_in_brackets() -> None:
    assert STATE.url(8100) == "http://127.0.0.1:8100"
    assert STATE.model_copy(update={"host": "::1"}).url(8100) == "http://[::1]:8100"
