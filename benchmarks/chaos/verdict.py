"""Judges a run that suffered faults by an undisturbed one of the same recipe and seed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from chaos.run import processes_of
from mars_shared.telemetry import by_step, read_events
from mars_trainer.checkpoint import Ledger

ORPHANS_S = 10.0
"""Within this time after a stack's end its last process must be gone."""


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    `weights`: hash of the final policy, None if the run did not finish. `training_s`: from the begin of
    its first step to the end of its last, restarts and repeated steps included.
    """

    steps: int
    prompts_per_step: int
    ledger: Ledger | None
    weights: str | None
    training_s: float
    wall_s: float
    step_events: Sequence[dict[str, Any]]
    dead: frozenset[str]
    """Prompts that the events say are dead."""
    orphans: tuple[str, ...] = ()

    @property
    def indices(self) -> Counter[int]:
        """How often each dispatch index was trained on."""
        return Counter(chain.from_iterable(self.ledger.consumed)) if self.ledger else Counter()

    @property
    def lost(self) -> list[int]:
        """Dispatch indices of which nobody knows what became."""
        if self.ledger is None:
            return []
        known = {*self.indices, *self.ledger.filtered, *self.ledger.dead}
        known |= {prompt.dispatch_index for prompt in self.ledger.dispatched}
        return [index for index in range(self.ledger.next_dispatch_index) if index not in known]

    @property
    def missing(self) -> int:
        """Groups that the steps did without."""
        trained = sum(self.indices.values())
        return max(self.steps * self.prompts_per_step - trained, 0)

    @property
    def twice(self) -> list[int]:
        return sorted(index for index, times in self.indices.items() if times > 1)


def outcome_of(folder: Path, *, steps: int, prompts_per_step: int, wall_s: float) -> Outcome:
    """Read a run's folder after its end; orphans are looked for, named and killed."""
    events = read_events(folder / "events.jsonl")
    step_events = by_step(events, "step")
    finished = [event for event in events if event["event"] == "finished"]
    windows = [event["window"] for event in events if event["event"] == "step"]
    return Outcome(
        steps=steps,
        prompts_per_step=prompts_per_step,
        ledger=_newest_ledger(folder / "checkpoints"),
        weights=finished[-1]["weights"] if finished else None,
        training_s=windows[-1][1] - windows[0][0] if windows else 0.0,
        wall_s=wall_s,
        step_events=step_events,
        dead=frozenset(event.get("task_id", event["reason"]) for event in events if event["event"] == "dead"),
        orphans=tuple(_end_orphans(folder)),
    )


def _newest_ledger(checkpoints: Path) -> Ledger | None:
    folders = sorted(checkpoints.glob("step_*"), key=lambda path: int(path.name[5:]))
    return Ledger.model_validate_json((folders[-1] / "state.json").read_bytes()) if folders else None


def _end_orphans(folder: Path) -> list[str]:
    deadline = time.monotonic() + ORPHANS_S
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    named = []
    for process in left:
        try:
            named.append(f"{process.name()} ({process.pid})")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return named


@dataclass(frozen=True)
class Verdict:
    """What is promised, and what came."""

    undisturbed: Outcome
    disturbed: Outcome
    failure: str | None = None
    """Why the disturbed run could not go on."""
    planned: dict[str, int] = field(default_factory=dict)
    inflicted: dict[str, int] = field(default_factory=dict)
    effective: dict[str, int] = field(default_factory=dict)

    @property
    def dead_letters(self) -> int:
        """Healthy groups that were given up: those that the undisturbed run did not give up."""
        ledger, reference = self.disturbed.ledger, self.undisturbed.ledger
        indices = set(ledger.dead if ledger else ()) - set(reference.dead if reference else ())
        return max(len(indices), len(self.disturbed.dead - self.undisturbed.dead))

    @property
    def hash_equal(self) -> bool:
        return self.disturbed.weights is not None and self.disturbed.weights == self.undisturbed.weights

    @property
    def effective_time_ratio(self) -> float | None:
        """Training seconds of the undisturbed run over those of the disturbed; None if that did not finish."""
        return self.undisturbed.training_s / self.disturbed.training_s if self.disturbed.weights else None

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        run = self.disturbed
        missing_faults = {kind: count - self.inflicted.get(kind, 0) for kind, count in self.planned.items()}
        missing_faults = {kind: count for kind, count in missing_faults.items() if count}
        without_effect = {kind: count - self.effective.get(kind, 0) for kind, count in self.inflicted.items()}
        without_effect = {kind: count for kind, count in without_effect.items() if count}
        found = {
            f"the run failed: {self.failure}": self.failure,
            "the undisturbed run did not finish": self.undisturbed.weights is None,
            "the run did not finish": run.weights is None,
            f"dispatch indices lost: {run.lost}": run.lost,
            f"steps did without {run.missing} groups": run.missing,
            f"trained twice: {run.twice}": run.twice,
            f"{self.dead_letters} healthy groups were dead-lettered": self.dead_letters,
            f"weights differ: {run.weights} instead of {self.undisturbed.weights}; {self.first_difference}": not self.hash_equal,
            f"orphans: {', '.join(run.orphans)}": run.orphans,
            f"orphans of the undisturbed run: {', '.join(self.undisturbed.orphans)}": self.undisturbed.orphans,
            f"the harness did not come to inflict {missing_faults}": missing_faults,
            f"faults took no effect: {without_effect}": without_effect,
        }
        return [promise for promise, is_broken in found.items() if is_broken]

    @property
    def first_difference(self) -> str:
        """Where the two runs part, as far as the ledgers and the steps' metrics tell."""
        ours, theirs = self.disturbed, self.undisturbed
        consumed = [run.ledger.consumed if run.ledger else () for run in (ours, theirs)]
        for step, (indices, reference) in enumerate(zip(*consumed, strict=False), 1):
            if indices != reference:
                return f"step {step} trained on {list(indices)} instead of {list(reference)}"
        for event, reference in zip(ours.step_events, theirs.step_events, strict=False):
            names = [
                name
                for name in ("loss", "reward", "reward_std", "grad_norm", "completions/mean_length")
                if event["metrics"].get(name) != reference["metrics"].get(name)
            ]
            if names or event["step"] != reference["step"]:
                return f"step {reference['step']} is the first that differs, in {names}"
        return "no step's metrics differ"

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        undisturbed_steps = [event["window"][1] - event["window"][0] for event in self.undisturbed.step_events]
        return {
            "faults": {
                kind: {
                    "planned": self.planned[kind],
                    "inflicted": self.inflicted.get(kind, 0),
                    "effective": self.effective.get(kind, 0),
                }
                for kind in sorted(self.planned)
            },
            "groups_lost": len(self.disturbed.lost) + self.disturbed.missing,
            "groups_trained_twice": len(self.disturbed.twice),
            "dead_letters": self.dead_letters,
            "hash_equal": self.hash_equal,
            "weights": self.disturbed.weights,
            "weights_undisturbed": self.undisturbed.weights,
            "effective_time_ratio": self.effective_time_ratio,
            "training_s": self.disturbed.training_s,
            "training_s_undisturbed": self.undisturbed.training_s,
            "step_s_undisturbed_median": median(undisturbed_steps) if undisturbed_steps else None,
            "steps": self.disturbed.steps,
            "wall_s": self.disturbed.wall_s,
            "wall_s_undisturbed": self.undisturbed.wall_s,
            "orphans": list(self.disturbed.orphans),
            "broken": self.broken,
        }
