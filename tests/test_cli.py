"""What the command line does by itself; with real services behind it, see test_stack.py."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from command_line import CommandLine, command_line
from mars_shared import cli, cli_rollout
from mars_shared.errors import ConfigError
from mars_shared.http import bind
from mars_shared.stack import StackState

__all__ = ["command_line"]


def test_a_run_is_put_aside_under_the_first_free_number(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "summary.json").write_text(content)
        cli._put_aside(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    assert (tmp_path / "demo-1" / "summary.json").read_text() == "first"
    assert (tmp_path / "demo-2" / "summary.json").read_text() == "second"


def test_a_narrow_terminal_hides_nothing_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(cli_rollout, "console", Console(file=said, width=60))
    completion = {"kind": "multi", "source": None, "text": "<think>infrared is clear</think><answer>[red] 5</answer>"}
    score = {"reward": 1.5, "parts": {"format": 0.5, "accuracy": 1.0}}
    version = {"incarnation": 2, "step": 150}
    cli_rollout._print_rollouts(
        {"group": {"policy_version": version, "completions": [completion]}, "scores": [score], "gain": 0.25}
    )
    cells = [line.split("│")[3].strip() for line in said.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells).replace(" ", "") == completion["text"].replace(" ", "")  # type: ignore[union-attr]
    assert "policy 2.150" in said.getvalue() and "+0.250" in said.getvalue()


def test_an_answer_without_a_score_shows_why_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(cli_rollout, "console", Console(file=said, width=120))
    completion = {"kind": "multi", "source": None, "text": "7"}
    scores = [{"reward": 1.0, "parts": {"mine": 1.0}}, {"error": "items.1: reward 'mine' failed: KeyError: 'a'"}]
    group = {"policy_version": {"incarnation": 2, "step": 150}, "completions": [completion, completion]}
    cli_rollout._print_rollouts({"group": group, "scores": scores, "gain": None})
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.getvalue().splitlines() if line.startswith("│")]
    assert rows == [
        ["multi", "all", "7", "1.000", "mine 1.00"],
        ["multi", "all", "7", "none", "items.1: reward 'mine' failed: KeyError: 'a'"],
    ]
    assert "gain" not in said.getvalue()


@pytest.fixture
def taken_port() -> Iterator[int]:
    listener = bind("127.0.0.1", 0)
    yield listener.getsockname()[1]
    listener.close()


def mars(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MARS_")} | variables
    command = [sys.executable, "-m", "mars_shared.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_a_taken_port_is_named_with_the_option_that_moves_it(tmp_path: Path, root: Path, taken_port: int) -> None:
    done = mars("train", str(root / "recipes/digits.toml"), "--port", str(taken_port), folder=tmp_path)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{taken_port}" in done.stderr
    assert "--port N moves replicas to N and up" in done.stderr and "make demo PORT=N" in done.stderr


def test_a_demo_of_other_data_names_the_demos_that_there_are(root: Path) -> None:
    done = mars("demo", "--data", "llvip", folder=root)
    assert (done.returncode, done.stderr.strip()) == (2, "mars: --data is 'llvip'; expected digits or scene")


def test_make_demo_passes_its_port_on(root: Path) -> None:
    make = ["make", "--dry-run", "--no-print-directory", "demo"]
    said = [subprocess.run([*make, *more], capture_output=True, text=True, cwd=root).stdout for more in ([], ["PORT=9000"])]
    assert said[0].rstrip().endswith("--port 8100") and said[1].rstrip().endswith("--port 9000")


def test_a_demo_that_cannot_start_leaves_the_one_before_where_it_is(tmp_path: Path, root: Path, taken_port: int) -> None:
    (tmp_path / "recipes").symlink_to(root / "recipes")
    (tmp_path / "runs/demo").mkdir(parents=True)
    taken = mars("demo", "--port", str(taken_port), folder=tmp_path)
    no_model = mars("demo", "--port", str(free_ports()), folder=tmp_path, MARS_MODEL__PATH="gone")
    assert (taken.returncode, no_model.returncode) == (2, 2)
    assert "cannot listen" in taken.stderr and "model folder gone: no such folder" in no_model.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]


def free_ports() -> int:
    """A first port from which a stack with few replicas finds all of its ports free."""
    for base in range(20_000, 60_000, 300):
        try:
            for port in (base, base + 1, base + 100, base + 200):
                bind("127.0.0.1", port).close()
        except ConfigError:
            continue
        return base
    raise AssertionError("every port is taken")


@pytest.mark.parametrize(
    ("command", "option"),
    [(["data", "check"], "--sheet"), (["score"], "--released-eval")],
)
def test_help_is_that_of_the_command_and_not_of_its_wrapper(tmp_path: Path, command: list[str], option: str) -> None:
    done = mars(*command, "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: mars {' '.join(command)}") and option in done.stdout


def test_a_dry_run_asks_the_reward_service_too_whatever_else_is_wrong(tmp_path: Path, root: Path) -> None:
    variables = {"MARS_REWARD__RECIPE": "papre", "MARS_MODEL__PATH": "gone"}
    done = mars("train", str(root / "recipes/digits.toml"), "--dry-run", folder=tmp_path, **variables)
    assert done.returncode == 2 and 'recipe = "papre"' in done.stdout
    assert "model folder gone: no such folder" in done.stderr and "mars_reward: " in done.stderr and "papre" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_service_that_runs_and_does_not_answer_is_starting(tmp_path: Path, command_line: CommandLine) -> None:
    base = free_ports()
    state = StackState(
        run="r",
        supervisor_pid=os.getpid(),
        host="127.0.0.1",
        replicas={"rollout-0": base, "rollout-1": base + 1},
        reward_port=base + 100,
        trainer_port=base + 200,
        pids={"rollout-0": 11, "reward": 12, "trainer": 13},
    )
    (tmp_path / "stack.json").write_text(state.model_dump_json())
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in command_line("status", str(tmp_path)).stdout.splitlines()
    ]
    said = {row[0]: row[3] for row in rows if row}
    assert said["rollout-0"] == said["reward"] == said["trainer"] == "starting, does not answer yet"
    assert said["rollout-1"] == "does not run at the moment; its log says why"


def test_status_as_json_is_an_object_a_run_with_its_services(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = free_ports()
    state = StackState(
        run="r",
        supervisor_pid=os.getpid(),
        host="127.0.0.1",
        replicas={"rollout-0": base},
        reward_port=base + 100,
        trainer_port=base + 200,
        pids={"rollout-0": 11, "valkey": 14},
        ending=["rollout-1"],
    )
    (tmp_path / "stack.json").write_text(state.model_dump_json())
    said = json.loads(command_line("status", str(tmp_path), "--json").stdout)
    assert (said["run"], said["folder"], said["supervisor_pid"]) == ("r", str(tmp_path), os.getpid())
    starting, stopped = "starting, does not answer yet", "does not run at the moment; its log says why"
    assert [tuple(service.values()) for service in said["services"]] == [
        ("rollout-0", 11, f"http://127.0.0.1:{base}", starting),
        ("rollout-1", None, None, "ends"),
        ("reward", None, f"http://127.0.0.1:{base + 100}", stopped),
        ("trainer", None, f"http://127.0.0.1:{base + 200}", stopped),
        ("valkey", 14, None, "runs"),
    ]
    nothing = command_line("status", str(tmp_path / "gone"), "--json")
    said = json.loads(nothing.stdout)
    assert (nothing.returncode, said) == (
        1,
        {"run": None, "folder": str(tmp_path / "gone"), "supervisor_pid": None, "services": []},
    )
    monkeypatch.chdir(tmp_path)
    everywhere = command_line("status", "--json")
    assert (everywhere.returncode, json.loads(everywhere.stdout)["folder"]) == (1, None)


def test_a_rollout_as_json_is_the_services_whole_answer(monkeypatch: pytest.MonkeyPatch, command_line: CommandLine) -> None:
    answer = {"group": {"completions": []}, "scores": None}
    monkeypatch.setattr(cli_rollout, "request_rollouts", lambda *where, **asked: answer)
    done = command_line("rollout", "--image", "visible=a.png", "--url", "http://127.0.0.1:1", "Which?", "--json")
    assert json.loads(done.stdout) == answer and done.stderr == ""


def test_an_evaluation_as_json_keeps_all_else_off_standard_output(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    started: list[object] = []
    monkeypatch.setattr(cli, "_run", lambda *where, shown_on, **how: started.append(shown_on is cli.errors))
    monkeypatch.setattr(cli, "_module", lambda *parts: started.append(parts))
    recipe = str(root / "recipes/digits.toml")
    for options in (["--json"], []):
        assert CliRunner().invoke(cli.app, ["eval", recipe, *options]).exit_code == 0
    results = ("mars_trainer.results", "--recipe", recipe)
    assert started == [True, (*results, "--json"), False, results]
