"""A comparison as an HTML file: numbers of the groups, mean curves with bands over seeds, the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mars_shared.files import write_atomic
from mars_shared.report.charts import Series, Values, line_chart, swatch
from mars_shared.report.compare import Comparison, compare, grouped
from mars_shared.report.evaluations import rows_of, value_at
from mars_shared.report.history import Event, History
from mars_shared.report.intervals import Estimate, mean_estimate
from mars_shared.report.markup import Markup, join, tag
from mars_shared.report.numbers import interval, number, signed
from mars_shared.report.page import document
from mars_shared.ui.curves import curves_of

POINTS = 100
Groups = Sequence[Sequence[History]]
METRICS = (
    ("Reward of multi-source answers", "reward"),
    ("Gain: multi-source minus mono-source reward", "gain"),
    ("Share of groups with gain below 0", "conflict_rate"),
    ("Entropy, nats a token", "entropy"),
    ("Gradient norm", "grad_norm"),
    ("Completion length, tokens", "completions/mean_length"),
)
METHOD = (
    "Intervals are 95 % intervals over seeds: Student's t for means, Welch's for differences. A group of one run has none. "
    "The best evaluation of a run is the one with the highest Multi, chosen on the same samples, so that its numbers are somewhat too good."
)


def write_comparison(runs: Sequence[History], path: Path) -> None:
    """Write a comparison as one HTML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(runs).encode())


def render(runs: Sequence[History]) -> str:
    """The comparison as HTML."""
    found = compare(runs)
    legend = [tag("li", swatch(index), " ", tag("bdi", group.label)) for index, group in enumerate(found.groups)]
    head = tag(
        "header",
        tag("p", "mars compare", class_="kind"),
        tag("h1", f"{len(runs)} runs, {len(found.groups)} recipes"),
        tag("ul", *legend, class_="legend"),
        class_="overview",
    )
    sections = {"Evaluations": _numbers(found), "Curves": _curves(grouped(runs), found), "Runs": _runs(found)}
    return document("mars compare", head, sections)


def titles_of(found: Comparison) -> list[tuple[str, str]]:
    """Title and name of every number that a group has."""
    names = list(dict.fromkeys(name for group in found.groups for name in group.results))
    sources = [name.removeprefix("mono/") for name in names if name.startswith("mono/")]
    return [(title, key) for title, _, key in rows_of(sources) if key in names]


def _numbers(found: Comparison) -> Markup:
    heads = ("", "recipe", "runs", "final", "95 %", "best", "95 %", "final, against the first recipe", "95 %")
    body = []
    for title, key in titles_of(found):
        shown = [(index, group) for index, group in enumerate(found.groups) if key in group.results]
        for place, (index, group) in enumerate(shown):
            result = group.results[key]
            name = tag("th", title, scope="rowgroup", rowspan=len(shown)) if place == 0 else None
            label = tag("td", swatch(index), " ", tag("bdi", group.label), class_="recipe")
            cells = [*_cells(result.final), *_cells(result.best), *_cells(result.difference, with_sign=True)]
            body.append(tag("tr", name, label, tag("td", result.final.n, class_="value"), *cells))
    head = tag("tr", *(tag("th", name, scope="col") for name in heads))
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="compared")
    return join([tag("div", table, class_="wide"), tag("p", METHOD, class_="note")])


def _cells(estimate: Estimate | None, *, with_sign: bool = False) -> list[Markup]:
    shape: Callable[[float | None], str] = signed if with_sign else number
    if estimate is None:
        return [tag("td"), tag("td")]
    bounds = interval(estimate.bounds) if estimate.bounds else "one run"
    return [tag("td", shape(estimate.mean), class_="value"), tag("td", bounds, class_="interval")]


def _curves(groups: Groups, found: Comparison) -> Markup:
    labels = [group.label for group in found.groups]
    charts = [_held_out(groups, labels, title, place) for title, place, key in rows_of(()) if key]
    charts += [_chart(groups, labels, title, name) for title, name in METRICS]
    note = "Means over the steps that all runs of a recipe have; bands are 95 % intervals over seeds."
    return join([tag("div", *charts, class_="charts"), tag("p", note, class_="note")])


def _held_out(groups: Groups, labels: Sequence[str], title: str, place: tuple[str, ...]) -> Markup | None:
    lines = []
    for label, group in zip(labels, groups, strict=True):
        runs = _common([run.evaluations for run in group])
        values = [[value_at(event, place) for event in run] for run in runs]
        lines.append(_series(label, [event["step"] for event in runs[0]], values))
    return _figure(f"Held-out samples: {title}", lines, points=True)


def _chart(groups: Groups, labels: Sequence[str], title: str, name: str) -> Markup | None:
    lines = []
    for label, group in zip(labels, groups, strict=True):
        thinned = [curves_of(run, POINTS) for run in _common([run.steps for run in group])]
        steps = thinned[0].steps
        lines.append(_series(label, steps, [found.metrics.get(name, [None] * len(steps)) for found in thinned]))
    return _figure(title, lines)


def _common(runs: Sequence[Sequence[Event]]) -> list[list[Event]]:
    """Of every run the events of those steps that all runs have."""
    shared = set.intersection(*({event["step"] for event in run} for run in runs))
    return [[event for event in run if event["step"] in shared] for run in runs]


def _series(label: str, steps: Sequence[int], runs: Sequence[Values]) -> Series:
    """The mean of a group's runs at every step, with its interval."""
    found = [_mean_of(values) for values in zip(*runs, strict=True)]
    return Series(
        label,
        steps,
        [None if each is None else each.mean for each in found],
        [None if each is None else each.low for each in found],
        [None if each is None else each.high for each in found],
    )


def _mean_of(values: Sequence[float | None]) -> Estimate | None:
    present = [value for value in values if value is not None]
    return mean_estimate(present) if present else None


def _figure(title: str, lines: Sequence[Series], *, points: bool = False) -> Markup | None:
    """None if there is nothing to draw."""
    if all(value is None for line in lines for value in line.values):
        return None
    return line_chart(title, lines, points=points)


def _runs(found: Comparison) -> Markup:
    heads = ("recipe", "folder", "seed", "state", "step", "last evaluation", "best evaluation")
    rows = [
        tag(
            "tr",
            tag("td", swatch(index), " ", tag("bdi", group.label), class_="recipe"),
            tag("td", tag("bdi", run.folder)),
            *(tag("td", value) for value in (run.seed, run.state, run.step, f"step {run.evaluated}", f"step {run.best}")),
        )
        for index, group in enumerate(found.groups)
        for run in group.runs
    ]
    head = tag("tr", *(tag("th", name, scope="col") for name in heads))
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide")
    passed_over = _list("Settings that differ between the runs, but tell no recipes apart:", found.passed_over)
    return join([table, passed_over, _list("Versions that differ between the runs:", found.versions)])


def _list(title: str, values: Mapping[str, Sequence[str]]) -> Markup | None:
    if not values:
        return None
    lines = [tag("li", tag("bdi", f"{name}: {', '.join(told)}")) for name, told in values.items()]
    return join([tag("p", title, class_="note"), tag("ul", *lines)])
