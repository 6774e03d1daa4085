"""Where a run's time went: stages of its steps, evaluations, checkpoints, and how busy the cores were."""

from __future__ import annotations

import math

from mars_shared.report.charts import Series, stacked_chart
from mars_shared.report.history import History
from mars_shared.report.markup import Markup, join, tag
from mars_shared.report.numbers import duration, percent
from mars_shared.ui.curves import curves_of

POINTS = 120


def timing(run: History) -> Markup:
    """A bar for every step and a table of sums."""
    parts = [_bars(run) if run.steps else None, _table(run), _efficiency(run)]
    return join([part for part in parts if part is not None])


def stage_sums(run: History) -> dict[str, float]:
    """Seconds of all steps by stage."""
    stages = dict.fromkeys(stage for event in run.steps for stage in event["seconds"])
    return {stage: math.fsum(event["seconds"].get(stage, 0.0) for event in run.steps) for stage in stages}


def _bars(run: History) -> Markup:
    found = curves_of(run.steps, POINTS)
    parts = [Series(_words(stage), found.steps, values) for stage, values in found.seconds.items()]
    return tag("div", stacked_chart("Seconds of a step, by stage", parts), class_="charts single")


def _table(run: History) -> Markup:
    stages = stage_sums(run)
    in_steps = math.fsum(stages.values())
    whole = run.events[-1]["time"] - run.events[0]["time"] if run.events else 0.0
    beside = {
        f"{len(run.evaluations)} evaluations": math.fsum(event["seconds"] for event in run.evaluations),
        f"{len(run.of('checkpoint'))} checkpoints": math.fsum(event["seconds"] for event in run.of("checkpoint")),
        "self-tests": math.fsum(event["seconds"] for event in run.of("self_test")),
    }
    rows = [_row(_words(stage), seconds, in_steps) for stage, seconds in stages.items()]
    rows.append(_row(f"{len(run.steps)} steps", in_steps, in_steps, class_="sum"))
    rows += [_row(name, seconds, None) for name, seconds in beside.items()]
    rows.append(_row("from the first event to the last", whole, None, class_="sum"))
    head = tag("tr", tag("td"), tag("th", "time", scope="col"), tag("th", "share of the steps' time", scope="col"))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="times"), class_="wide")


def _row(name: str, seconds: float, total: float | None, *, class_: str | None = None) -> Markup:
    share = percent(seconds / total) if total else ""
    cells = (tag("td", duration(seconds), class_="value"), tag("td", share, class_="value"))
    return tag("tr", tag("th", name, scope="row"), *cells, class_=class_)


def _efficiency(run: History) -> Markup | None:
    work = run.newest("work")
    if work is None:
        return None
    busy = f"{duration(work['cpu_s'])} of CPU time in {duration(work['wall_s'])} on {work['cores']} cores"
    return tag("p", f"Efficiency {work['efficiency']:.2f}: {busy}, from the first evaluation to the last step.", class_="note")


def _words(name: str) -> str:
    return name.replace("_", " ")
