"""Which faults a run suffers, in which order: a seeded list."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from mars_shared.faults import POINTS

FAULT_POINT, FULL_DISK = "fault point", "full disk"
KINDS = (
    "kill replica",
    "kill engine",
    "stop replica",
    "freeze replica",
    "kill reward",
    "freeze reward",
    "kill trainer",
    "restart Redis",
    "flush Redis",
    "lose Redis's file",
    "corrupt snapshot",
    "torn checkpoint",
    FULL_DISK,
    FAULT_POINT,
)
FULL_POINTS = ("trainer.before_announce", "trainer.before_checkpoint", "trainer.before_commit")
"""Where the disk is full; at the other points processes are killed."""
POINTS_A_ROUND = 3
"""Fault points come more often than each other kind: there are many of them."""
LONGEST_DELAY_S = 1.0


@dataclass(frozen=True)
class Fault:
    """One fault to come.

    `delay_s`: after the progress that it waits for, so that it lands somewhere inside a step.
    `pick`: in [0, 1), chooses among what there is then: a replica, a byte.
    `point`: of a fault point or a full disk.
    """

    kind: str
    delay_s: float
    pick: float
    point: str | None = None


def plan(faults: int, seed: int) -> list[Fault]:
    """So many faults, every kind as often as every other, fault points POINTS_A_ROUND times as often.

    The order is random, but no kind comes a second time before each came once: from 16 faults on every kind is there.
    """
    random = Random(seed)
    kinds = _rounds(random, (*KINDS, *[FAULT_POINT] * (POINTS_A_ROUND - 1)), faults)
    counts = Counter(kinds)
    points = {
        FULL_DISK: _rounds(random, FULL_POINTS, counts[FULL_DISK]),
        FAULT_POINT: _rounds(random, [point for point in POINTS if point not in FULL_POINTS], counts[FAULT_POINT]),
    }
    return [
        Fault(kind, random.uniform(0, LONGEST_DELAY_S), random.random(), points[kind].pop() if kind in points else None)
        for kind in kinds
    ]


def _rounds(random: Random, items: Sequence[str], count: int) -> list[str]:
    """`count` items: all of them in a random order, then all in another, and so on."""
    endless = (item for _ in range(math.ceil(count / len(items))) for item in random.sample(items, len(items)))
    return list(islice(endless, count))


def armed(faults: Sequence[Fault]) -> str:
    """MARS_FAULT for a plan: every point of it."""
    points = {fault.point for fault in faults if fault.point is not None}
    return ",".join(f"{point}:full" if point in FULL_POINTS else point for point in sorted(points))
