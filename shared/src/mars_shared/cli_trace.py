"""`mars trace`: one group through all services."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mars_shared.errors import ConfigError, QueueError, RecordMissingError
from mars_shared.letters import Letter
from mars_shared.run_folder import find_run, open_queue
from mars_shared.terminal import printable
from mars_shared.trace import GroupName, Moment, group_names, moment_of_letter, moments_of

console = Console()
errors = Console(stderr=True)
SHOWN = 50
"""Names of groups that are listed where several fit; all with --json."""


def trace(
    run_dir: Annotated[Path, typer.Argument(help="a run's folder or its TOML recipe", metavar="RUN")],
    group: Annotated[
        str,
        typer.Argument(
            help="a task id, e.g. train-00000007, or the beginning of an id; if several begin so, they are listed",
            metavar="GROUP_ID",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Follow one group through trainer, replicas and reward service: every log line, event, record and dead letter about it."""
    folder = run_dir if run_dir.is_dir() else find_run(run_dir).folder
    if moments := _moments(folder, run_dir, group):
        _print_moments(moments, as_json=as_json)
        return
    names = meant(group_names(folder, group), group)
    if len(names) == 1:
        _print_moments(_moments(folder, run_dir, names[0].group), as_json=as_json)
        return
    if not names:
        raise RecordMissingError(
            f"no group {group!r} in {folder}; ids stand in logs/*.log (field group), in groups/ and in the page (task_id), and "
            f"`mars dead list` has those that were given up. `mars trace {run_dir} train` lists all training groups"
        )
    _print_names(names, as_json=as_json)


def meant(names: list[GroupName], text: str) -> list[GroupName]:
    """Those of several groups, of which an id begins so, that are called exactly so; all of them if none is."""
    return [name for name in names if text in (name.group, name.prompt_id, name.name)] or names


def _moments(folder: Path, run: Path, group: str) -> list[Moment]:
    return sorted([*moments_of(folder, group), *_deaths(run, group)], key=lambda moment: moment.time)


def _deaths(run: Path, group: str) -> list[Moment]:
    """Its dead letters, if the run's Redis is there; events tell of deaths without it."""
    try:
        return asyncio.run(_letters(run, group))
    except (ConfigError, QueueError) as error:
        errors.print(f"mars: without dead letters: {error}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        return []


async def _letters(path: Path, group: str) -> list[Moment]:
    run = find_run(path)
    async with open_queue(run) as queue:
        letters = [Letter(run.name, raw) for raw in await queue.dead(run.name, limit=None)]
    return [moment_of_letter(letter) for letter in letters if letter.prompt is not None and letter.prompt.task_id == group]


def _print_moments(moments: list[Moment], *, as_json: bool) -> None:
    width = max(len(moment.where) for moment in moments)
    for moment in moments:
        if as_json:
            typer.echo(json.dumps({"time": moment.time, "where": moment.where, "text": moment.text, "entry": moment.entry}))
            continue
        first, *more = moment.text.split("\n")
        clock = datetime.fromtimestamp(moment.time).isoformat(sep=" ", timespec="milliseconds")
        _say("\n".join([f"{clock}  {printable(moment.where):{width}}  {printable(first)}", *map(printable, more)]))


def _print_names(names: list[GroupName], *, as_json: bool) -> None:
    for name in names if as_json else names[:SHOWN]:
        if as_json:
            typer.echo(json.dumps({"group": name.group, "prompt_id": name.prompt_id, "name": name.name}))
        else:
            _say("  ".join(printable(own) for own in (name.group, name.prompt_id) if own))
    if not as_json and len(names) > SHOWN:
        _say(f"... and {len(names) - SHOWN} more; write more of the id, or --json for all")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
