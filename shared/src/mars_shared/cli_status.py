"""`mars status`: what runs, and where each run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mars_shared.client import get_json
from mars_shared.errors import ConfigError, MarsError
from mars_shared.settings import Deployment, load_deployment
from mars_shared.stack import TRAINER, StackState, read_state

console = Console()
Row = tuple[str, str, str]
"""A service's name, its address, and what it says of itself."""


def status(
    run_dir: Annotated[Path | None, typer.Argument(help="a run folder; default: every folder in runs/")] = None,
) -> None:
    """Show what runs, and where each run is."""
    folders = [run_dir] if run_dir else sorted(Path("runs").glob("*"))
    stacks = [(folder, state) for folder in folders if (state := read_state(folder))]
    if not stacks:
        console.print("nothing runs" + (f" in {run_dir}" if run_dir else " in runs/*"))
        raise typer.Exit(1)
    for folder, state in stacks:
        console.print(_table(folder, state, load_deployment()))


def _table(folder: Path, state: StackState, deployment: Deployment) -> Table:
    table = Table(title=f"{state.run} in {folder} (supervisor {state.supervisor_pid})")
    for column in ("service", "pid", "address", "state"):
        table.add_column(column, overflow="fold")
    for name, address, said in _rows(state, deployment):
        pid = state.pids.get(name)
        table.add_row(name, "-" if pid is None else str(pid), address, Text(said))
    return table


def _rows(state: StackState, deployment: Deployment) -> Iterator[Row]:
    def row(name: str, port: int, route: str, text: Callable[[dict[str, Any]], str]) -> Row:
        return name, state.url(port), _answer(f"{state.url(port)}{route}", deployment, text, runs=name in state.pids)

    for name, port in state.replicas.items():
        yield row(name, port, "/v1/version", _version_text)
    for name, reason in state.given_up.items():
        yield name, "-", f"given up: {reason}"
    for name in state.ending:
        yield name, "-", "ends"
    yield row("reward", state.reward_port, "/readyz", lambda answer: str(answer["status"]))
    yield row(TRAINER, state.trainer_port, "/v1/run", _run_text)
    if "valkey" in state.pids:
        yield "valkey", "-", "runs"


def _answer(url: str, deployment: Deployment, text: Callable[[dict[str, Any]], str], *, runs: bool) -> str:
    """What a service says of itself, or why it says nothing."""
    try:
        return text(get_json(url, deployment))
    except ConfigError:  # nothing answers there
        return "starting, does not answer yet" if runs else "does not run at the moment; its log says why"
    except MarsError as error:
        return str(error)


def _version_text(answer: dict[str, Any]) -> str:
    return f"serves policy {answer['version']}"


def _run_text(answer: dict[str, Any]) -> str:
    return f"{answer['state']}, step {answer['step']}/{answer['steps']}, policy {answer['version']}"
