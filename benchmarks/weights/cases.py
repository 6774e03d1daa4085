"""The cases of the benchmark: policies in training and synthetic ones, at several learning rates, and a real engine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic

import torch
from torch import nn

from mars_shared.settings import Recipe
from mars_trainer.model import load_policy
from weights.codecs import compile_all
from weights.journey import Journey
from weights.policies import SIZES, TINY, make_recipe, nudge, write_enlarged, write_taught
from weights.rows import Comparison, Row
from weights.stall import measure_stalls, started
from weights.training import Training

RATES = (1e-6, 1e-5, 1e-4)
SETTLING_RATE = 1e-4
TAUGHT_STEPS = 60
SCATTER = 1e-2
"""Takes biases off the zeros that they begin with, from which every step is thousands of units in the last place."""
Step = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """How much of everything: versions by learning rate, settling steps before them."""

    trained: dict[str, dict[float, int]]
    settling: int
    synthetic: dict[float, int]


FULL = Plan(
    trained={"tiny": {1e-6: 50, 1e-5: 6, 1e-4: 6}, "20m": {1e-6: 50, 1e-5: 6, 1e-4: 6}},
    settling=12,
    synthetic=dict.fromkeys(RATES, 5),
)
QUICK = Plan(trained={"tiny": dict.fromkeys(RATES, 2)}, settling=1, synthetic={})


def run(plan: Plan, folder: Path, *, engine: bool) -> Iterator[Row]:
    """All rows of a plan, as they are measured; the folder is for stores and models."""
    say(f"kernels compiled or loaded in {compile_all():.1f} s")
    for size, versions in plan.trained.items():
        yield from trained(size, versions, plan.settling, folder)
    if plan.synthetic:
        yield from synthetic(plan.synthetic, folder, engine=engine)


def trained(size: str, versions: dict[float, int], settling: int, folder: Path) -> Iterator[Row]:
    """Rows of a policy in training, every learning rate from the same settled state."""
    model = TINY
    if size in SIZES:
        model = folder / size
        write_taught(SIZES[size], model, TAUGHT_STEPS, say)
    settled = Training(make_recipe(folder / f"{size}-settling", model, SETTLING_RATE))
    for step in range(settling):
        settled.step()
        say(f"{size}: settling {step + 1} of {settling}, mean reward {settled.metrics['reward']:.2f}")
    for lr, count in versions.items():
        recipe = make_recipe(folder / f"{size}-{lr:g}", model, lr)
        training = Training(recipe, settled)
        with closing(Journey(recipe)) as journey:
            yield from case("training", lr, training.learner.model, training.step, journey, count)


def synthetic(versions: dict[float, int], folder: Path, *, engine: bool) -> list[Row]:
    """Rows of a large random policy, and the stall of an engine that serves it."""
    path = folder / "100m"
    write_enlarged(SIZES["100m"], path)
    random = torch.Generator().manual_seed(0)
    model = load_policy(path).model
    nudge(model, SCATTER, random)
    rows: dict[float, list[Row]] = {}
    with ExitStack() as open_journeys:
        journeys: dict[float, Journey] = {}
        for lr, count in versions.items():
            journeys[lr] = open_journeys.enter_context(closing(Journey(make_recipe(folder / f"100m-{lr:g}", path, lr))))
            step = partial(nudge, model, lr, random)
            rows[lr] = list(case("synthetic", lr, model, step, journeys[lr], count))
        del model
        if engine:
            recipe = make_recipe(folder / "100m-engine", path, RATES[0])
            for lr, stages in asyncio.run(stalls_of(recipe, journeys)).items():
                add_stall(next(row for row in rows[lr] if row.codec == "delta"), stages)
    return [row for each in rows.values() for row in each]


def case(task: str, lr: float, model: nn.Module, step: Step, journey: Journey, count: int) -> Iterator[Row]:
    """Rows of all codecs over `count` changes of a model."""
    journey.publish(model)
    moves = [journey.follow()]
    comparison = Comparison(journey.bits, journey.folder)
    published_s = []
    for number in range(1, count + 1):
        began = monotonic()
        step()
        stepped = monotonic()
        manifest, seconds = journey.publish(model)
        published_s.append(seconds)
        moves.append(journey.follow())
        comparison.send(journey.bits, journey.file(manifest))
        say(
            f"{task} {comparison.params / 1e6:.1f}M lr {lr:g}: version {number} of {count}, step {stepped - began:.1f} s, "
            f"{manifest.kind} of {manifest.size_bytes / comparison.params:.4f} bytes/param, the rest {monotonic() - stepped:.1f} s"
        )
    back, joined = journey.roll_back(), journey.join()
    say(f"rollback: {back.how}; joiner: {joined.how}")
    for row in comparison.rows(task, lr):
        if row.codec == "delta":
            row.rollback, row.joiner = back.how, joined.how
            row.exact = row.exact and all(move.exact for move in (*moves, back, joined))
            row.seconds |= {"publish": median(published_s), "follow": median(move.seconds for move in moves[1:])}
        yield row


async def stalls_of(recipe: Recipe, journeys: dict[float, Journey]) -> dict[float, list[dict[str, float]]]:
    """Stages of updates of one engine by learning rate: back some versions and forward again, twice."""
    async with started(recipe) as engine:
        return {lr: await measure_stalls(engine, [journey.roll_back, journey.follow] * 2) for lr, journey in journeys.items()}


def add_stall(row: Row, updates: Sequence[dict[str, float]]) -> None:
    """Medians over updates."""
    stages = {name: median(update[name] for update in updates) for name in updates[0]}
    row.seconds |= {"rehearse": stages["rehearse"], "load": stages["write"], "repack": stages["pack"], "stall": stages["stall"]}
    row.stall_ms = 1e3 * stages["stall"]
    row.write_ms = 1e3 * median(update["write"] + update["pack"] for update in updates)
    say(f"lr {row.lr:g}: stall {row.stall_ms:.0f} ms, write and repack {row.write_ms:.0f} ms")


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)
