"""What the commit path costs: checkpoint with its ledger and the acknowledgement, against the time of the steps around it.

Trains recipes/tiny/mars-grpo.toml for some steps, with its own checkpoint_every and with a checkpoint at every step, and
prints medians and the share, all of the same run. Exit code 1 if the share at the recipe's own setting is above 3 %.

    python benchmarks/commit_cost.py [--steps 20]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from mars_shared.telemetry import read_events

RECIPE = Path("recipes/tiny/mars-grpo.toml")
FOLDER = Path("runs/verify/commit-cost")
MARS = Path(sys.executable).with_name("mars")
BOUND = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    print(f"{'checkpoint_every':>16}  {'steps':>5}  {'step s':>7}  {'commit s':>8}  {'share of step time':>18}")
    shares = [share(steps, every) for every in (10, 1)]
    return int(shares[0] > BOUND)


def share(steps: int, checkpoint_every: int) -> float:
    """Train and print a line; returns the commit path's share of the time of steps and commits."""
    folder = FOLDER / str(checkpoint_every)
    shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {
        "MARS_RUN__DIR": str(folder),
        "MARS_TRAIN__STEPS": str(steps),
        "MARS_TRAIN__CHECKPOINT_EVERY": str(checkpoint_every),
        "MARS_DATA__EVAL_SAMPLES": "8",
    }
    subprocess.run([MARS, "train", RECIPE, "--port", "18700"], env=environment, check=True, stdout=subprocess.DEVNULL)
    windows = [event["window"] for event in read_events(folder / "events.jsonl", "step")]
    commits = [event["seconds"] for event in read_events(folder / "events.jsonl", "checkpoint") if event["step"] > 0]
    step_s = [end - start for start, end in windows]
    part = sum(commits) / (sum(commits) + sum(step_s))
    print(f"{checkpoint_every:>16}  {len(step_s):>5}  {median(step_s):>7.3f}  {median(commits):>8.3f}  {part:>18.2%}", flush=True)
    return part


if __name__ == "__main__":
    sys.exit(main())
