"""Groups without signal are replaced, within bounds; a step that stays short says so and never ends the run.

The exchange, the learner and the publisher are doubles: what is tested is the loop between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from loop_doubles import Pupil, Replies, Shelf, make_run
from mars_shared.contracts import PolicyVersion
from mars_shared.errors import InputError
from mars_shared.queue import Claim
from mars_shared.records.groups import read_groups
from mars_shared.telemetry import read_events
from mars_trainer.datasets import RunData, Sample
from mars_trainer.dispatch import place_of
from mars_trainer.evaluate import read_results
from mars_trainer.exchange import Retry


async def test_groups_without_signal_are_replaced_by_the_next_prompts(tmp_path: Path) -> None:
    replies, pupil, shelf = Replies(telling={0, 2, 4, 5, 6, 7}), Pupil(), Shelf()
    run = make_run(tmp_path, replies, pupil, shelf)
    await run._step()
    # 0 and 2 tell something; 3 is asked in place of 1 and tells nothing; 4 in place of 3 does.
    assert replies.asked == [[0, 1, 2], [3], [4]]
    assert pupil.steps == [[0, 2, 4]]
    await run._step()
    assert replies.asked[3:] == [[5, 6, 7]] and pupil.steps[1] == [5, 6, 7]
    assert run.ledger.consumed == ((0, 2, 4), (5, 6, 7)) and run.ledger.filtered == (1, 3)
    # What is not trained on leaves the stream at once, the rest with the checkpoint.
    assert replies.acknowledged == [1, 3, 0, 2, 4, 5, 6, 7]
    steps = read_events(tmp_path / "events.jsonl", "step")
    assert [(s["metrics"]["groups"], s["metrics"]["groups/trained"]) for s in steps] == [(5, 3), (3, 3)]
    assert read_events(tmp_path / "events.jsonl", "short") == []


async def test_after_the_last_attempt_the_step_trains_on_what_there_is_and_says_so(tmp_path: Path) -> None:
    replies, pupil, shelf = Replies(telling={1, 5}), Pupil(), Shelf()
    run = make_run(tmp_path, replies, pupil, shelf)
    await run._step()
    # Three times three groups are looked at: 0 to 8.
    assert replies.asked == [[0, 1, 2], [3, 4], [5, 6], [7], [8]]
    assert pupil.steps == [[1, 5]]
    (event,) = read_events(tmp_path / "events.jsonl", "short")
    assert {key: event[key] for key in ("step", "kept", "wanted", "without_signal")} == {
        "step": 1,
        "kept": 2,
        "wanted": 3,
        "without_signal": 7,
    }


async def test_an_empty_step_is_skipped_and_said_and_the_run_goes_on(tmp_path: Path) -> None:
    replies, pupil, shelf = Replies(telling=set(range(9, 99))), Pupil(), Shelf()
    run = make_run(tmp_path, replies, pupil, shelf)
    await run._step()
    assert replies.asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and pupil.steps == [[]]
    (event,) = read_events(tmp_path / "events.jsonl", "skipped")
    assert (event["step"], event["kept"], event["without_signal"]) == (1, 0, 9)
    await run._step()
    assert pupil.steps == [[], [9, 10, 11]]
    assert [str(version) for version in shelf.versions] == ["1.1", "1.2"]
    assert run.ledger.consumed == ((), (9, 10, 11)) and run.ledger.filtered == tuple(range(9))


async def test_the_reward_metric_is_of_all_groups_filtered_ones_included(tmp_path: Path) -> None:
    run = make_run(tmp_path, Replies(telling={0, 1, 3}), Pupil(), Shelf())
    await run._step()
    # Multi-source rewards: (1, 0) of groups 0, 1 and 3, (1, 1) of group 2: 5 of 8.
    (step,) = read_events(tmp_path / "events.jsonl", "step")
    assert step["metrics"]["reward"] == pytest.approx(5 / 8)
    assert step["metrics"]["no_signal_rate"] == pytest.approx(1 / 4)


async def test_without_dynamic_sampling_every_group_is_trained_on(tmp_path: Path) -> None:
    replies, pupil, shelf = Replies(telling={0}), Pupil(), Shelf()
    run = make_run(tmp_path, replies, pupil, shelf, dynamic_sampling="none")
    await run._step()
    assert replies.asked == [[0, 1, 2]] and pupil.steps == [[0, 1, 2]]
    assert run.ledger.consumed == ((0, 1, 2),) and run.ledger.filtered == ()


async def test_a_dead_prompt_is_replaced_by_the_next_one_and_counted(tmp_path: Path) -> None:
    replies, pupil = Replies(telling=range(99), deadly={1, 3}), Pupil()
    run = make_run(tmp_path, replies, pupil, Shelf())
    await run._step()
    assert replies.asked == [[0, 1, 2], [3], [4]] and pupil.steps == [[0, 2, 4]]
    assert run.ledger.dead == (1, 3) and run.ledger.consumed == ((0, 2, 4),)
    assert [event["task_id"] for event in read_events(tmp_path / "events.jsonl", "dead")] == ["train-00000001", "train-00000003"]


async def test_where_every_prompt_dies_the_run_ends_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, Replies(telling=(), deadly=range(999)), Pupil(), Shelf())
    # Twice the batch and eight more are replaced.
    with pytest.raises(InputError, match="step 1: every prompt died, 14 replacements too"):
        await run._step()


async def test_a_retried_prompt_takes_the_next_place_and_is_acknowledged_with_the_checkpoint(tmp_path: Path) -> None:
    replies, shelf = Replies(telling=range(99)), Shelf()
    run = make_run(tmp_path, replies, Pupil(), shelf)
    old = run.prompts.training(run.data.train[5], epoch=0, dispatch_index=77, version=PolicyVersion(incarnation=0, step=9))
    run.progress.dead.append(77)
    replies.retries = [Retry(Claim("retries", "500", "c", 1, b""), old)]
    await run._step()
    assert replies.asked == [[0, 1, 2]]
    first = read_groups(tmp_path / "groups")[0]
    assert (first.prompt_id, first.task_id) == (old.prompt_id, "train-00000000")
    assert replies.acknowledged == [0, 1, 2, 500]


class Damaged(Sequence[Sample]):
    """Samples of which some cannot be opened."""

    def __init__(self, samples: Sequence[Sample], damaged: Iterable[int]) -> None:
        self.samples, self.damaged = samples, set(damaged)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: Any) -> Any:
        if row in self.damaged:
            raise InputError(f"questions.jsonl line {row + 1}: broken")
        return self.samples[row]


async def test_a_sample_that_cannot_be_opened_is_passed_over_and_said(tmp_path: Path) -> None:
    replies = Replies(telling=range(99))
    run = make_run(tmp_path, replies, Pupil(), Shelf())
    second = place_of(1, rows=6, seed=run.recipe.run.seed).row
    run.collector.samples = Damaged(run.data.train[:6], {second})
    await run._step()
    assert replies.asked == [[0, 2, 3]] and run.ledger.dead == (1,)
    assert replies.reported == [(1, f"questions.jsonl line {second + 1}: broken")]
    assert [event["reason"] for event in read_events(tmp_path / "events.jsonl", "dead")] == [
        f"questions.jsonl line {second + 1}: broken"
    ]


async def test_a_training_set_of_broken_samples_ends_the_run_and_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path, Replies(telling=()), Pupil(), Shelf())
    run.collector.samples = Damaged(run.data.train[:4], range(4))
    with pytest.raises(InputError, match="none of the 4 training samples can be opened"):
        await run._step()


async def test_an_evaluation_goes_on_without_a_sample_that_cannot_be_opened(tmp_path: Path) -> None:
    replies = Replies(telling=())
    run = make_run(tmp_path, replies, Pupil(), Shelf())
    run.evaluation = cast(Any, replies)
    samples = run.data.train[:3]
    run.data = RunData(samples, {"a": Damaged(samples, {0}), "b": Damaged(samples[:1], ())})
    await run._evaluate()
    (event,) = read_events(tmp_path / "events.jsonl", "evaluation")
    assert event["samples"] == 3 and {name: entry["samples"] for name, entry in event["datasets"].items()} == {"a": 2, "b": 1}
    assert [event["reason"] for event in read_events(tmp_path / "events.jsonl", "dead")] == ["questions.jsonl line 1: broken"]
    assert event["asked"] == {"a": 3, "b": 1} and event["results"] == "step_0.jsonl"
    assert [result.dataset for result in read_results(tmp_path / "evaluations" / "step_0.jsonl")] == ["a", "a", "b"]


async def test_evaluating_a_run_afterwards_changes_nothing_of_it(tmp_path: Path) -> None:
    replies = Replies(telling=())
    run = make_run(tmp_path, replies, Pupil(), Shelf())
    run.evaluation, run.data = cast(Any, replies), RunData((), {"other": run.data.train[:2]})
    await run.evaluate_newest()
    assert not read_events(tmp_path / "events.jsonl", "evaluation") and not read_events(tmp_path / "events.jsonl", "started")
    (event,) = read_events(tmp_path / "events.jsonl", "evaluated")
    assert (event["step"], event["samples"], event["results"]) == (0, 2, "eval_step_0.jsonl")
    assert not read_groups(tmp_path / "groups")


async def test_a_run_that_goes_on_from_a_checkpoint_says_so_and_a_new_one_does_not(tmp_path: Path) -> None:
    evaluation = cast(Any, Replies(telling=()))
    first = make_run(tmp_path, Replies(telling=range(99)), Pupil(), Shelf(), evaluation=evaluation)
    await first._begin()
    assert not list(read_events(tmp_path / "events.jsonl", "resumed"))
    assert [event["incarnation"] for event in read_events(tmp_path / "events.jsonl", "started")] == [1]
    await first._step()
    again = make_run(tmp_path, Replies(telling=range(99)), Pupil(), Shelf(), evaluation=evaluation, checkpoint=first.ledger)
    await again._begin()
    (event,) = read_events(tmp_path / "events.jsonl", "resumed")
    assert (event["step"], event["incarnation"]) == (1, 2)
    assert [event["incarnation"] for event in read_events(tmp_path / "events.jsonl", "started")] == [1, 2]
