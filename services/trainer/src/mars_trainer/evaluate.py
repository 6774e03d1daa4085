"""Evaluation on held-out samples: Multi, Mono per source, Union (method.md, paper section 4).

Greedy completions come through the same queue, replicas and reward service as training groups.
Every sample's result is kept as a line of JSON; all numbers are made from those lines.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mars_shared.contracts import Kind, PolicyVersion, Prompt, ReleasedEval, Score, ScoredGroup
from mars_shared.errors import InputError
from mars_shared.files import write_atomic
from mars_shared.telemetry import EventLog
from mars_trainer.algorithm.bootstrap import Interval, mean_interval
from mars_trainer.datasets import HeldOut
from mars_trainer.dispatch import PromptMaker
from mars_trainer.exchange import Answer, Death, Exchange

EvaluationKind = Literal["evaluation", "evaluated"]
"""Of a run on its way, or by `mars eval`, which changes nothing of the run: the event's name."""

EVALUATING_EVERY_S = 2.0
"""How often an evaluation under way says how far it is."""
CORRECT_IOU = 0.5
"""A grounding sample is correct above this mIoU (strictly), as in the paper's evaluation."""


class Result(BaseModel):
    """One completion's result: `value` is its accuracy or IoU; `released` what the released evaluation script says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    parsed: bool
    completion: str
    released: ReleasedEval | None = None


class SampleResult(BaseModel):
    """One held-out sample: what the policy answered with all sources and with each alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    prompt_id: str
    question: str
    truth: str | list[list[float]]
    metric: Literal["accuracy", "iou"]
    multi: Result
    mono: dict[str, Result]
    """By source."""

    @property
    def union(self) -> float:
        """The best single source's value: the paper's upper bound of reasoning from one source."""
        return max(result.value for result in self.mono.values())

    @property
    def results(self) -> tuple[Result, ...]:
        """Of all completions."""
        return self.multi, *self.mono.values()


@dataclass(frozen=True)
class Evaluation:
    """Means over all samples, unparseable ones included, as fractions.

    `multi`: all sources. `mono`: one source alone, by name. `union`: per sample the best single
    source. The metric is accuracy for text truths and mIoU for boxes; `correct` is the share of
    samples that Multi answers right: text that matches, boxes with more than CORRECT_IOU.
    """

    samples: int
    multi: float
    mono: Mapping[str, float]
    union: float
    parsed: float
    correct: float
    intervals: Mapping[str, Interval]
    """95 % bootstrap intervals of "multi", "mono/<source>", "union" and, paired by sample, "multi_minus_union"."""

    @property
    def multi_minus_union(self) -> float:
        return self.multi - self.union

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "multi_minus_union": self.multi_minus_union}


def result_of(scored: ScoredGroup, dataset: str) -> SampleResult:
    """An evaluation group as a result.

    Raises:
        KeyError: a score has neither accuracy nor IoU.
    """
    prompt, mono = scored.group.prompt, {}
    said = scored.released or [None] * len(scored.scores)
    for completion, score, released in zip(scored.group.completions, scored.scores, said, strict=True):
        result = Result(value=metric_of(score), parsed=score.parsed, completion=completion.text, released=released)
        if completion.kind is Kind.MULTI:
            multi = result
        else:
            assert completion.source is not None
            mono[completion.source] = result
    truth = prompt.truth
    assert truth is not None
    return SampleResult(
        dataset=dataset,
        prompt_id=prompt.prompt_id,
        question=prompt.question,
        truth=truth.text if truth.kind == "text" else [list(box) for box in truth.boxes],
        metric="accuracy" if truth.kind == "text" else "iou",
        multi=multi,
        mono=mono,
    )


def metric_of(score: Score) -> float:
    """What an evaluation averages: the accuracy or the IoU of a completion, without its format reward.

    Raises:
        KeyError: the score has neither part.
    """
    return score.parts["accuracy"] if "accuracy" in score.parts else score.parts["iou"]


