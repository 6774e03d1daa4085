"""`make chaos FAULTS=n SEED=s`: whether a run that suffers n faults ends like one that suffers none.

Both runs are made here, of the tiny policy on digits, with the same recipe and seed: first an undisturbed one
with one replica, then one with three. Faults of the kinds in chaos/plan.py come in a seeded order,
each once the run has made progress since the one before. The supervisor gives a service up after 20 deaths
in 300 s or three in a row before it is ready; the faults are inflicted on what is ready alone, and wait when a service has died 15
times in 300 s. Written to runs/chaos: summary.json, undisturbed/ and disturbed/ with all logs.

`effective_time_ratio` is the undisturbed run's seconds of training steps (begin of the first to end of the last, no
start-up) over the same of the disturbed run, in which restarts, waits for frozen services and repeated steps count. The undisturbed
run has one replica, the disturbed two; on two cores both have the same computing power.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chaos.ordeal import disturbed, undisturbed
from chaos.plan import plan
from chaos.verdict import Verdict

RUNS = Path("runs/chaos")
STEPS_A_FAULT = 3
"""Some faults wait until they are noticed, and the run goes on meanwhile; so that all come before its end."""
FEWEST_STEPS = 15


def main() -> int:
    parser = argparse.ArgumentParser(description="Break a run on purpose and compare it with an undisturbed one.")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the faults")
    parser.add_argument("--replicas", type=int, default=3, help="of the run that suffers them (default: 3)")
    parser.add_argument("--dir", type=Path, default=RUNS, help=f"emptied first (default: {RUNS})")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what was started, too
    folder, steps = arguments.dir.resolve(), max(STEPS_A_FAULT * arguments.faults, FEWEST_STEPS)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"undisturbed: {steps} steps with one replica", flush=True)
    reference = undisturbed(folder / "undisturbed", steps=steps, seed=arguments.seed, say=say)
    print(f"disturbed: {steps} steps with {arguments.replicas} replicas, {arguments.faults} faults", flush=True)
    faults = plan(arguments.faults, arguments.seed)
    verdict = disturbed(folder / "disturbed", faults, reference, seed=arguments.seed, replicas=arguments.replicas, say=say)
    (folder / "summary.json").write_text(json.dumps(verdict.summary(), indent=2) + "\n", encoding="utf-8")
    show(verdict, Console(width=130))
    return 1 if verdict.broken else 0


def say(line: str) -> None:
    print(line, flush=True)


def show(verdict: Verdict, console: Console) -> None:
    """The faults by kind, what is promised, and what was broken."""
    summary = verdict.summary()
    faults = Table("fault", "planned", "inflicted", "effective", title=f"{sum(verdict.inflicted.values())} faults")
    for kind, counts in summary["faults"].items():
        faults.add_row(kind, *(str(counts[name]) for name in ("planned", "inflicted", "effective")))
    console.print(faults)
    table = Table("", "undisturbed", "disturbed", title=f"{summary['steps']} steps")
    table.add_row("weights", str(summary["weights_undisturbed"])[:16], str(summary["weights"])[:16])
    table.add_row("seconds of the training steps", f"{summary['training_s_undisturbed']:.1f}", f"{summary['training_s']:.1f}")
    table.add_row("wall seconds", f"{summary['wall_s_undisturbed']:.1f}", f"{summary['wall_s']:.1f}")
    for name in ("groups_lost", "groups_trained_twice", "dead_letters"):
        table.add_row(name.replace("_", " "), "", str(summary[name]))
    ratio = summary["effective_time_ratio"]
    table.add_row("effective time ratio", "", "-" if ratio is None else f"{ratio:.2f}")
    console.print(table)
    for promise in verdict.broken:
        console.print(f"BROKEN: {promise}", style="red", markup=False, highlight=False, soft_wrap=True)
    if not verdict.broken:
        console.print("all promises kept: nothing lost, nothing twice, bit-identical weights, no orphans", style="green")


if __name__ == "__main__":
    sys.exit(main())
