"""`mars report`: what a run came to as one HTML file; `mars compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mars_shared.report.compare import Comparison, compare, read_runs
from mars_shared.report.compare_page import titles_of, write_comparison
from mars_shared.report.intervals import Estimate
from mars_shared.report.markup import visible
from mars_shared.report.settings_table import written
from mars_shared.report.write import write_report

console = Console()


def report(
    run_dir: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/demo", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(help="the file to write; default: report.html in the run folder", metavar="FILE")
    ] = None,
) -> None:
    """Write a run's report: one HTML file with all that it came to, which opens from disk without a network."""
    _say(f"report: {write_report(run_dir, out)}")


def compare_runs(
    run_dirs: Annotated[list[Path], typer.Argument(help="run folders; those of one recipe count as its seeds", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="also write an HTML file, with curves", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object in place of the tables")] = False,
) -> None:
    """Put runs side by side: final and best evaluations of each recipe, with 95 % intervals over seeds."""
    runs = read_runs(run_dirs)
    found = compare(runs)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _print(found)
    if out is not None:
        write_comparison(runs, out)
        if not as_json:
            _say(f"comparison: {out}")


def _print(found: Comparison) -> None:
    for number, group in enumerate(found.groups, start=1):
        seeds = ", ".join(str(run.seed) for run in group.runs)
        _say(f"{number}: seeds {seeds}, last evaluations at step {group.runs[0].evaluated}")
    if len(found.groups) > 1:
        console.print(_differences(found))
    console.print(_table(found))
    if any(len(group.runs) == 1 for group in found.groups):
        _say("a recipe with one run has no interval: how much seeds differ is not known")
    for name, values in found.passed_over.items():
        _say(visible(f"{name} is not the same in all runs, but tells no recipes apart: {', '.join(values)}"))
    for package, versions in found.versions.items():
        _say(f"{package} is not the same in all runs: {', '.join(versions)}")


def _differences(found: Comparison) -> Table:
    table = Table(title="what differs between the recipes")
    for name in ("", *map(str, range(1, len(found.groups) + 1))):
        table.add_column(name, overflow="fold")
    for name in found.groups[0].settings:
        table.add_row(Text(visible(name)), *(Text(visible(written(group.settings[name]))) for group in found.groups))
    return table


def _table(found: Comparison) -> Table:
    table = Table(title="means over seeds ± half of their 95 % intervals")
    for name in ("", "#", "runs", "final", "best", *(["final - 1's"] if len(found.groups) > 1 else [])):
        table.add_column(name, justify="left" if not name else "right")
    for title, key in titles_of(found):
        rows = [(number, group.results[key]) for number, group in enumerate(found.groups, start=1) if key in group.results]
        for place, (number, result) in enumerate(rows):
            cells = [_shown(result.final), _shown(result.best)]
            cells += [_shown(result.difference, with_sign=True)] if len(found.groups) > 1 else []
            table.add_row(Text("" if place else title), str(number), str(result.final.n), *cells)
        table.add_section()
    return table


def _shown(estimate: Estimate | None, *, with_sign: bool = False) -> str:
    if estimate is None:
        return ""
    mean = f"{estimate.mean:+.3f}" if with_sign else f"{estimate.mean:.3f}"
    return mean if estimate.high is None else f"{mean} ± {estimate.high - estimate.mean:.3f}"


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
