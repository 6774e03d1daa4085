"""`make verify`: every algorithm learns on both tasks, with nothing changed but the recipe.

Trains recipes/tiny/*.toml on digits and on scene with two seeds each and compares the mean reward
over all scored groups, those that dynamic sampling dropped included, of the last ten steps with
that of the first ten. Runs are kept in runs/verify/<task>-<recipe>-<seed>.

    python benchmarks/verify_algorithms.py [TASK-RECIPE-SEED ...]     default: all sixteen
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mars_shared.telemetry import by_step, read_events

TASKS = ("digits", "scene")
RECIPES = ("grpo", "mars-grpo", "dapo", "mars-dapo")
SEEDS = (0, 1)
COMPARED = 10
KEPT = Path("runs/verify")
MARS = Path(sys.executable).with_name("mars")
EVAL_SAMPLES = 32


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.recipe}-{self.seed}"

    @property
    def folder(self) -> Path:
        return KEPT / self.name


@dataclass(frozen=True)
class Result:
    """Mean reward over all scored groups of the first and of the last ten steps."""

    run: Run
    first: float
    last: float
    groups: int
    """Groups scored in all steps."""
    trained: int
    """Groups trained on."""
    wall_s: float


def main() -> int:
    runs = [Run(task, recipe, seed) for task in TASKS for recipe in RECIPES for seed in SEEDS]
    chosen = [run for run in runs if run.name in sys.argv[1:]] or runs
    results = [train(run) for run in chosen]
    print(f"\nmean reward over all scored groups, steps 1-{COMPARED} and the last {COMPARED}")
    print(f"{'run':<20} {'first':>7} {'last':>7} {'change':>8} {'groups':>7} {'trained':>8} {'wall s':>7}")
    for result in results:
        print(
            f"{result.run.name:<20} {result.first:7.3f} {result.last:7.3f} {result.last - result.first:+8.3f} "
            f"{result.groups:7d} {result.trained:8d} {result.wall_s:7.0f}"
        )
    return 0 if judge(results) else 1


def judge(results: Sequence[Result]) -> bool:
    """Print each task's and recipe's mean over its seeds; whether all of them rose."""
    by_recipe: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        by_recipe[result.run.task, result.run.recipe].append(result)
    print(f"\n{'mean over seeds':<20} {'first':>7} {'last':>7} {'change':>8}")
    rose = True
    for (task, recipe), group in by_recipe.items():
        first, last = mean(result.first for result in group), mean(result.last for result in group)
        rose &= last > first
        print(
            f"{task + '-' + recipe:<20} {first:7.3f} {last:7.3f} {last - first:+8.3f}{'' if last > first else '  DID NOT RISE'}"
        )
    return rose


def train(run: Run) -> Result:
    """Train from nothing; evaluations are kept short, for they are not what is compared."""
    print(f"== {run.name}", flush=True)
    shutil.rmtree(run.folder, ignore_errors=True)
    overrides = {
        "MARS_DATA__DATASET": run.task,
        "MARS_DATA__EVAL_SAMPLES": str(EVAL_SAMPLES),
        "MARS_RUN__SEED": str(run.seed),
        "MARS_RUN__DIR": str(run.folder),
    }
    started = time.monotonic()
    subprocess.run([MARS, "train", f"recipes/tiny/{run.recipe}.toml"], env=os.environ | overrides, check=True)
    wall_s = time.monotonic() - started
    steps = [step["metrics"] for step in by_step(read_events(run.folder / "events.jsonl"), "step")]
    return Result(
        run,
        first=mean_reward(steps[:COMPARED]),
        last=mean_reward(steps[-COMPARED:]),
        groups=int(sum(step["groups"] for step in steps)),
        trained=int(sum(step["groups/trained"] for step in steps)),
        wall_s=wall_s,
    )


def mean_reward(steps: Sequence[dict[str, Any]]) -> float:
    """Over groups, all of one size, not over steps."""
    return float(sum(step["reward"] * step["groups"] for step in steps) / sum(step["groups"] for step in steps))


if __name__ == "__main__":
    sys.exit(main())
