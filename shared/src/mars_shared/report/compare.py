"""Runs side by side: those of one recipe are seeds of one group, and groups are compared by their means over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mars_shared.errors import ConfigError
from mars_shared.report.evaluations import rows_of, value_at
from mars_shared.report.history import Event, History, State, read_history
from mars_shared.report.intervals import Estimate, difference_estimate, mean_estimate
from mars_shared.report.likeness import Settings, counted, differing, passed_over, shown

Group = Sequence[History]
"""Seeds of one recipe."""


class Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class ComparedRun(Model):
    """One seed: `evaluated` and `best` are the steps of its last evaluation and of the one with the highest Multi."""

    folder: str
    seed: int
    state: State
    step: int
    evaluated: int
    best: int


class Result(Model):
    """One number of the evaluations, over the seeds of a group; `difference` is final minus the first group's final."""

    final: Estimate
    best: Estimate
    difference: Estimate | None


class ComparedGroup(Model):
    """Runs of one recipe. `settings` are those in which the groups differ; `results` are by the names of an evaluation's intervals."""

    settings: Settings
    runs: tuple[ComparedRun, ...]
    results: dict[str, Result]

    @property
    def label(self) -> str:
        """What tells it from the others."""
        return (
            ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in self.settings.items()) or "all runs"
        )


class Comparison(Model):
    """Groups in the order in which their first runs were named.

    `passed_over` are settings, as JSON, in which runs differ though that does not count; `versions` packages whose versions differ.
    """

    groups: tuple[ComparedGroup, ...]
    passed_over: dict[str, tuple[str, ...]]
    versions: dict[str, tuple[str, ...]]


def read_runs(folders: Sequence[Path]) -> list[History]:
    """Runs that can be compared.

    Raises:
        ConfigError: a folder is no run, is named twice, has no recipe on record, or no evaluation; two runs of one recipe have
            the same seed, or were evaluated last at different steps.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is named twice; expected each once, since every run counts as a seed of its own")
    runs = [read_history(folder) for folder in folders]
    for run in runs:
        if run.start is None:
            raise ConfigError(f"{run.folder} has no `started` event with its recipe, by which runs are compared; leave it out")
        if not run.evaluations:
            raise ConfigError(f"{run.folder} has no evaluation yet; leave it out, or wait for its first one")
    for group in grouped(runs):
        _refuse_repeated_seeds(group)
        _refuse_different_ends(group)
    return runs


def _refuse_repeated_seeds(group: Group) -> None:
    """They would count as several seeds and make an interval too narrow; which one is to count is not ours to choose."""
    by_seed: dict[int, History] = {}
    for run in group:
        other = by_seed.setdefault(run.seed or 0, run)
        if other is not run:
            raise ConfigError(
                f"{other.folder} and {run.folder} are of the same recipe with the same seed, {run.seed}; expected each seed of a "
                "recipe once, since intervals are over seeds. Leave one of them out"
            )


def _refuse_different_ends(group: Group) -> None:
    """A mean over seeds of which one has not come as far as the others is of no step."""
    first, *others = group
    for run in others:
        if run.evaluations[-1]["step"] != first.evaluations[-1]["step"]:
            raise ConfigError(
                f"{first.folder} was last evaluated at step {first.evaluations[-1]['step']}, {run.folder} of the same recipe at step "
                f"{run.evaluations[-1]['step']}; expected one step for all seeds of a recipe. Wait until they have come as far, or "
                "leave one out"
            )


def compare(runs: Sequence[History]) -> Comparison:
    """Numbers of all groups of `read_runs`."""
    groups = grouped(runs)
    by_folder = {run.folder: recipe for run, recipe in zip(runs, counted(runs), strict=True)}
    recipes = [by_folder[group[0].folder] for group in groups]
    names = differing(recipes)
    return Comparison(
        groups=tuple(
            ComparedGroup(
                settings={name: shown(group[0], recipe, name) for name in names},
                runs=tuple(_compared(run) for run in group),
                results=dict(_results(groups[0], group)),
            )
            for recipe, group in zip(recipes, groups, strict=True)
        ),
        passed_over=passed_over(runs),
        versions=_versions(runs),
    )


def grouped(runs: Sequence[History]) -> list[Group]:
    """Runs by recipe, in the order of their first runs."""
    groups: dict[str, list[History]] = {}
    for recipe, run in zip(counted(runs), runs, strict=True):
        groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    return list(groups.values())


def best_evaluation(run: History) -> Event:
    """The one with the highest Multi; the first of equal ones."""
    return max(run.evaluations, key=lambda event: float(event["multi"]))


def _compared(run: History) -> ComparedRun:
    return ComparedRun(
        folder=str(run.folder),
        seed=run.seed or 0,
        state=run.state,
        step=run.step,
        evaluated=run.evaluations[-1]["step"],
        best=best_evaluation(run)["step"],
    )


def _results(first: Group, group: Group) -> Iterator[tuple[str, Result]]:
    sources = list(dict.fromkeys(name for run in group for name in run.sources))
    for _, place, key in rows_of(sources):
        final, best = _finals(group, place), _values([best_evaluation(run) for run in group], place)
        if key and final and best:
            before = _finals(first, place) if group is not first else []
            difference = difference_estimate(before, final) if before else None
            yield key, Result(final=mean_estimate(final), best=mean_estimate(best), difference=difference)


def _finals(group: Group, place: tuple[str, ...]) -> list[float]:
    return _values([run.evaluations[-1] for run in group], place)


def _values(evaluations: Sequence[Event], place: tuple[str, ...]) -> list[float]:
    found = [value_at(event, place) for event in evaluations]
    return [value for value in found if value is not None]


def _versions(runs: Sequence[History]) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in ({} if run.start is None else run.start.versions).items():
            found.setdefault(package, {})[version] = None
    return {package: tuple(versions) for package, versions in found.items() if len(versions) > 1}
