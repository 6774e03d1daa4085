"""After a run: a table, a picture of the curves, a sheet of sample groups, and summary.json."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mars_shared.blobs import BlobStore
from mars_shared.errors import ConfigError, MarsError
from mars_shared.records.groups import read_groups
from mars_shared.settings import Recipe, load_recipe
from mars_shared.telemetry import by_step, read_events
from mars_trainer.pictures import draw_curves, draw_groups
from mars_trainer.timeline import STAGES

SHOWN_GROUPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(prog="mars_trainer.report", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    try:
        recipe = load_recipe(parser.parse_args().recipe)
        report(recipe, Console())
    except MarsError as error:
        Console(stderr=True).print(f"mars: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return error.exit_code
    return 0


def report(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Write the report's files beside the run's, print its table, return the summary.

    Raises:
        ConfigError: as `summarise_run`; no record of a held-out sample can be read.
    """
    folder = recipe.run.dir
    events = read_events(folder / "events.jsonl")
    summary = summarise_run(events, seed=recipe.run.seed)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw_curves(events, folder / "curves.png", title=f"{recipe.run.name}, seed {recipe.run.seed}")
    evaluated = [group for group in read_groups(folder / "groups") if group.occasion == "evaluation"]
    if not evaluated:
        raise ConfigError(f"no record of a held-out sample can be read in {folder}/groups; expected those of the last evaluation")
    last_step = evaluated[-1].step
    shown = [group for group in evaluated if group.step == last_step][:SHOWN_GROUPS]
    draw_groups(shown, BlobStore(folder / "blobs"), folder / "groups.png", title=f"held-out samples after step {last_step}")
    for table in (_results_table(summary), _gain_table(events), _time_table(summary)):
        console.print(table)
    console.print(f"pictures and numbers: {folder}/curves.png, {folder}/groups.png, {folder}/summary.json", highlight=False)
    return summary


def summarise_run(events: list[dict[str, Any]], *, seed: int) -> dict[str, Any]:
    """Before and after as fractions, seconds by stage over all steps, efficiency on one CPU host.

    Raises:
        ConfigError: the run has not finished a first and a last evaluation.
    """
    evaluations, steps = by_step(events, "evaluation"), by_step(events, "step")
    if len(evaluations) < 2 or not steps:
        raise ConfigError(f"{len(evaluations)} evaluations and {len(steps)} steps in the run's events; expected a finished run")
    seconds: Counter[str] = Counter()
    for step in steps:
        seconds.update(step["seconds"])
    work = next((event for event in reversed(events) if event["event"] == "work"), None)
    return {
        "seed": seed,
        "steps": len(steps),
        "before": _result(evaluations[0]),
        "after": _result(evaluations[-1]),
        "seconds": {stage: round(seconds[stage], 3) for stage in STAGES},
        "efficiency": round(work["efficiency"], 4) if work else None,
    }


def _result(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: evaluation[key] for key in ("samples", "multi", "mono", "union", "parsed", "multi_minus_union", "intervals")}


def _results_table(summary: dict[str, Any]) -> Table:
    before, after = summary["before"], summary["after"]
    table = Table(title=f"held-out samples: {after['samples']}, greedy")
    for column in ("", "before", "after", "95 %", "change"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("Multi", "multi", before["multi"], after["multi"])]
    rows += [(f"Mono {name}", f"mono/{name}", before["mono"][name], after["mono"][name]) for name in after["mono"]]
    rows += [("Union", "union", before["union"], after["union"])]
    rows += [("Multi - Union", "multi_minus_union", before["multi_minus_union"], after["multi_minus_union"])]
    rows += [("answers parsed", "", before["parsed"], after["parsed"])]
    for title, key, old, new in rows:
        interval = after["intervals"].get(key)
        shown = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        table.add_row(title, f"{old:.3f}", f"{new:.3f}", shown, f"{new - old:+.3f}")
    return table


def _gain_table(events: list[dict[str, Any]], *, rows: int = 8) -> Table:
    steps = by_step(events, "step")
    table = Table(title="gain (multi minus mono reward) and share of conflicts while training")
    for column in ("steps", "reward", "gain", "conflict rate", "no signal"):
        table.add_column(column, justify="right")
    size = max(1, -(-len(steps) // rows))
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        means = [_mean(part, name) for name in ("reward", "gain", "conflict_rate", "no_signal_rate")]
        table.add_row(f"{part[0]['step']}-{part[-1]['step']}", *("-" if mean is None else f"{mean:.3f}" for mean in means))
    return table


def _mean(steps: list[dict[str, Any]], name: str) -> float | None:
    values = [step["metrics"][name] for step in steps if name in step["metrics"]]
    return sum(values) / len(values) if values else None


def _time_table(summary: dict[str, Any]) -> Table:
    seconds = summary["seconds"]
    total = sum(seconds.values())
    efficiency = "" if summary["efficiency"] is None else f", efficiency {summary['efficiency']:.2f}"
    table = Table(title=f"where the time of {summary['steps']} steps went{efficiency}")
    for column in ("stage", "seconds", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, value in seconds.items():
        table.add_row(stage.replace("_", " "), f"{value:.1f}", f"{value / total:.0%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