def summarise(results: Sequence[SampleResult]) -> Evaluation:
    """Averages over results. A sample counts for the sources it has.

    Raises:
        InputError: no results.
    """
    if not results:
        raise InputError("evaluation: not one sample was answered; the dead letters in the run's events say why")
    multi, union = [result.multi.value for result in results], [result.union for result in results]
    series = {"multi": multi, "union": union, "multi_minus_union": [m - u for m, u in zip(multi, union, strict=True)]}
    names = dict.fromkeys(name for result in results for name in result.mono)
    mono = {name: [result.mono[name].value for result in results if name in result.mono] for name in names}
    series |= {f"mono/{name}": values for name, values in mono.items()}
    return Evaluation(
        intervals={name: mean_interval(values) for name, values in series.items()},
        samples=len(results),
        multi=_mean(multi),
        mono={name: _mean(values) for name, values in mono.items()},
        union=_mean(union),
        parsed=_mean([answer.parsed for result in results for answer in result.results]),
        correct=_mean([result.multi.value > CORRECT_IOU for result in results]),
    )


def by_dataset(results: Iterable[SampleResult]) -> dict[str, list[SampleResult]]:
    """Results by their dataset, in order of appearance."""
    groups: dict[str, list[SampleResult]] = {}
    for result in results:
        groups.setdefault(result.dataset, []).append(result)
    return groups


def summarise_by_dataset(results: Sequence[SampleResult]) -> dict[str, Any]:
    """The evaluation of all samples together, and under `datasets` that of each dataset."""
    datasets = {name: summarise(part).as_dict() for name, part in by_dataset(results).items()}
    return {**summarise(results).as_dict(), "datasets": datasets}


async def evaluate(
    exchange: Exchange,
    maker: PromptMaker,
    held_out: HeldOut,
    version: PolicyVersion,
    on_dead: Callable[[str], None],
    on_progress: Callable[[int], None] = lambda answered: None,
) -> tuple[list[SampleResult], list[Answer]]:
    """Ask every sample of a version and wait for all. Samples that die are left out and reported to `on_dead`."""
    dataset_of: dict[str, str] = {}

    def prompts() -> Iterator[Prompt]:
        places = ((name, samples, row) for name, samples in held_out.items() for row in range(len(samples)))
        for index, (name, samples, row) in enumerate(places):
            try:
                prompt = maker.evaluation(samples[row], row=index, version=version)
            except InputError as error:
                on_dead(str(error))
                continue
            dataset_of[prompt.task_id] = name
            yield prompt

    def skip(death: Death) -> None:
        on_dead(f"{death.prompt.prompt_id}: {death.letter.reason}")

    answers = await exchange.gather(await asyncio.to_thread(list, prompts()), on_death=skip, on_progress=on_progress)
    await exchange.acknowledge([answer.claim for answer in answers])
    return [result_of(answer.scored, dataset_of[answer.scored.group.group_id]) for answer in answers], answers


def progress_events(events: EventLog, step: int, samples: int) -> Callable[[int], None]:
    """Writes down how far an evaluation is, at most every EVALUATING_EVERY_S; for `evaluate`'s `on_progress`."""
    next_at = time.monotonic()

    def on_progress(answered: int) -> None:
        nonlocal next_at
        now = time.monotonic()
        if now >= next_at:
            next_at = now + EVALUATING_EVERY_S
            events.write("evaluating", step=step, done=answered, samples=samples)

    return on_progress


def results_name(kind: EvaluationKind, step: int) -> str:
    """File of an evaluation's results, in the run's evaluations folder."""
    return f"step_{step}.jsonl" if kind == "evaluation" else f"eval_step_{step}.jsonl"


def write_results(path: Path, results: Iterable[SampleResult]) -> None:
    """One line of JSON for each sample; a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{result.model_dump_json()}\n" for result in results).encode())


def read_results(path: Path) -> list[SampleResult]:
    """The results that `write_results` wrote."""
    return [SampleResult.model_validate_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
