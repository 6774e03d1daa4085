"""`mars ARGUMENTS` in a thread of the test's process: importing everything anew for each call takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from rich.console import Console

from mars_shared import cli, cli_dead, cli_report, cli_rollout, cli_scale, cli_status, cli_trace, cli_watch


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


class CommandLine:
    """Calls the command line's entry point; tables get room for all their cells."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        for module in (cli, cli_dead, cli_report, cli_rollout, cli_scale, cli_status, cli_trace, cli_watch):
            monkeypatch.setattr(module, "console", Console(width=220))

    def __call__(self, *arguments: str, meanwhile: Callable[[], None] = lambda: None) -> Done:
        """Run `mars ARGUMENTS` to its end, and `meanwhile` again and again beside it."""
        self._monkeypatch.setattr(sys, "argv", ["mars", *arguments])
        self._capsys.readouterr()
        with ThreadPoolExecutor(1) as pool:
            code = pool.submit(_exit_code)
            while not code.done():
                meanwhile()
                time.sleep(0.01)
        said = self._capsys.readouterr()
        return Done(code.result(), said.out, said.err)


def _exit_code() -> int:
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch)
