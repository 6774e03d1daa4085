"""What the trainer tells Prometheus: what it counts itself, and, read at each scrape, where the run and its services are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mars_shared.contracts import Kind, ScoredGroup
from mars_shared.records.state import QueueState, RunState
from mars_trainer.batch import Batch
from mars_trainer.progress import Progress
from mars_trainer.timeline import STAGES

GROUPS = Counter("mars_train_groups", "Groups that came to the trainer's steps, by what became of them", ["run", "outcome"])
"""`outcome` is "trained", "left_out" (dynamic sampling) or "dead"."""
GROUP_OUTCOMES = ("trained", "left_out", "dead")
TOKENS = Counter("mars_train_tokens", "Multi-source completion tokens trained on", ["run"])
STAGE_SECONDS = Counter("mars_train_stage_seconds", "Wall seconds of steps, by stage", ["run", "stage"])
STALENESS = Histogram(
    "mars_train_staleness_steps",
    "Of each multi-source completion trained on: by how many steps its oldest token's policy is behind",
    ["run"],
    buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
)

BY_PART = {"reward": ("mars_step_reward_part", "part"), "gain": ("mars_step_gain_by_source", "source")}
"""Slash metrics whose second half is a name that a recipe or dataset chose: family and label."""


def begin_counting(run: str) -> None:
    """Show every counter at 0, so that its first increase is seen as one."""
    TOKENS.labels(run)
    STALENESS.labels(run)
    for outcome in GROUP_OUTCOMES:
        GROUPS.labels(run, outcome)
    for stage in STAGES:
        STAGE_SECONDS.labels(run, stage)


def count_step(run: str, step: int, batch: Batch, seconds: Mapping[str, float], tokens: float) -> None:
    """Count a step whose groups the policy at `step` was trained on."""
    GROUPS.labels(run, "trained").inc(len(batch.kept))
    GROUPS.labels(run, "left_out").inc(len(batch.dropped))
    TOKENS.labels(run).inc(tokens)
    for stage, value in seconds.items():
        STAGE_SECONDS.labels(run, stage).inc(value)
    for judged in batch.kept:
        for lag in completion_lags(judged.answer.scored, step):
            STALENESS.labels(run).observe(lag)


def completion_lags(scored: ScoredGroup, step: int) -> list[int]:
    """By how many steps the oldest policy that sampled a token of a multi-source completion is behind `step`, a number each."""
    completions = [completion for completion in scored.group.completions if completion.kind is Kind.MULTI]
    return [step - min(span.version.step for span in completion.spans) for completion in completions if completion.spans]


def count_dead(run: str) -> None:
    """Count a group that will never be made."""
    GROUPS.labels(run, "dead").inc()


class RunCollector(Collector):
    """Makes metrics of a run's progress and of the newest look at its queues and services, if there was one."""

    def __init__(self, progress: Progress, look: Callable[[], RunState | None]) -> None:
        self._progress = progress
        self._look = look

    def collect(self) -> Iterator[Metric]:
        for family in self._families():
            yield family.metric(self._progress.run)

    def _families(self) -> Iterator[Family]:
        yield from _progress(self._progress)
        yield from _last_step(self._progress.metrics)
        if self._progress.evaluations:
            yield _evaluation(self._progress.evaluations[-1])
        if (state := self._look()) is not None:
            yield Family("mars_queue_up", "Whether Redis answers", rows=[((), float(state.redis))])
            yield from _queues(state)
            yield from _services(state)


@dataclass(frozen=True)
class Family:
    """A metric of the run with a value for each combination of its labels."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    rows: Sequence[tuple[tuple[str, ...], float]] = ()
    kind: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily

    def metric(self, run: str) -> Metric:
        family = self.kind(self.name, self.text, labels=["run", *self.labels])
        for values, number in self.rows:
            family.add_metric([run, *values], number)
        return family


def prometheus_name(slash_name: str) -> str:
    """Of a metric of the last step, e.g. "clip_ratio/low" -> "mars_step_clip_ratio_low"."""
    head, slash, _ = slash_name.partition("/")
    if slash and head in BY_PART:
        return BY_PART[head][0]
    return f"mars_step_{slash_name.replace('/', '_')}"


def _progress(progress: Progress) -> Iterator[Family]:
    yield Family("mars_train_step", "Training steps done", rows=[((), progress.version.step)])
    yield Family("mars_train_planned_steps", "Training steps of the recipe", rows=[((), progress.steps)])
    yield Family("mars_train_incarnation", "Of the trainer", rows=[((), progress.version.incarnation)])
    text = "Unix time at which the last step ended, or the trainer began"
    yield Family("mars_train_last_step_timestamp_seconds", text, rows=[((), progress.last_step_at)])
    yield Family("mars_train_state", "1 for what the trainer does", ("state",), [((progress.state,), 1)])


def _last_step(metrics: Mapping[str, float]) -> Iterator[Family]:
    by_part: dict[str, list[tuple[tuple[str, ...], float]]] = {}
    for name, value in metrics.items():
        head, slash, part = name.partition("/")
        if slash and head in BY_PART:
            by_part.setdefault(head, []).append(((part,), value))
        else:
            yield Family(prometheus_name(name), f"{name} of the last step", rows=[((), value)])
    for head, rows in by_part.items():
        family, label = BY_PART[head]
        yield Family(family, f"{head} of the last step, by {label}", (label,), rows)


def _evaluation(evaluation: Mapping[str, Any]) -> Family:
    rows = []
    for dataset, result in evaluation["datasets"].items():
        scores = {"multi": result["multi"], "union": result["union"]}
        scores |= {f"mono/{source}": value for source, value in result["mono"].items()}
        rows += [((dataset, view), value) for view, value in scores.items()]
    return Family("mars_eval_score", "Last evaluation's accuracy or mean IoU", ("dataset", "view"), rows)


def _queues(state: RunState) -> Iterator[Family]:
    def family(name: str, text: str, value: Callable[[QueueState], float]) -> Family:
        return Family(name, text, ("stream",), [((stream,), value(queue)) for stream, queue in state.queues.items()])

    yield family("mars_queue_entries", "Entries, claimed ones too", lambda queue: queue.entries)
    yield family("mars_queue_claimed", "Entries in a consumer's hands", lambda queue: queue.claimed)
    yield family("mars_queue_oldest_seconds", "Age of the oldest entry", lambda queue: queue.oldest_s)


def _services(state: RunState) -> Iterator[Family]:
    labels = ("service", "name")
    rows = [((one.service, one.name), one) for one in state.services]
    yield Family("mars_service_silence_seconds", "Since its last heartbeat", labels, [(key, one.seen_s) for key, one in rows])
    yield Family("mars_service_groups_in_hand", "That it works on", labels, [(key, one.in_hand) for key, one in rows])
    restarts = [(key, one.starts - 1) for key, one in rows]
    text = "Starts of a process of that name after the first"
    yield Family("mars_service_restarts", text, labels, restarts, CounterMetricFamily)
    lags = [((one.name,), one.lag) for one in state.services if one.lag is not None]
    yield Family("mars_replica_lag_steps", "Steps by which the served policy is behind", ("name",), lags)
