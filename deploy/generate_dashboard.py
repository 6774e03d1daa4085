"""Writes Grafana's dashboard of a run, deploy/grafana/dashboards/mars.json, from deploy/dashboard.yml.

python deploy/generate_dashboard.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml

SOURCE = Path(__file__).with_name("dashboard.yml")
OUTPUT = Path(__file__).parent / "grafana" / "dashboards" / "mars.json"

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCHEMA_VERSION = 41
"""Of the dashboards of Grafana 12."""
COLUMNS = 24
CURVES, FIGURE = (8, 8), (4, 4)
"""Width and height of a panel, in the grid's units."""

LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
FIGURE_OPTIONS = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "none"}
OPTIONS = {
    "timeseries": {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "heatmap": {"calculate": False, "color": {"mode": "scheme", "scheme": "Blues"}, "legend": {"show": True}},
    "stat": FIGURE_OPTIONS | {"textMode": "value"},
    "state": FIGURE_OPTIONS | {"textMode": "name"},
}
"""By kind of panel. A state is a figure that shows the series' name instead of its value."""


def render() -> str:
    rows = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    return json.dumps(dashboard(rows), indent=1, ensure_ascii=False) + "\n"


def dashboard(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "uid": "mars",
        "title": "mars",
        "description": "One training run: what it learns, where its time goes, and how its services are.",
        "tags": ["mars"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # one cursor over all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": variables()},
        "panels": list(laid_out(rows)),
    }


def variables() -> list[dict[str, Any]]:
    runs = {"qryType": 1, "query": "label_values(mars_train_step, run)", "refId": "runs"}
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {"name": "run", "label": "Run", "type": "query", "datasource": DATASOURCE, "query": runs, "refresh": 2, "sort": 1},
        {
            "name": "window",
            "label": "Rates over",
            "type": "custom",
            "query": "1m,5m,15m,1h",
            "current": {"text": "5m", "value": "5m"},
        },
    ]


def laid_out(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows and their panels with ids and places; a collapsed row holds its panels itself."""
    ids, top = count(1), 0
    for row in rows:
        collapsed = row.get("collapsed", False)
        header = {"id": next(ids), "type": "row", "title": row["row"], "collapsed": collapsed}
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels, top = placed(row["panels"], ids, top + 1)
        yield header | {"gridPos": place, "panels": panels if collapsed else []}
        if not collapsed:
            yield from panels


def placed(specs: list[dict[str, Any]], ids: Iterator[int], top: int) -> tuple[list[dict[str, Any]], int]:
    """The panels side by side in lines from `top` on, and where the next row begins."""
    panels, left, height = [], 0, 0
    for spec in specs:
        width, height = FIGURE if spec.get("kind") in ("stat", "state") else CURVES
        if left + width > COLUMNS:
            left, top = 0, top + height
        panels.append(panel(spec) | {"id": next(ids), "gridPos": {"x": left, "y": top, "w": width, "h": height}})
        left += width
    return panels, top + height


def panel(spec: dict[str, Any]) -> dict[str, Any]:
    kind = spec.get("kind", "timeseries")
    instant = kind in ("stat", "state")
    return {
        "type": "stat" if instant else kind,
        "title": spec["title"],
        "description": spec["text"],
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": field(spec, kind), "overrides": []},
        "options": OPTIONS[kind],
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "format": "heatmap" if kind == "heatmap" else "time_series",
                "instant": instant,
                "range": not instant,
            }
            for index, (legend, expression) in enumerate(spec["queries"].items())
        ],
    }


def field(spec: dict[str, Any], kind: str) -> dict[str, Any]:
    """Unit, axis and, of curves, how they are drawn."""
    least, most = (*spec.get("range", []), None, None)[:2]
    bounds = {name: value for name, value in (("min", least), ("max", most)) if value is not None}
    found = {"unit": spec.get("unit", "short")} | bounds
    if kind == "timeseries":
        stacked = spec.get("stacked", False)
        found["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 40 if stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if stacked else "none"},
        }
    return found


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
