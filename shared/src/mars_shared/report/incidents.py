"""What went otherwise than planned: dead letters, restarts, short steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mars_shared.report.history import Event, History
from mars_shared.report.markup import Markup, join, said, tag
from mars_shared.report.overview import moment

SHOWN_LETTERS = 20
SHOWN_RESTARTS = 50


def incidents(run: History, unreadable_groups: int) -> Markup:
    """A line for each kind, then the newest letters and restarts."""
    dead = run.of("dead")
    counts = Counter(event["event"] for event in run.events)
    lines = [
        f"{len(dead)} dead letters",
        f"{len(run.restarts)} restarts of the trainer",
        f"{counts['short']} steps with fewer groups than wanted, {counts['skipped']} with none",
        f"{counts['snapshot_mended']} snapshots of weights written anew",
        f"{unreadable_groups} records of groups could not be read",
    ]
    lines += [f"{run.unreadable} lines of the event log that cannot be read"] if run.unreadable else []
    summary = tag("ul", *(tag("li", line) for line in lines))
    return join([summary, _letters(dead) if dead else None, _restarts(run) if run.restarts else None])


def _letters(dead: Sequence[Event]) -> Markup:
    rows = [
        tag(
            "tr",
            tag("td", moment(event["time"])),
            tag("td", said(event.get("prompt_id") or event.get("task_id") or "–", limit=200)),
            tag("td", said(event["reason"], limit=500), class_="said"),
        )
        for event in dead[: -SHOWN_LETTERS - 1 : -1]
    ]
    caption = f"The newest {len(rows)} of {len(dead)} dead letters"
    head = tag("tr", *(tag("th", name, scope="col") for name in ("time", "prompt", "reason")))
    return tag("div", tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows)), class_="wide")


def _restarts(run: History) -> Markup:
    steps = {event["incarnation"]: f"step {event['step']}" for event in run.of("resumed")}
    shown = [
        tag(
            "li",
            f"{moment(event['time'])}: from {steps.get(event['incarnation'], 'the beginning')} as incarnation {event['incarnation']}",
        )
        for event in run.restarts[-SHOWN_RESTARTS:]
    ]
    return join([tag("h3", "Restarts"), tag("ul", *shown)])
