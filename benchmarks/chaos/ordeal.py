"""The two runs of a comparison: one left alone, one that suffers a plan of faults."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos.inflict import Blow, hold_back, inflict
from chaos.plan import Fault, armed
from chaos.run import Run, StalledError, observed_run
from chaos.verdict import Outcome, Verdict, outcome_of
from mars_shared.supervisor import ServiceFailedError

Say = Callable[[str], None]
SPARE_STEPS = 6
"""Steps at the end by which every fault has come."""


def undisturbed(folder: Path, *, steps: int, seed: int, checkpoint_every: int = 3, say: Say = print) -> Outcome:
    """One replica, nothing fails."""
    began = time.monotonic()
    with observed_run(folder, replicas=1, steps=steps, seed=seed, checkpoint_every=checkpoint_every, say=say) as run:
        while not run.finished:
            run.poll()
        prompts_per_step = run.recipe.train.prompts_per_step
    return outcome_of(folder, steps=steps, prompts_per_step=prompts_per_step, wall_s=time.monotonic() - began)


def disturbed(
    folder: Path, faults: Sequence[Fault], reference: Outcome, *, seed: int, replicas: int = 2, say: Say = print
) -> Verdict:
    """Several replicas under a plan of faults, judged by the undisturbed run."""
    hold_back(folder, [fault.point for fault in faults if fault.point is not None])
    ordeal = Ordeal(faults, say)
    failure = None
    began = time.monotonic()
    try:
        with observed_run(folder, replicas=replicas, steps=reference.steps, seed=seed, faults=armed(faults), say=say) as run:
            ordeal.go_through(run)
    except (ServiceFailedError, StalledError) as error:
        failure = str(error)
    wall_s = time.monotonic() - began
    outcome = outcome_of(folder, steps=reference.steps, prompts_per_step=reference.prompts_per_step, wall_s=wall_s)
    return Verdict(
        reference,
        outcome,
        failure,
        planned=dict(Counter(fault.kind for fault in faults)),
        inflicted=dict(ordeal.inflicted),
        effective=dict(ordeal.effective),
    )


@dataclass
class Ordeal:
    """Inflicts a plan's faults one after another, spread over the run.

    A fault comes when the run has come as far as its share of the faults, and has made progress (a group was
    scored) since the last one; then a delay passes, so that it lands inside a step. It is the first of the plan
    whose victim can suffer it: while one service starts again, others are hit.
    """

    faults: Sequence[Fault]
    say: Say
    inflicted: Counter[str] = field(default_factory=Counter)
    effective: Counter[str] = field(default_factory=Counter)

    def go_through(self, run: Run) -> None:
        """Until the run has finished, all faults come or not."""
        waiting, before = list(self.faults), run.progress
        while not run.finished:
            run.poll()
            if waiting and self._is_time(run, before) and (fault := self._inflict_one(run, waiting)):
                waiting.remove(fault)
                before = run.progress

    def _is_time(self, run: Run, before: object) -> bool:
        due = self.inflicted.total() * max(run.recipe.train.steps - SPARE_STEPS, 1) // len(self.faults)
        return run.step > 0 and run.furthest_step >= due and run.progress != before

    def _inflict_one(self, run: Run, waiting: Sequence[Fault]) -> Fault | None:
        """The first that is possible; None if not one is, or the run ended meanwhile."""
        after = time.monotonic() + waiting[0].delay_s
        run.wait_for(lambda: time.monotonic() > after, 2 * waiting[0].delay_s)
        for fault in waiting:
            if run.finished:
                return None
            if blow := inflict(run, fault):
                self._note(run, fault, blow)
                return fault
        return None

    def _note(self, run: Run, fault: Fault, blow: Blow) -> None:
        self.inflicted[fault.kind] += 1
        self.effective[fault.kind] += blow.effective
        number = self.inflicted.total()
        at = f"{time.monotonic() - run.started:7.1f} s  step {run.step:>3}/{run.recipe.train.steps}"
        self.say(f"{number:>3}. {at}  {fault.kind}: {blow.target}{'' if blow.effective else '  WITHOUT EFFECT'}")
