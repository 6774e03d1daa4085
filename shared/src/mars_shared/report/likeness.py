"""Which runs are seeds of one recipe: those that are alike in every setting that decides what is learned, and how it is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from mars_shared.records.start import RunStart
from mars_shared.report.history import History

Settings = dict[str, Any]
"""By dotted names."""

OF_A_RUN = frozenset({"run.name", "run.dir", "run.seed"})
"""What every run has for itself."""
UNCOUNTED_SECTIONS = ("weights", "track", "self_test", "sft")
"""How weights travel, where curves are shown, a check before the first step, and another command's settings."""
UNCOUNTED = frozenset(
    {
        "data.max_faulty_share",
        "rollout.replicas",
        "rollout.concurrent_groups",
        "rollout.threads",
        "rollout.kv_cache_mib",
        "rollout.gpu_memory_utilization",
        "train.tokens_per_microbatch",
        "train.logprob_chunk_tokens",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.threads",
        "eval.every",
    }
)
"""Of other sections: what a machine can bear, when something is saved, measured or refused."""
ABSENT = "no such setting"
MODEL = "model.path"
DATA = ("data.train", "data.test")


def counted(runs: Sequence[History]) -> list[Settings]:
    """Of each run the settings by which it is a seed of a recipe.

    A model counts by its content, or, where one of the runs has no record of that, by its folder's name; data count by the names of
    their files.
    """
    by_content = all(_start(run).model is not None for run in runs)
    return [_counted(_start(run), by_content=by_content) for run in runs]


def differing(recipes: Sequence[Settings]) -> list[str]:
    """Names of settings that are not the same in all recipes."""
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    return [name for name in names if any(recipe.get(name, ABSENT) != recipes[0].get(name, ABSENT) for recipe in recipes)]


def shown(run: History, recipe: Settings, name: str) -> Any:
    """What tells a run's recipe from others in a setting: as it counts, and of a model that counts by its content the folder too."""
    value = recipe.get(name, ABSENT)
    path = str(_start(run).settings.get(MODEL))
    return f"{path}, {value}" if name == MODEL and value not in (ABSENT, _file_name(path)) else value


def passed_over(runs: Sequence[History]) -> dict[str, tuple[str, ...]]:
    """Settings in which runs differ though they count as alike there, with their values as JSON."""
    recipes = counted(runs)
    found: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(name for run in runs for name in _start(run).settings if name not in OF_A_RUN):
        values = [_json(_start(run).settings.get(name, ABSENT)) for run in runs]
        counts = [_json(recipe.get(name)) for recipe in recipes]
        if len(set(zip(counts, values, strict=True))) > len(set(counts)):
            found[name] = tuple(dict.fromkeys(values))
    return found


def _start(run: History) -> RunStart:
    assert run.start is not None  # `read_runs` refuses others
    return run.start


def _counted(start: RunStart, *, by_content: bool) -> Settings:
    found = {name: value for name, value in start.settings.items() if _counts(name)}
    if MODEL in found:
        found[MODEL] = f"content {str(start.model)[:12]}" if by_content else _file_name(found[MODEL])
    for name in DATA:
        if name in found:
            found[name] = [_without_folders(files) for files in found[name]]
    return found


def _counts(name: str) -> bool:
    return name not in OF_A_RUN | UNCOUNTED and name.partition(".")[0] not in UNCOUNTED_SECTIONS


def _without_folders(files: Settings) -> Settings:
    return {key: _file_name(value) if key in ("path", "images") and value else value for key, value in files.items()}


def _file_name(path: str) -> str:
    return PurePath(path).name or path


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
