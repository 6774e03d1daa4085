"""Writes down every scored group, with what it was credited with, for people to look at."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from mars_shared.contracts import Kind, ScoredGroup
from mars_shared.logs import logged_group
from mars_shared.records.groups import AnswerRecord, GroupRecord, Occasion, Statistics, group_facts
from mars_shared.records.segments import SegmentWriter
from mars_trainer.batch import Batch
from mars_trainer.credit import Credit

logger = logging.getLogger(__name__)

_FATES: dict[tuple[Occasion, bool], str] = {
    ("step", True): "trained on in",
    ("step", False): "left out, since it can teach nothing, of",
    ("evaluation", False): "counted in the evaluation at",
}


class GroupLog:
    """Appends a `GroupRecord` a group to the segments in a folder."""

    def __init__(self, folder: Path) -> None:
        self._lines = SegmentWriter(folder, group_facts)

    def step(self, step: int, batch: Batch) -> None:
        """All groups of a training step, those without signal that were replaced included."""
        trained = {judged.answer.scored.group.group_id for judged in batch.kept}
        for judged in batch.all:
            scored = judged.answer.scored
            self._write("step", step, scored, judged.credit, trained=scored.group.group_id in trained)

    def evaluation(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """All groups of an evaluation."""
        for scored in groups:
            self._write("evaluation", step, scored, None, trained=False)

    def _write(self, occasion: Occasion, step: int, scored: ScoredGroup, credit: Credit | None, *, trained: bool) -> None:
        record = record_of(occasion, step, scored, credit, trained=trained)
        self._lines.append(record.model_dump(mode="json"))
        with logged_group(record.task_id):
            logger.info("%s step %d", _FATES[occasion, trained], step)


def record_of(occasion: Occasion, step: int, scored: ScoredGroup, credit: Credit | None, *, trained: bool) -> GroupRecord:
    """What is kept of a group; `credit` is None for evaluations, whose gain is that of the rewards as they are."""
    group = scored.group
    gain, gain_by_source = _gains(scored) if credit is None else (credit.advantages.gain, dict(credit.advantages.gain_by_source))
    return GroupRecord(
        time=time.time(),
        occasion=occasion,
        step=step,
        task_id=group.prompt.task_id,
        prompt_id=group.prompt.prompt_id,
        question=group.prompt.question,
        sources=group.prompt.sources,
        truth=group.prompt.truth,
        answers=_answers(scored, credit),
        statistics=None if credit is None else _statistics(credit, trained=trained),
        gain=gain,
        gain_by_source=gain_by_source,
        policy_version=group.policy_version,
        replica=group.replica,
        generation_s=group.generation_s,
        reward_s=scored.reward_s,
    )


def _answers(scored: ScoredGroup, credit: Credit | None) -> tuple[AnswerRecord, ...]:
    advantages = iter(() if credit is None else credit.advantages.advantages_G)
    return tuple(
        AnswerRecord(
            kind=completion.kind,
            source=completion.source,
            index=completion.index,
            text=completion.text,
            tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            reward=score.reward,
            parts=score.parts,
            parsed=score.parsed,
            boxes=score.boxes,
            advantage=next(advantages, None) if completion.kind is Kind.MULTI else None,
        )
        for completion, score in zip(scored.group.completions, scored.scores, strict=True)
    )


def _statistics(credit: Credit, *, trained: bool) -> Statistics:
    found = credit.advantages
    return Statistics(pool_mean=found.pool_mean, pool_std=found.pool_std, signal=credit.signal, trained=trained)


def _gains(scored: ScoredGroup) -> tuple[float | None, dict[str, float]]:
    multi = fmean(scored.rewards(Kind.MULTI))
    mono = scored.rewards(Kind.MONO)
    names = [source.name for source in scored.group.prompt.sources] if mono else []
    by_source = {name: multi - fmean(scored.rewards(Kind.MONO, name)) for name in names}
    return (multi - fmean(mono) if mono else None), by_source
