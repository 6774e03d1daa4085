"""Evaluation on held-out samples: Multi, Mono per source, Union (method.md, paper section 4).

Greedy completions come through the same queue, replicas and reward service as training groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mars_shared.contracts import Kind, PolicyVersion, Score, ScoredGroup
from mars_shared.errors import InputError
from mars_trainer.algorithm.bootstrap import Interval, mean_interval
from mars_trainer.datasets.base import Sample
from mars_trainer.dispatch import PromptMaker
from mars_trainer.exchange import Answer, Exchange


@dataclass(frozen=True)
class Evaluation:
    """Means over all samples, unparseable ones included, as fractions.

    `multi`: all sources. `mono`: one source alone, by name. `union`: per sample the best single
    source. The metric is accuracy for text truths and mIoU for boxes.
    """

    samples: int
    multi: float
    mono: Mapping[str, float]
    union: float
    parsed: float
    intervals: Mapping[str, Interval]
    """95 % bootstrap intervals of "multi", "mono/<source>", "union" and, paired by sample, "multi_minus_union"."""

    @property
    def multi_minus_union(self) -> float:
        return self.multi - self.union

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "multi_minus_union": self.multi_minus_union}


def metric_of(score: Score) -> float:
    """What an evaluation averages: the accuracy or the IoU of a completion, without its format reward.

    Raises:
        KeyError: the score has neither part.
    """
    return score.parts["accuracy"] if "accuracy" in score.parts else score.parts["iou"]


def summarise(groups: Sequence[ScoredGroup]) -> Evaluation:
    """Averages over scored evaluation groups. A sample counts for the sources it has.

    Raises:
        InputError: no groups.
    """
    if not groups:
        raise InputError("evaluation: not one sample was answered; the dead letters in the run's events say why")
    multi: list[float] = []
    union: list[float] = []
    mono: dict[str, list[float]] = {}
    parsed: list[bool] = []
    for scored in groups:
        best = -math.inf
        for completion, score in zip(scored.group.completions, scored.scores, strict=True):
            value = metric_of(score)
            parsed.append(score.parsed)
            if completion.kind is Kind.MULTI:
                multi.append(value)
            else:
                assert completion.source is not None
                mono.setdefault(completion.source, []).append(value)
                best = max(best, value)
        union.append(best)
    series = {"multi": multi, "union": union, "multi_minus_union": [m - u for m, u in zip(multi, union, strict=True)]}
    series |= {f"mono/{name}": values for name, values in mono.items()}
    return Evaluation(
        intervals={name: mean_interval(values) for name, values in series.items()},
        samples=len(groups),
        multi=_mean(multi),
        mono={name: _mean(values) for name, values in mono.items()},
        union=_mean(union),
        parsed=_mean(parsed),
    )


async def evaluate(
    exchange: Exchange,
    maker: PromptMaker,
    samples: Sequence[Sample],
    version: PolicyVersion,
    on_dead: Callable[[str], None],
) -> tuple[Evaluation, list[Answer]]:
    """Ask every sample of a version, wait for all, summarise. Samples that die are left out and reported to `on_dead`."""
    prompts = [maker.evaluation(sample, row=row, version=version) for row, sample in enumerate(samples)]

    def skip(prompt: Any, letter: Any) -> None:
        on_dead(f"{prompt.prompt_id}: {letter.reason}")

    answers = await exchange.gather(prompts, replace=skip)
    await exchange.acknowledge(answers)
    return summarise([answer.scored for answer in answers]), answers


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
