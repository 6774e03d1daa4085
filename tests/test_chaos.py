"""A run whose services are killed one after another, and whose Redis forgets everything, ends like an undisturbed one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.ordeal import disturbed, undisturbed
from chaos.plan import FAULT_POINT, FULL_DISK, FULL_POINTS, KINDS, Fault, armed, plan
from chaos.verdict import Verdict

SUFFERED = ("kill replica", "flush Redis", "kill reward", "kill trainer", "restart Redis")
STEPS, SEED = 30, 3


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verdict]:
    folder = tmp_path_factory.mktemp("chaos")
    reference = undisturbed(folder / "undisturbed", steps=STEPS, seed=SEED)
    faults = [Fault(kind, delay_s=0.1 * number, pick=0.5) for number, kind in enumerate(SUFFERED)]
    yield disturbed(folder / "disturbed", faults, reference, seed=SEED)


@pytest.mark.engine
def test_every_service_was_killed_and_redis_emptied(verdict: Verdict) -> None:
    assert verdict.effective == dict.fromkeys(SUFFERED, 1)


@pytest.mark.engine
def test_the_weights_are_those_of_the_undisturbed_run(verdict: Verdict) -> None:
    assert verdict.failure is None
    assert verdict.undisturbed.weights is not None
    assert verdict.hash_equal, verdict.first_difference


@pytest.mark.engine
def test_no_group_is_lost_and_none_is_trained_twice(verdict: Verdict) -> None:
    run = verdict.disturbed
    assert run.ledger is not None
    assert [len(groups) for groups in run.ledger.consumed] == [3] * STEPS
    assert (run.lost, run.missing, run.twice, verdict.dead_letters) == ([], 0, [], 0)


@pytest.mark.engine
def test_no_process_outlives_the_run(verdict: Verdict) -> None:
    assert verdict.disturbed.orphans == verdict.undisturbed.orphans == ()


def test_a_plan_of_fifty_faults_has_every_kind_at_least_twice() -> None:
    faults = plan(50, seed=0)
    assert len(faults) == 50
    assert all(sum(fault.kind == kind for fault in faults) >= 2 for kind in KINDS)


def test_a_plan_is_the_same_for_the_same_seed_alone() -> None:
    assert plan(20, seed=1) == plan(20, seed=1) != plan(20, seed=2)


def test_a_full_disk_is_where_the_trainer_writes_and_other_points_kill() -> None:
    faults = plan(50, seed=4)
    points = {kind: {fault.point for fault in faults if fault.kind == kind} for kind in (FULL_DISK, FAULT_POINT)}
    assert points[FULL_DISK] == set(FULL_POINTS) and not points[FAULT_POINT] & set(FULL_POINTS)
    entries = armed(faults).split(",")
    assert set(entries) == {f"{point}:full" for point in FULL_POINTS} | points[FAULT_POINT]


def test_what_a_run_lost_or_trained_twice_is_found(tmp_path: Path) -> None:
    from chaos.verdict import outcome_of
    from mars_shared.contracts import PolicyVersion
    from mars_trainer.checkpoint import Ledger

    ledger = Ledger(
        run="chaos",
        model="m",
        version=PolicyVersion(incarnation=2, step=2),
        next_dispatch_index=7,
        consumed=((0, 1), (1, 3)),
        filtered=(4,),
        dead=(5,),
    )
    folder = tmp_path / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(ledger.model_dump_json())
    outcome = outcome_of(tmp_path, steps=3, prompts_per_step=2, wall_s=1.0)
    # 2 and 6 are nowhere; three steps of two groups are 6, and 4 were trained on.
    assert (outcome.lost, outcome.missing, outcome.twice) == ([2, 6], 2, [1])
    assert outcome.weights is None
