"""What is kept of a group: what it was asked, what it answered, what came of it; by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas
import pytest

from builders import make_group, make_prompt, make_score, make_scored, sampling
from log_lines import logged
from mars_shared.contracts import Kind, Purpose, ScoredGroup
from mars_shared.records.groups import group_facts, read_groups
from mars_shared.records.segments import SegmentReader, segment_path
from mars_trainer.algorithm.advantages import mars_advantages
from mars_trainer.batch import Batch, Judged
from mars_trainer.credit import Credit
from mars_trainer.group_log import GroupLog

MULTI, VISIBLE, INFRARED = (1.5, 0.5), 1.5, 0.5


def scored(index: int, *rewards: float) -> ScoredGroup:
    prompt = make_prompt(index, sources=("visible", "infrared"), spec=sampling(2, 1))
    return make_scored(make_group(prompt), [make_score(reward) for reward in rewards])


def judged(group: ScoredGroup, *, signal: bool = True) -> Judged:
    found = mars_advantages(group.rewards(Kind.MULTI), {name: group.rewards(Kind.MONO, name) for name in ("visible", "infrared")})
    return Judged(cast(Any, SimpleNamespace(scored=group)), Credit(found, (True, True), (0.0, 0.0), signal=signal))


def test_a_step_keeps_every_group_with_its_advantages_and_gains(tmp_path: Path) -> None:
    told, silent = scored(0, *MULTI, VISIBLE, INFRARED), scored(1, 0.5, 0.5, 0.5, 0.5)
    GroupLog(tmp_path).step(7, Batch(1, (judged(told),), (judged(silent, signal=False),)))
    first, second = read_groups(tmp_path)
    # The pool is 1.5, 0.5, 1.5, 0.5: mu = 1, sigma = sqrt(4 * 0.25 / 3) = 0.57735.
    assert first.statistics is not None and second.statistics is not None
    assert (first.statistics.pool_mean, first.statistics.pool_std) == (1.0, pytest.approx(0.57735, abs=1e-5))
    advantages = [answer.advantage for answer in first.answers]
    assert advantages == [pytest.approx(0.86602, abs=1e-5), pytest.approx(-0.86602, abs=1e-5), None, None]
    # Multi 1, visible 1.5, infrared 0.5.
    assert (first.gain, first.gain_by_source) == (0.0, {"visible": -0.5, "infrared": 0.5})
    assert [(group.statistics.signal, group.statistics.trained) for group in (first, second) if group.statistics] == [
        (True, True),
        (False, False),
    ]
    assert [answer.text for answer in first.answers] == [completion.text for completion in told.group.completions]


def test_an_evaluation_keeps_every_group_without_advantages(tmp_path: Path) -> None:
    prompt = make_prompt(purpose=Purpose.EVAL, sources=("visible", "infrared"), spec=sampling(1, 1, greedy=True))
    group = make_scored(make_group(prompt), [make_score(1.5), make_score(1.5), make_score(0.5)])
    GroupLog(tmp_path).evaluation(3, [group])
    (kept,) = read_groups(tmp_path)
    assert kept.statistics is None and {answer.advantage for answer in kept.answers} == {None}
    assert (kept.gain, kept.gain_by_source) == (0.5, {"visible": 0.0, "infrared": 1.0})
    assert kept.name == f"eval-3-{prompt.prompt_id}"


def test_facts_are_what_filters_need(tmp_path: Path) -> None:
    GroupLog(tmp_path).step(7, Batch(1, (judged(scored(0, *MULTI, VISIBLE, INFRARED)),), ()))
    (line,) = SegmentReader(tmp_path, group_facts).refresh()
    facts = dict(line.facts)
    assert (facts["step"], facts["reward"], facts["gain"], facts["losing_to"], facts["signal"]) == (
        7,
        1.0,
        0.0,
        ["visible"],
        True,
    )
    assert facts["sources"] == ["visible", "infrared"] and facts["prompt_id"].startswith(facts["dataset"])


def test_what_a_restart_repeats_counts_as_done_last(tmp_path: Path) -> None:
    for rewards in ((0.5,) * 4, (*MULTI, VISIBLE, INFRARED)):
        GroupLog(tmp_path).step(7, Batch(1, (judged(scored(0, *rewards)),), ()))
    assert [group.answers[0].reward for group in read_groups(tmp_path)] == [1.5]


def test_pandas_reads_a_segment(tmp_path: Path) -> None:
    GroupLog(tmp_path).step(7, Batch(1, (judged(scored(0, *MULTI, VISIBLE, INFRARED)),), ()))
    frame = pandas.read_json(segment_path(tmp_path, 1), lines=True)
    assert frame["gain"].tolist() == [0.0] and frame["step"].tolist() == [7]


def test_the_log_says_what_became_of_each_group(tmp_path: Path) -> None:
    told, silent = scored(0, *MULTI, VISIBLE, INFRARED), scored(1, 0.5, 0.5, 0.5, 0.5)
    with logged() as lines:
        GroupLog(tmp_path).step(7, Batch(1, (judged(told),), (judged(silent, signal=False),)))
        GroupLog(tmp_path).evaluation(7, [scored(2, *MULTI, VISIBLE, INFRARED)])
    assert lines.of("train-00000000") == ["trained on in step 7"]
    assert lines.of("train-00000001") == ["left out, since it can teach nothing, of step 7"]
    assert lines.of("train-00000002") == ["counted in the evaluation at step 7"]
