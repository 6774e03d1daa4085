"""The picture that `mars watch` shows of a run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mars_shared.pace import duration
from mars_shared.progress import evaluation_line
from mars_shared.records.state import RunState, ServiceState
from mars_shared.terminal import printable
from mars_shared.watch import RunView

TREND = {
    "reward": "reward",
    "gain": "gain",
    "conflict_rate": "conflict",
    "entropy": "entropy",
    "grad_norm": "grad norm",
    "completions/mean_length": "length",
}
"""Metrics that are shown, and under what names."""
LEVELS = "▁▂▃▄▅▆▇█"
SILENT_S = 20.0
"""After so long without an event or a heartbeat it is said."""
BAR_WIDTH = 40


def picture(view: RunView, name: str, *, now: float) -> RenderableType:
    """The whole picture.

    Args:
        name: of the run, for the first line.
        now: unix time, against which ages are told.
    """
    parts = [_headline(view, name, now), _bar(view), _metrics(view)]
    if view.evaluation is not None:
        parts.append(_line(evaluation_line(view.evaluation)))
    if view.state is None:
        parts.append(_line("replicas and queues: the run has not told of them yet"))
    else:
        age_s = now - (view.state_at or now)
        parts += [_services(view.state, age_s), _queues(view.state)]
    parts.append(_line(f"dead letters {view.deaths}   restarts of the trainer {view.restarts}"))
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """One block a value, between the least and the greatest of them.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    least, greatest = min(values), max(values)
    if least == greatest:
        return LEVELS[len(LEVELS) // 2] * len(values)
    return "".join(LEVELS[round((value - least) / (greatest - least) * (len(LEVELS) - 1) + 1e-9)] for value in values)


def activity(view: RunView) -> str:
    """What the trainer does."""
    if view.ended:
        return "finished" if view.finished else "stopped"
    if view.evaluating is not None:
        done, samples = view.evaluating["done"], view.evaluating["samples"]
        pace = view.evaluation_pace.text(samples, "sample")
        return f"evaluating {done}/{samples}" + (f" ({pace})" if pace else "")
    return view.state.state if view.state is not None else "at work"


def _headline(view: RunView, name: str, now: float) -> Text:
    version = f", policy {view.state.version}" if view.state is not None else ""
    silence = now - view.heard_at if view.heard_at is not None else 0.0
    silent = f"   nothing heard for {duration(silence)}" if silence > SILENT_S and not view.ended else ""
    return _line(f"{name}: {activity(view)}{version}{silent}")


def _bar(view: RunView) -> RenderableType:
    if view.steps is None:
        return _line("no step yet")
    grid = Table.grid(padding=(0, 2))
    pace = "" if view.ended else view.pace.text(view.steps, "step")
    bar = ProgressBar(total=max(view.steps, 1), completed=view.step, width=BAR_WIDTH)
    grid.add_row(bar, _line(f"step {view.step}/{view.steps}"), _line(pace))
    return grid


def _metrics(view: RunView) -> RenderableType:
    if not view.metrics:
        return Text()
    grid = Table.grid(padding=(0, 2))
    newest = view.metrics[-1]
    for key, label in TREND.items():
        if key in newest:
            values = [metrics[key] for metrics in view.metrics if key in metrics]
            grid.add_row(_line(label), Text(f"{newest[key]:.3f}", justify="right"), _line(sparkline(values)))
    return grid


def _services(state: RunState, age_s: float) -> RenderableType:
    if not state.redis:
        return _line("Redis does not answer, so replicas and queues are unknown")
    table = Table(title="services", title_justify="left")
    for column in ("name", "policy", "behind", "groups in hand", "heard of", "restarts"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for service in sorted(state.services, key=lambda service: (service.service, service.name)):
        table.add_row(*map(_line, _cells(service, age_s)))
    return table


def _cells(service: ServiceState, age_s: float) -> tuple[str, ...]:
    silent_s = service.seen_s + age_s
    heard = f"{duration(silent_s)} ago" + (" !" if silent_s > SILENT_S else "")
    serves = service.service == "rollout"
    behind = "-" if service.lag is None else str(service.lag)
    version = service.version or ("none yet" if serves else "-")
    return service.name, version, behind, str(service.in_hand), heard, str(service.starts - 1)


def _queues(state: RunState) -> RenderableType:
    if not state.queues:
        return Text()
    table = Table(title="queues", title_justify="left")
    for column in ("stream", "entries", "claimed", "oldest"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for name, queue in state.queues.items():
        oldest = duration(queue.oldest_s) if queue.entries else "-"
        table.add_row(*map(_line, (name, str(queue.entries), str(queue.claimed), oldest)))
    return table


def _line(text: str) -> Text:
    return Text(printable(text), overflow="fold")
