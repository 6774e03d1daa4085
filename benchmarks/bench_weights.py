"""What it takes to send changed weights: bytes per parameter and seconds by stage, of ours and of what else could be done.

- Real training: policy gradients from rollouts of the digits task, fp32 masters published in bfloat16, for the tiny policy and
  one of 22 million parameters (`weights/training.py`). Some steps at a learning rate of 1e-4 come first: they bring masters
  off the bfloat16 grid that model files are on, and AdamW's moments to what they are in the midst of a run.
- Synthetic: a policy of 100 million parameters, random, whose every parameter gets steps as of AdamW (`weights/policies.py`).
  A real engine serves it, streams tokens, and takes the new weights (`weights/stall.py`).

Each case is one learning rate; every codec sends the same versions. `delta` goes through the project's own publisher, store
and replica as well, which must hold the very bits at the end, after a rollback, and as a joiner. GB/s are of weights by the CPU
seconds of one thread. Numbers are medians over versions of this very run.

What is promised is compared at the end, and a promise that is not kept is an error.

    python benchmarks/bench_weights.py [--quick] [--out benchmarks/results/weights.json] [--no-engine]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

RESULTS = Path("benchmarks/results/weights.json")


def main() -> int:
    # Imported here: the engine's processes begin by importing this file, and must be free of what the codec compiles with.
    from weights.cases import FULL, QUICK, run
    from weights.rows import promises, table, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny policy alone, a few versions")
    parser.add_argument("--no-engine", action="store_true", help="no stall of generation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mars-bench-weights-") as folder:
        rows = []
        for row in run(QUICK if options.quick else FULL, Path(folder), engine=not options.no_engine):
            rows.append(row)
            write_json(rows, options.out)
    print("\n".join(table(rows)))
    kept = dict(promises(rows))
    print("\n".join(f"{'kept' if each else 'BROKEN'}: {promise}" for promise, each in kept.items()))
    print(f"rows are in {options.out}")
    return int(not all(kept.values()))


if __name__ == "__main__":
    sys.exit(main())
