"""The table of a run's evaluations: the first, the best and the last, with their intervals, and by dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mars_shared.report.history import Event, History
from mars_shared.report.markup import Child, Markup, join, tag
from mars_shared.report.numbers import interval, number, signed


def evaluations(run: History) -> Markup:
    """Before, at its best and after."""
    if not run.evaluations:
        return tag("p", "No evaluation was made.", class_="none")
    first, last = run.evaluations[0], run.evaluations[-1]
    best = max(run.evaluations, key=lambda event: event["multi"])
    columns = [("first", first), ("best Multi", best), ("last", last)]
    parts = [_table(f"{last['samples']} held-out samples: accuracy, or mean IoU of boxes", columns)]
    names = list(dict.fromkeys(name for event in run.evaluations for name in event.get("datasets", {})))
    if len(names) > 1:
        parts += [_table(name, _of_dataset(columns, name)) for name in names]
    return join([*parts, tag("p", NOTE, class_="note")])


NOTE = (
    "Intervals are 95 % bootstrap intervals over samples. The best evaluation is chosen on the same samples, so that its "
    "numbers are somewhat too good."
)


def rows_of(sources: Sequence[str]) -> list[tuple[str, tuple[str, ...], str]]:
    """Title, place in an evaluation's event and name of the interval of every result."""
    return [
        ("Multi", ("multi",), "multi"),
        *((f"Mono {name}", ("mono", name), f"mono/{name}") for name in sources),
        ("Union", ("union",), "union"),
        ("Multi − Union", ("multi_minus_union",), "multi_minus_union"),
        ("right answers", ("correct",), ""),
        ("answers parsed", ("parsed",), ""),
    ]


def value_at(event: Event, place: tuple[str, ...]) -> float | None:
    """A number of an evaluation; None where it has none."""
    found: Any = event
    for name in place:
        found = found.get(name) if isinstance(found, dict) else None
    return None if found is None else float(found)


def _of_dataset(columns: Sequence[tuple[str, Event]], name: str) -> list[tuple[str, Event]]:
    empty: Event = {"intervals": {}, "mono": {}}
    return [(title, {**event.get("datasets", {}).get(name, empty), "step": event["step"]}) for title, event in columns]


def _table(caption: str, columns: Sequence[tuple[str, Event]]) -> Markup:
    sources = list(dict.fromkeys(name for _, event in columns for name in event["mono"]))
    heads = [tag("th", f"{title}, step {event['step']}", scope="col", colspan=2) for title, event in columns]
    rows = [
        tag("tr", tag("th", title, scope="row"), *_cells(columns, place, key), _change(columns, place))
        for title, place, key in rows_of(sources)
    ]
    head = tag("tr", tag("td"), *heads, tag("th", "change", scope="col"))
    return tag(
        "div", tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows), class_="results"), class_="wide"
    )


def _cells(columns: Sequence[tuple[str, Event]], place: tuple[str, ...], key: str) -> list[Child]:
    cells: list[Child] = []
    for _, event in columns:
        cells.append(tag("td", number(value_at(event, place)), class_="value"))
        cells.append(tag("td", interval(event["intervals"].get(key)), class_="interval"))
    return cells


def _change(columns: Sequence[tuple[str, Event]], place: tuple[str, ...]) -> Markup:
    first, last = columns[0][1], columns[-1][1]
    before, after = value_at(first, place), value_at(last, place)
    change = None if before is None or after is None or first["step"] == last["step"] else after - before
    return tag("td", signed(change), class_="value")
