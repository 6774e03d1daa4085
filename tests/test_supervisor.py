"""The supervisor with real processes: restarts, refusals with the log's end, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mars_shared import supervisor as supervisor_module
from mars_shared.errors import ConfigError
from mars_shared.processes import kill_group, spawn, stop_all
from mars_shared.stack import Ports, StackState, read_state
from mars_shared.supervisor import ServiceFailedError
from process_stage import NOTES_ITS_END, PATIENT_S, SLEEP, STUBBORN, Stage, is_alive, wait_until

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


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor_module, "GRACE_S", 1.0)
    stage = Stage(tmp_path)
    yield stage
    stage.supervisor.stop()


@contextmanager
def ready_address(folder: Path, flag: Path) -> Iterator[str]:
    """An address that answers 200 once the flag exists, 503 before."""
    listener = spawn([sys.executable, "-c", HTTP_READY, str(flag)], log_path=folder / "http.log")
    try:
        wait_until(lambda: re.search(r"port \d+\n", (folder / "http.log").read_text()))
        yield f"http://127.0.0.1:{(folder / 'http.log').read_text().split()[1]}/readyz"
    finally:
        kill_group(listener)
        listener.wait()


def pauses(stage: Stage) -> list[str]:
    """Seconds before each restart, as they were said."""
    return [found for line in stage.said for found in re.findall(r"it starts again in (\S+) s", line)]


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
    with ready_address(stage.folder, flag) as url:
        stage.start("web", SLEEP, ready_url=url)
        for _ in range(3):
            stage.supervisor.poll()
        assert stage.said == ["plain is ready"]
        flag.touch()
        stage.supervisor.wait_ready()
        assert stage.said == ["plain is ready", "web is ready"]


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


def test_the_end_of_a_log_is_that_of_the_last_start_alone(stage: Stage) -> None:
    (stage.folder / "logs").mkdir()
    (stage.folder / "logs" / "misled.log").write_text("of a run before\n")
    stage.start("misled", "import sys; print('unknown key'); sys.exit(2)")
    with pytest.raises(ServiceFailedError, match=r"exit code 2:\n  unknown key\n\(whole log: .*misled.log\)$"):
        stage.until(lambda: False)


def test_the_end_of_a_log_is_said_without_secrets_of_the_environment_and_of_the_weights_url(stage: Stage) -> None:
    stage.start("leaky", "import sys; print('0123abcd s3://a:b@host pass-w'); sys.exit(2)")
    with pytest.raises(ServiceFailedError, match=r"exit code 2:\n  \*\*\* s3://\*\*\*@host \*\*\*\n"):
        stage.until(lambda: False)


def test_the_end_of_a_log_is_that_of_the_last_restart(stage: Stage) -> None:
    again = stage.folder / "again"
    program = f"import pathlib, sys; p = pathlib.Path({str(again)!r}); first = not p.exists(); p.touch()"
    stage.start("fickle", f"{program}; print('first' if first else 'second', flush=True); sys.exit(7 if first else 2)")
    with pytest.raises(ServiceFailedError, match=r"exit code 2:\n  second\n\(whole"):
        stage.until(lambda: False)


def test_a_service_that_gets_ready_and_dies_again_and_again_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "MANY_DEATHS", 5)
    killed = []

    def kill_whenever_ready() -> None:
        if stage.said.count("doomed is ready") > len(killed):
            killed.append(stage.pid("doomed"))
            os.kill(killed[-1], signal.SIGKILL)

    stage.start("doomed", SLEEP)
    with pytest.raises(ServiceFailedError, match="doomed ended with signal 9"):
        stage.until(kill_whenever_ready)
    assert len(set(killed)) == 5


def test_deaths_before_ready_lengthen_the_pause_and_being_ready_forgives_them(stage: Stage) -> None:
    flag = stage.folder / "ready"
    with ready_address(stage.folder, flag) as url:
        stage.start("slow", SLEEP, ready_url=url)
        for deaths in (1, 2):
            stage.until(lambda: stage.supervisor.pids())
            os.kill(stage.pid("slow"), signal.SIGKILL)
            stage.until(lambda deaths=deaths: len(pauses(stage)) == deaths)
        stage.until(lambda: stage.supervisor.pids())
        flag.touch()
        stage.supervisor.wait_ready()
        os.kill(stage.pid("slow"), signal.SIGKILL)
        stage.until(lambda: len(pauses(stage)) == 3)
    # 0.01 s doubles with each death in a row before ready: 0.02, 0.04; a death after it counts none: 0.01.
    assert pauses(stage) == ["0.02", "0.04", "0.01"]


def test_an_optional_service_that_cannot_start_is_given_up_alone(stage: Stage) -> None:
    stage.start("server", SLEEP)
    stage.start("extra", "print('no memory'); raise SystemExit(7)", ready_url="http://127.0.0.1:9/readyz", optional=True)
    stage.until(lambda: stage.supervisor.given_up)
    assert stage.log("extra").count("no memory") == 3
    assert stage.supervisor.given_up["extra"].startswith("extra ended with exit code 7:\n  no memory")
    assert any(line.startswith("extra is given up, the others go on: extra ended with exit code 7") for line in stage.said)
    assert stage.supervisor.names == {"server"} and is_alive(stage.pid("server"))


def test_what_is_asked_to_end_does_so_while_the_others_are_looked_after(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "GRACE_S", 600.0)
    stage.start("stubborn", STUBBORN)
    stage.start("server", SLEEP)
    stage.until(lambda: "up" in stage.log("stubborn"))
    stubborn, first = stage.pid("stubborn"), stage.pid("server")
    stage.supervisor.end("stubborn")
    os.kill(first, signal.SIGKILL)
    stage.until(lambda: stage.supervisor.pids().get("server", first) != first)
    assert is_alive(stubborn) and stage.supervisor.ending == ["stubborn"] and stage.supervisor.names == {"server"}
    os.kill(stubborn, signal.SIGKILL)
    stage.until(lambda: not stage.supervisor.ending)
    for _ in range(5):
        stage.supervisor.poll()
    assert stage.log("stubborn").count("up") == 1, "what was asked to end and dies is not started again"
    assert "stubborn has ended" in stage.said


def test_what_does_not_end_is_killed_with_its_children_when_its_grace_is_over(stage: Stage) -> None:
    stage.start("parent", f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WITH_CHILD}")
    stage.until(lambda: "child" in stage.log("parent") and "up" in stage.log("parent"))
    child = int(re.findall(r"child (\d+)", stage.log("parent"))[0])
    parent = stage.pid("parent")
    stage.supervisor.end("parent")
    stage.until(lambda: not stage.supervisor.ending)
    wait_until(lambda: not is_alive(parent) and not is_alive(child))


def test_what_waits_for_its_restart_can_be_ended(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 600.0)
    stage.start("server", "print('life')")
    stage.until(lambda: pauses(stage))
    stage.supervisor.end("server")
    stage.until(lambda: not stage.supervisor.ending)
    assert stage.supervisor.names == set() and stage.log("server").count("life") == 1


def test_stopping_ends_what_was_ending_too(stage: Stage) -> None:
    stage.start("stubborn", STUBBORN)
    stage.until(lambda: "up" in stage.log("stubborn"))
    pid = stage.pid("stubborn")
    stage.supervisor.end("stubborn")
    stage.supervisor.stop()
    wait_until(lambda: not is_alive(pid))


def test_a_wrong_configuration_is_not_tried_again(stage: Stage) -> None:
    stage.start("misled", "import sys; print('unknown key'); sys.exit(2)", ready_url="http://127.0.0.1:9/readyz")
    with pytest.raises(ServiceFailedError, match=r"misled ended with exit code 2:\n  unknown key"):
        stage.until(lambda: False)
    assert stage.log("misled") == "unknown key\n"


def test_stopping_is_polite_and_leaves_the_needed_one_until_last(stage: Stage) -> None:
    order = stage.folder / "order"
    stage.start("valkey", NOTES_ITS_END, str(order), "valkey", needed_to_stop=True)
    stage.start("worker", NOTES_ITS_END, str(order), "worker")
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
    interrupts = STUBBORN.replace("signal.SIG_IGN", "lambda *_: os.kill(os.getppid(), signal.SIGALRM)").replace(
        "import", "import os,"
    )
    programs = (interrupts, STUBBORN, STUBBORN)
    processes = [spawn([sys.executable, "-c", program], log_path=tmp_path / f"{i}.log") for i, program in enumerate(programs)]
    try:
        wait_until(lambda: all("up" in (tmp_path / f"{i}.log").read_text() for i in range(3)))
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
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
    run="r",
    supervisor_pid=os.getpid(),
    host="127.0.0.1",
    replicas={"rollout-0": 8100, "rollout-1": 8101},
    reward_port=8200,
    trainer_port=8300,
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


def test_a_file_beside_the_run_folders_is_no_stack(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text("a key")
    assert read_state(tmp_path / "api-key") is None


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(ConfigError, match=r"stack.json: not a stack's state; delete it"):
        read_state(tmp_path)


def test_addresses_of_ipv6_hosts_stand_in_brackets() -> None:
    assert STATE.url(8100) == "http://127.0.0.1:8100"
    assert STATE.model_copy(update={"host": "::1"}).url(8100) == "http://[::1]:8100"
