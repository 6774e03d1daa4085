"""`mars watch`: a run as it goes on, from its files alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from mars_shared.errors import ConfigError
from mars_shared.progress import RunDisplay
from mars_shared.stack import find_stack, read_state
from mars_shared.telemetry import EventTail
from mars_shared.watch import RunView
from mars_shared.watch_view import activity, picture

console = Console()
POLL_S = 0.5


def watch(
    run_dir: Annotated[
        Path | None, typer.Argument(help="a run folder; default: of the one stack in runs/* that runs", metavar="RUN")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="print one picture and end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print where the run stands as one JSON object and end")] = False,
) -> None:
    """Watch a run that another process drives, until it has ended or Ctrl-C."""
    folder = _folder(run_dir)
    tail = EventTail(folder / "events.jsonl", from_end=False)
    view = RunView.of(tail.new())
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **view.as_json()}))
    elif once or view.ended:
        console.print(picture(view, str(folder), now=time.time()))
    else:
        _follow(folder, tail, view)


def _folder(run_dir: Path | None) -> Path:
    """The run's folder.

    Raises:
        ConfigError: it is none, or none is named and not exactly one stack runs.
    """
    if run_dir is None:
        return find_stack(None)[0]
    if not (run_dir / "events.jsonl").is_file() and read_state(run_dir) is None:
        raise ConfigError(
            f"{run_dir} is no run folder: it has no events.jsonl, and no stack runs there; expected one such as runs/demo"
        )
    return run_dir


def _follow(folder: Path, tail: EventTail, view: RunView) -> None:
    try:
        if console.is_terminal:
            _live(folder, tail, view)
        else:
            _plain(folder, tail, view)
    except KeyboardInterrupt:
        return


def _live(folder: Path, tail: EventTail, view: RunView) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(picture(view, str(folder), now=time.time()), refresh=True)
            if view.ended:
                return
            time.sleep(POLL_S)
            for event in tail.new():
                view.see(event)


def _plain(folder: Path, tail: EventTail, view: RunView) -> None:
    display = RunDisplay(console)
    of = "" if view.steps is None else f"/{view.steps}"
    display.say(f"{folder}: {activity(view)}, step {view.step}{of}")
    while not view.ended:
        time.sleep(POLL_S)
        for event in tail.new():
            view.see(event)
            display.show(event)
