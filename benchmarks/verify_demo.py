"""`make verify`: the demo for three seeds of digits and one of scene, against what it promises.

Promised: held-out Multi accuracy on digits rises by at least 0.20 within 12 minutes, mIoU on
scene by at least 0.10 within 20 minutes, on two CPU cores with nothing else to do.
Every run is a whole `mars demo`; its summary is kept as runs/verify/<data>-<seed>.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

RUNS = [("digits", 0), ("digits", 1), ("digits", 2), ("scene", 0)]
PROMISED_RISE = {"digits": 0.20, "scene": 0.10}
PROMISED_WALL_S = {"digits": 12 * 60, "scene": 20 * 60}
KEPT = Path("runs/verify")
MARS = Path(sys.executable).with_name("mars")


def main() -> int:
    KEPT.mkdir(parents=True, exist_ok=True)
    results = [run_demo(data, seed) for data, seed in RUNS]
    print(
        f"\n{'run':<10} {'before':>7} {'after':>7} {'rise':>7} {'promised':>9} {'efficiency':>11} {'wall s':>7} {'promised':>9}"
    )
    for result in results:
        print(result.row())
    print(f"median rise on digits: {median(result.rise for result in results if result.data == 'digits'):+.3f}")
    return 0 if all(result.kept_promise for result in results) else 1


@dataclass(frozen=True)
class Result:
    """One demo: its summary.json and its wall seconds, set-up not included."""

    data: str
    seed: int
    summary: dict[str, Any]
    wall_s: float

    @property
    def rise(self) -> float:
        return float(self.summary["after"]["multi"] - self.summary["before"]["multi"])

    @property
    def kept_promise(self) -> bool:
        return self.rise >= PROMISED_RISE[self.data] and self.wall_s <= PROMISED_WALL_S[self.data]

    def row(self) -> str:
        before, after, efficiency = self.summary["before"]["multi"], self.summary["after"]["multi"], self.summary["efficiency"]
        return (
            f"{self.data + '-' + str(self.seed):<10} {before:7.3f} {after:7.3f} {self.rise:+7.3f} {PROMISED_RISE[self.data]:+9.2f} "
            f"{'-' if efficiency is None else f'{efficiency:.2f}':>11} {self.wall_s:7.0f} {PROMISED_WALL_S[self.data]:9d}"
            f"{'' if self.kept_promise else '  BROKEN'}"
        )


def run_demo(data: str, seed: int) -> Result:
    """Run one demo and keep its summary."""
    print(f"== {data}-{seed}", flush=True)
    started = time.monotonic()
    subprocess.run([MARS, "demo", "--data", data, "--seed", str(seed)], check=True)
    wall_s = time.monotonic() - started
    kept = KEPT / f"{data}-{seed}.json"
    shutil.copy("runs/demo/summary.json", kept)
    return Result(data, seed, json.loads(kept.read_text()), wall_s)


if __name__ == "__main__":
    sys.exit(main())
