"""`mars dead`: what a run gave up and why, and what shall become of it."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mars_shared.contracts import RolloutGroup
from mars_shared.errors import InputError, QueueUnavailableError
from mars_shared.letters import Letter
from mars_shared.queue import Streams
from mars_shared.run_folder import Run, find_run, open_queue
from mars_shared.telemetry import read_events
from mars_shared.terminal import printable, printable_lines

app = typer.Typer(no_args_is_help=True, help=__doc__)
WIDTH = 160
"""Of tables where no terminal says how wide it is."""
console = Console() if Console().is_terminal else Console(width=WIDTH)
errors = Console(stderr=True)

ALL = "all"
COLUMNS = ("id", "time", "purpose", "task_id", "prompt_id", "stage", "attempts", "reason")

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="RUN_DIR|RECIPE", help="a run's folder or its TOML recipe; default: of the one stack in runs/* that runs"
    ),
]
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="as `mars dead list` shows them, or the word all")]


@app.command(name="list")
def list_letters(
    run_path: RunOption = None,
    limit: Annotated[int, typer.Option(min=1, help="the newest so many")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line instead of a table")] = False,
) -> None:
    """What was given up, newest first; if the run's Redis is gone, what its event log knows of it."""
    run = find_run(run_path)
    try:
        rows, total = asyncio.run(_newest(run, limit))
    except QueueUnavailableError as error:
        if not run.events.exists():
            raise
        _say_error(f"{error}. This is what {run.events} knows of deaths")
        rows = [_event_row(event) for event in reversed(read_events(run.events, "dead"))]
        rows, total = rows[:limit], len(rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
    else:
        _print_table(run, rows, total)


@app.command()
def show(
    entry_id: Annotated[str, typer.Argument(metavar="ID", help="as `mars dead list` shows it")],
    run_path: RunOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object")] = False,
) -> None:
    """One dead letter: reason, traceback and the whole item."""
    run = find_run(run_path)
    (letter,) = asyncio.run(_letters(run, _checked([entry_id])))
    if as_json:
        typer.echo(json.dumps(_whole(letter)))
        return
    for text in _description(letter):
        console.print(printable_lines(text), highlight=False, markup=False, soft_wrap=True)


@app.command()
def retry(ids: Ids, run_path: RunOption = None) -> None:
    """Have the trainer ask these training prompts again; `all` leaves those that cannot be asked again where they are."""
    run = find_run(run_path)
    moved, left = asyncio.run(_retry(run, ids))
    for obstacle in left:
        _say_error(obstacle)
    _say(f"{moved} prompt(s) moved to {Streams(run.name).retries}; the trainer takes them up as its next prompts")


@app.command()
def drop(ids: Ids, run_path: RunOption = None) -> None:
    """Remove dead letters for good."""
    run = find_run(run_path)
    _say(f"{asyncio.run(_drop(run, ids))} dead letter(s) removed")


async def _newest(run: Run, limit: int) -> tuple[list[dict[str, Any]], int]:
    async with open_queue(run) as queue:
        letters = [Letter(run.name, raw) for raw in await queue.dead(run.name, limit)]
        return [_row(letter) for letter in letters], await queue.depth(Streams(run.name).dead)


async def _letters(run: Run, ids: list[str]) -> list[Letter]:
    async with open_queue(run) as queue:
        return [Letter(run.name, raw) for raw in await queue.letters(run.name, ids)]


async def _retry(run: Run, ids: list[str]) -> tuple[int, list[str]]:
    """How many letters were moved, and why the others of `all` were not."""
    async with open_queue(run) as queue:
        if ids == [ALL]:
            letters = [Letter(run.name, raw) for raw in reversed(await queue.dead(run.name, limit=None))]
            left = [obstacle for letter in letters if (obstacle := letter.obstacle())]
            letters = [letter for letter in letters if not letter.obstacle()]
        else:
            letters, left = [Letter(run.name, raw) for raw in await queue.letters(run.name, _checked(ids))], []
        payloads = {letter.id: letter.retry_payload() for letter in letters}
        await queue.revive(run.name, payloads)
        return len(payloads), left


async def _drop(run: Run, ids: list[str]) -> int:
    stream = Streams(run.name).dead
    async with open_queue(run) as queue:
        if ids == [ALL]:
            return await queue.remove(stream, await queue.outstanding(stream))
        await queue.letters(run.name, _checked(ids))
        return await queue.remove(stream, _checked(ids))


def _checked(ids: list[str]) -> list[str]:
    """Each id once.

    Raises:
        InputError: one is no id.
    """
    for entry_id in ids:
        if not re.fullmatch(r"\d{1,20}-\d{1,20}", entry_id, re.ASCII):
            raise InputError(
                f"{entry_id!r} is no dead letter's id; expected one like 1700000000000-0, or `{ALL}` alone where it can be"
            )
    return list(dict.fromkeys(ids))


def _row(letter: Letter) -> dict[str, Any]:
    prompt, row = letter.prompt, letter.faulty_row
    about: tuple[str | None, ...] = (None, None, None)
    if prompt is not None:
        about = (prompt.purpose.value, prompt.task_id, prompt.prompt_id)
    elif row is not None:
        about = (row.purpose, None, f"dispatch index {row.dispatch_index}")
    reason = letter.raw.reason if row is None else f"{letter.raw.reason}: {letter.raw.detail}"
    values = (letter.id, letter.raw.time_s, *about, letter.stage, letter.raw.attempt, reason)
    return dict(zip(COLUMNS, values, strict=True))


def _event_row(event: dict[str, Any]) -> dict[str, Any]:
    return {column: event.get(column) for column in COLUMNS}


def _print_table(run: Run, rows: list[dict[str, Any]], total: int) -> None:
    if not rows:
        known = len(read_events(run.events, "dead"))
        _say(f"no dead letters of {run.name}" + (f"; {run.events} knows of {known} death(s)" if known else ""))
        return
    shown = f"{len(rows)} of {total}, --limit shows more" if len(rows) < total else str(total)
    table = Table(title=f"dead letters of {run.name} ({shown})")
    for column in COLUMNS:
        whole = column in ("id", "time", "stage")
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=whole, min_width=24 if column == "reason" else None)
    for row in rows:
        cells = {**row, "time": _clock(row["time"])}
        table.add_row(*(Text("-" if cells[column] is None else printable(cells[column])) for column in COLUMNS))
    console.print(table)


