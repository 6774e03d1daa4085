"""How far a long command is: a bar with rate and time left on a terminal, elsewhere a line now and then. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from mars_shared.pace import Pace
from mars_shared.terminal import printable

PLAIN_EVERY_S = 10.0
Advance = Callable[[int], None]
"""Told how much is done altogether."""
T = TypeVar("T")


def bar_columns() -> tuple[BarColumn, MofNCompleteColumn, TextColumn, TextColumn]:
    """Of every bar: how much of how much, and `pace` and `note`, which are fields of its task."""
    fields = ("pace", "note")
    pace, note = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in fields)
    return BarColumn(), MofNCompleteColumn(), pace, note


@contextmanager
def progress(what: str, unit: str, total: int | None = None, *, console: Console | None = None) -> Iterator[Advance]:
    """Tell how far `what` is, in `unit`s, e.g. progress("checking", "row", 5000).

    What is written to standard output meanwhile stays there; on a terminal it appears above the bar.
    """
    console = console or Console(stderr=True)
    pace = Pace()
    pace.see(time.monotonic(), 0)
    if console.is_terminal:
        with _bar(what, unit, total, console, pace) as advance:
            yield advance
    else:
        yield _plain(what, unit, total, console, pace)


@contextmanager
def tracked(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[Iterator[T]]:
    """The items, with `progress` as they are dealt with: `with tracked(rows, "checking", "row") as rows: ...`."""
    with progress(what, unit, total) as advance:
        yield _counted(items, advance)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal while there is nothing to count."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Progress(SpinnerColumn(), TextColumn(what, markup=False), console=console, transient=True) as bar:
        bar.add_task("", total=None)
        yield


def _counted(items: Iterable[T], advance: Advance) -> Iterator[T]:
    for done, item in enumerate(items, start=1):
        yield item
        advance(done)


@contextmanager
def _bar(what: str, unit: str, total: int | None, console: Console, pace: Pace) -> Iterator[Advance]:
    columns = (TextColumn(printable(what), markup=False), *bar_columns())
    # rich sends redirected output to the bar's own stream, where data for a file would be lost.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=redirect, redirect_stderr=True) as bar:
        task = bar.add_task("", total=total, pace="", note="")

        def advance(done: int) -> None:
            pace.see(time.monotonic(), done)
            bar.update(task, completed=done, pace=pace.text(total, unit))

        yield advance


def _plain(what: str, unit: str, total: int | None, console: Console, pace: Pace) -> Advance:
    said = time.monotonic()

    def advance(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < PLAIN_EVERY_S:
            return
        said = now
        pace.see(now, done)
        so_far = f"{done}" if total is None else f"{done} of {total}"
        line = ", ".join(filter(None, (f"{what}: {so_far} {unit}s", pace.text(total, unit))))
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return advance
