"""Small multiples of a run's metrics over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mars_shared.report.charts import Series, Values, line_chart
from mars_shared.report.history import Event, History
from mars_shared.report.markup import Markup, join, tag
from mars_shared.ui.curves import curves_of

POINTS = 120
CHARTS = (
    ("Reward of multi-source answers", ("reward", "reward_std")),
    ("Gain: multi-source minus mono-source reward", ("gain", "multi_minus_union")),
    ("Share of groups", ("conflict_rate", "promotion_rate", "no_signal_rate")),
    ("Entropy, nats a token", ("entropy",)),
    ("KL to the reference policy, nats a token", ("kl",)),
    ("Gradient norm", ("grad_norm",)),
    ("Completion length, tokens", ("completions/mean_length", "completions/median_length")),
    ("Completions cut at the length limit", ("completions/clipped_ratio",)),
    ("Clipped tokens", ("clip_ratio/low", "clip_ratio/high", "clip_ratio/dual")),
    ("Staleness, steps", ("staleness/mean", "staleness/max")),
)


def curves(run: History) -> Markup:
    """All charts that there are values for; what was 0 throughout is said in a line."""
    if not run.steps:
        return tag("p", "No training step was done.", class_="none")
    found = curves_of(run.steps, POINTS)
    flat = sorted(name for name, values in found.metrics.items() if not any(values))
    metrics = {name: values for name, values in found.metrics.items() if name not in flat}
    drawn = [line_chart(title, lines) for title, lines in _charts(found.steps, metrics) if lines]
    drawn[2:2] = evaluation_charts(run.evaluations)
    note = tag("p", f"0 throughout: {', '.join(flat)}.", class_="note") if flat else None
    return join([tag("div", *drawn, class_="charts"), note])


def evaluation_charts(evaluations: Sequence[Event]) -> list[Markup]:
    """Held-out results over steps; the band is the 95 % interval of Multi."""
    if len(evaluations) < 2:
        return []
    sources = dict.fromkeys(name for event in evaluations for name in event["mono"])
    bounds = [event["intervals"]["multi"] for event in evaluations]
    steps = [event["step"] for event in evaluations]
    lines = [
        Series(
            "Multi", steps, [event["multi"] for event in evaluations], [low for low, _ in bounds], [high for _, high in bounds]
        ),
        *(Series(f"Mono {name}", steps, [event["mono"].get(name) for event in evaluations]) for name in sources),
        Series("Union", steps, [event["union"] for event in evaluations]),
    ]
    return [line_chart("Held-out samples", lines, points=True)]


def _charts(steps: Sequence[int], metrics: Mapping[str, Values]) -> list[tuple[str, list[Series]]]:
    by_source = tuple(name for name in metrics if name.startswith("gain/"))
    wanted = [*CHARTS[:2], ("Gain over each source alone", by_source), *CHARTS[2:]]
    return [(title, [Series(name, steps, metrics[name]) for name in names if name in metrics]) for title, names in wanted]
