"""`make verify`: the demo for three seeds of digits and one of scene, against what it promises.

Promised: held-out Multi accuracy on digits rises by at least 0.20, mIoU on scene by at least 0.10.
Every run is a whole `mars demo`; its summary is kept as runs/verify/<data>-<seed>.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

RUNS = [("digits", 0), ("digits", 1), ("digits", 2), ("scene", 0)]
PROMISED_RISE = {"digits": 0.20, "scene": 0.10}
KEPT = Path("runs/verify")
MARS = Path(sys.executable).with_name("mars")


def main() -> int:
    KEPT.mkdir(parents=True, exist_ok=True)
    rows = [run_demo(data, seed) for data, seed in RUNS]
    print(f"\n{'run':<10} {'before':>7} {'after':>7} {'rise':>7} {'promised':>9} {'efficiency':>11} {'wall s':>7}")
    failed = False
    for name, summary, wall_s in rows:
        before, after = summary["before"]["multi"], summary["after"]["multi"]
        promised = PROMISED_RISE[name.split("-")[0]]
        failed |= after - before < promised
        verdict = "" if after - before >= promised else "  BELOW"
        print(
            f"{name:<10} {before:7.3f} {after:7.3f} {after - before:+7.3f} {promised:+9.2f} "
            f"{summary['efficiency']:11.2f} {wall_s:7.0f}{verdict}"
        )
    digits = [summary["after"]["multi"] - summary["before"]["multi"] for name, summary, _ in rows if name.startswith("digits")]
    print(f"median rise on digits: {median(digits):+.3f}")
    return 1 if failed else 0


def run_demo(data: str, seed: int) -> tuple[str, dict[str, dict[str, float]], float]:
    """Run one demo; returns its name, its summary and its wall seconds."""
    name = f"{data}-{seed}"
    print(f"== {name}", flush=True)
    started = time.monotonic()
    subprocess.run([MARS, "demo", "--data", data, "--seed", str(seed)], check=True)
    kept = KEPT / f"{name}.json"
    shutil.copy("runs/demo/summary.json", kept)
    return name, json.loads(kept.read_text()), time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