def _description(letter: Letter) -> list[str]:
    raw = letter.raw
    values = {**_row(letter), "time": _clock(raw.time_s)}
    lines = [f"{column.replace('_', ' ')}: {value}" for column, value in values.items()]
    lines += ["detail:", raw.detail]
    if letter.faulty_row is not None:
        return [*lines, "It never became a prompt: mend the row and start the run again; the row's next epoch asks it."]
    if letter.prompt is None:
        return [*lines, "item, which cannot be read:", raw.payload.decode(errors="backslashreplace")]
    lines += ["prompt:", letter.prompt.model_dump_json(indent=2)]
    if isinstance(letter.item, RolloutGroup):
        lines += ["completions, without token ids and log-probabilities:", json.dumps(_completions(letter.item), indent=2)]
    return lines


def _completions(group: RolloutGroup) -> list[dict[str, Any]]:
    return [item.model_dump(mode="json", exclude={"token_ids", "logprobs"}) for item in group.completions]


def _whole(letter: Letter) -> dict[str, Any]:
    """The row of a listing with all that is known besides; `item` where neither prompt nor row can be read."""
    whole = {**_row(letter), "detail": letter.raw.detail}
    if letter.prompt is not None:
        whole["prompt"] = letter.prompt.model_dump(mode="json")
        if isinstance(letter.item, RolloutGroup):
            whole["completions"] = _completions(letter.item)
    elif letter.faulty_row is not None:
        whole["dispatch_index"] = letter.faulty_row.dispatch_index
    else:
        whole["item"] = letter.raw.payload.decode(errors="backslashreplace")
    return whole


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).isoformat(sep=" ", timespec="seconds")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _say_error(text: str) -> None:
    errors.print(f"mars: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
