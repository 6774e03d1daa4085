"""`mars status`: what runs, and where each run is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from mars_shared.terminal import printable, printable_lines

console = Console()


@dataclass(frozen=True)
class Row:
    """A service: its name, process id and address (None: it has none at the moment), and what it says of itself."""

    service: str
    pid: int | None
    address: str | None
    state: str


def status(
    run_dir: Annotated[Path | None, typer.Argument(help="a run folder; default: every folder in runs/")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object for each run instead of a table")] = False,
) -> None:
    """Show what runs, and where each run is; exit code 1 if nothing does."""
    folders = [run_dir] if run_dir else sorted(Path("runs").glob("*"))
    stacks = [(folder, state) for folder in folders if (state := read_state(folder))]
    deployment = load_deployment()
    for folder, state in stacks:
        rows = list(_rows(state, deployment))
        if as_json:
            services = [asdict(row) for row in rows]
            about = {"run": state.run, "folder": str(folder), "supervisor_pid": state.supervisor_pid}
            typer.echo(json.dumps({**about, "services": services}))
        else:
            console.print(_table(folder, state, rows))
    if not stacks:
        if as_json:
            nothing: dict[str, Any] = {
                "run": None,
                "folder": None if run_dir is None else str(run_dir),
                "supervisor_pid": None,
                "services": [],
            }
            typer.echo(json.dumps(nothing))
        else:
            console.print("nothing runs" + (f" in {run_dir}" if run_dir else " in runs/*"), markup=False)
        raise typer.Exit(1)


def _table(folder: Path, state: StackState, rows: list[Row]) -> Table:
    table = Table(title=Text(printable(f"{state.run} in {folder} (supervisor {state.supervisor_pid})")))
    for column in ("service", "pid", "address", "state"):
        table.add_column(column, overflow="fold")
    for row in rows:
        pid = "-" if row.pid is None else str(row.pid)
        table.add_row(*(Text(printable_lines(cell)) for cell in (row.service, pid, row.address or "-", row.state)))
    return table


def _rows(state: StackState, deployment: Deployment) -> Iterator[Row]:
    def row(name: str, port: int, route: str, text: Callable[[dict[str, Any]], str]) -> Row:
        said = _answer(f"{state.url(port)}{route}", deployment, text, runs=name in state.pids)
        return Row(name, state.pids.get(name), state.url(port), said)

    for name, port in state.replicas.items():
        yield row(name, port, "/v1/version", _version_text)
    for name, reason in state.given_up.items():
        yield Row(name, None, None, f"given up: {reason}")
    for name in state.ending:
        yield Row(name, None, None, "ends")
    yield row("reward", state.reward_port, "/readyz", lambda answer: str(answer["status"]))
    yield row(TRAINER, state.trainer_port, "/v1/run", _run_text)
    if "valkey" in state.pids:
        yield Row("valkey", state.pids["valkey"], None, "runs")


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
