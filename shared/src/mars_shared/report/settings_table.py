"""The recipe that a run had, what it ran on, and every version: as its newest start wrote them down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from mars_shared.report.history import History
from mars_shared.report.markup import Child, Markup, join, tag

NOT_RECORDED = (
    "The run's events have no start with its recipe: no training began, or a version of mars that wrote none trained it."
)


def recipe(run: History) -> Markup:
    """All settings, a table for each section."""
    if run.start is None:
        return tag("p", NOT_RECORDED, class_="none")
    tables = [_table(f"[{section}]", settings, code=True) for section, settings in run.start.recipe.items()]
    return join([_changes(run), tag("div", *tables, class_="columns")])


def _changes(run: History) -> Markup | None:
    """What a restart changed of the recipe; the tables show how it was at last."""
    lines = [
        f"incarnation {after.incarnation} changed {name} from {written(before.settings.get(name))} to {written(value)}"
        for before, after in pairwise(run.starts)
        for name, value in after.settings.items()
        if before.settings.get(name) != value
    ]
    return tag("ul", *(tag("li", tag("bdi", line)) for line in lines)) if lines else None


def versions(run: History) -> Markup:
    """Of packages, of what replicas said they run, and the machine of the trainer."""
    if run.start is None:
        return tag("p", NOT_RECORDED, class_="none")
    host = run.start.host
    machine = {"platform": host.platform, "CPU": host.cpu, "cores": host.cores, "GPUs": ", ".join(host.gpus) or "none"}
    replicas = {
        name: ", ".join(f"{package} {version}" for package, version in sorted(said.items()))
        for name, said in sorted(run.software.items())
    }
    tables = [_table("Trainer", run.start.versions), _table("Machine", machine)]
    return tag("div", *tables, _table("Replicas and reward workers", replicas) if replicas else None, class_="columns")


def written(value: Any) -> str:
    """A setting as a reader of recipes knows it."""
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def _table(title: str, values: Mapping[str, Any], *, code: bool = False) -> Markup:
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", tag("code", written(value)) if code else _text(value)))
        for name, value in values.items()
    ]
    return tag("table", tag("caption", title), tag("tbody", join(rows)), class_="settings")


def _text(value: Any) -> Child:
    return tag("bdi", str(value))
