"""`make verify`: every fault point of every service, one by one: one short run each ends like an undisturbed one.

    python benchmarks/verify_faults.py [POINT[@PASS][:full] ...]     default: all, and a full disk where the trainer writes

A run has two replicas and four steps; the point strikes when a process passes it for the second time. Runs
are kept in runs/chaos-points, that of an entry in a folder of its name.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chaos.ordeal import undisturbed
from chaos.plan import FULL_POINTS
from chaos.run import StalledError, observed_run
from chaos.verdict import Outcome, Verdict, outcome_of
from mars_shared.faults import POINTS
from mars_shared.supervisor import ServiceFailedError

RUNS = Path("runs/chaos-points")
STEPS, SEED, CHECKPOINT_EVERY, PASS = 4, 0, 2, 2


@dataclass(frozen=True)
class Row:
    """What came of one entry of MARS_FAULT."""

    entry: str
    struck: bool
    verdict: Verdict

    @property
    def broken(self) -> list[str]:
        return [*([] if self.struck else ["the point was not passed"]), *self.verdict.broken]

    @property
    def cells(self) -> tuple[str, ...]:
        def yes(holds: bool) -> str:
            return "yes" if holds else "NO"

        run = self.verdict.disturbed
        return (
            self.entry,
            POINTS[point_of(self.entry)],
            yes(self.struck),
            yes(run.weights is not None),
            yes(self.verdict.hash_equal),
            f"{run.wall_s:.0f}",
            "; ".join(self.broken) or "kept",
        )


def main(entries: Sequence[str]) -> int:
    folder = RUNS.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    entries = entries or [*(f"{point}@{PASS}" for point in POINTS), *(f"{point}@{PASS}:full" for point in FULL_POINTS)]
    reference = undisturbed(folder / "undisturbed", steps=STEPS, seed=SEED, checkpoint_every=CHECKPOINT_EVERY, say=say)
    rows = []
    for number, entry in enumerate(entries, 1):
        rows.append(sweep(folder / entry.replace(":", "-"), entry, reference))
        say(
            f"{number:>2}/{len(entries)}  {entry}: {'; '.join(rows[-1].broken) or 'kept'} ({rows[-1].verdict.disturbed.wall_s:.0f} s)"
        )
    table = Table("point", "how things stand there", "struck", "ended", "same weights", "s", "promises", title="fault points")
    for row in rows:
        table.add_row(*row.cells, style="red" if row.broken else None)
    Console(width=160).print(table)
    return 1 if any(row.broken for row in rows) else 0


def sweep(folder: Path, entry: str, reference: Outcome) -> Row:
    """One run that fails at one point."""
    began, failure = time.monotonic(), None
    try:
        with observed_run(
            folder, replicas=2, steps=STEPS, seed=SEED, checkpoint_every=CHECKPOINT_EVERY, faults=entry, say=say
        ) as run:
            while not run.finished:
                run.poll()
    except (ServiceFailedError, StalledError) as error:
        failure = str(error)
    struck = (folder / "faults" / point_of(entry)).exists()
    wall_s = time.monotonic() - began
    outcome = outcome_of(folder, steps=STEPS, prompts_per_step=reference.prompts_per_step, wall_s=wall_s)
    return Row(entry, struck, Verdict(reference, outcome, failure))


def point_of(entry: str) -> str:
    return entry.partition(":")[0].partition("@")[0]


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
