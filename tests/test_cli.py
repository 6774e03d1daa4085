"""What the command line does by itself; with real services behind it, see test_stack.py."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mars_shared import cli
from mars_shared.http import bind


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
    monkeypatch.setattr(cli, "console", Console(file=said, width=60))
    completion = {"kind": "multi", "source": None, "text": "<think>infrared is clear</think><answer>[red] 5</answer>"}
    score = {"reward": 1.5, "parts": {"format": 0.5, "accuracy": 1.0}}
    version = {"incarnation": 2, "step": 150}
    cli._print_rollouts({"group": {"policy_version": version, "completions": [completion]}, "scores": [score], "gain": 0.25})
    cells = [line.split("│")[3].strip() for line in said.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells).replace(" ", "") == completion["text"].replace(" ", "")  # type: ignore[union-attr]
    assert "policy 2.150" in said.getvalue() and "+0.250" in said.getvalue()


def test_an_answer_without_a_score_shows_why_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=said, width=120))
    completion = {"kind": "multi", "source": None, "text": "7"}
    scores = [{"reward": 1.0, "parts": {"mine": 1.0}}, {"error": "items.1: reward 'mine' failed: KeyError: 'a'"}]
    group = {"policy_version": {"incarnation": 2, "step": 150}, "completions": [completion, completion]}
    cli._print_rollouts({"group": group, "scores": scores, "gain": None})
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.getvalue().splitlines() if line.startswith("│")]
    assert rows == [
        ["multi", "all", "7", "1.000", "mine 1.00"],
        ["multi", "all", "7", "none", "items.1: reward 'mine' failed: KeyError: 'a'"],
    ]
    assert "gain" not in said.getvalue()


def test_a_taken_port_is_named_with_the_option_that_moves_it(tmp_path: Path, root: Path) -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MARS_")}
    command = [sys.executable, "-m", "mars_shared.cli", "train", str(root / "recipes/digits.toml"), "--port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    listener.close()
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "--port N moves replicas to N and up" in done.stderr
