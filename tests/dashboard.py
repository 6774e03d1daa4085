"""What the shipped monitoring files ask Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy/grafana/dashboards/mars.json"
ALERTS = ROOT / "deploy/alerts.yml"
WORDS = {"or", "and", "unless"}
"""Of PromQL, beside functions and what stands before a list of labels."""


def load_dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    """All that show something, those of collapsed rows too."""
    found = [(panel, *panel.get("panels", ())) for panel in load_dashboard()["panels"]]
    return [panel for family in found for panel in family if panel["type"] != "row"]


def dashboard_queries(run: str = "digits", window: str = "5m") -> list[tuple[str, str]]:
    """Title and expression of every query, with Grafana's variables replaced."""
    values = {"$run": run, "$window": window, "$__rate_interval": window}

    def filled(expression: str) -> str:
        for name, value in values.items():
            expression = expression.replace(name, value)
        return expression

    return [(panel["title"], filled(target["expr"])) for panel in panels() for target in panel["targets"]]


def alert_rules() -> dict[str, dict[str, Any]]:
    """By name."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def metrics_of(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric that an expression reads, with the labels by which it chooses series.

    Example:
        'sum by (le) (rate(a_bucket{run="x"}[5m])) > 2' gives ("a_bucket", {"run"}).
    """
    bare = re.sub(r"\[[^\]]*\]", "", re.sub(r"\b(?:by|on|group_left) *\([^)]*\)", "", expression))
    for name, matchers in re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:]| *\()(?:\{([^}]*)\})?", _without_texts(bare)):
        if name not in WORDS:
            yield name, set(re.findall(r"(\w+) *[=!]", matchers))


def _without_texts(expression: str) -> str:
    return re.sub(r'"[^"]*"', "", expression)
