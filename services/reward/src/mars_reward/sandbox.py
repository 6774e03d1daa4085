"""The isolated process of a custom reward: `python -m mars_reward.sandbox SPEC`; JSON lines in and out.

First line out: {"ready": true} or {"error": ...}. Then for each item one line with "parts", or with
"error" and "traceback". What the function prints goes to stderr. CPU seconds beyond an item's limit end the
process, whatever holds it up: a signal that no regular expression can keep waiting.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

REWARD_ENTRY_POINTS = "mars.rewards"
TRL = "trl:"
PARENT_POLL_S = 0.5

Reward = Callable[..., Any]


class SpecError(Exception):
    """The specification names no reward function."""


def main() -> None:
    items, replies = _own_pipes()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        score = load(sys.argv[1])
    except Exception as error:  # noqa: BLE001  whatever a user's module raises belongs to whoever asked for it
        _say(replies, _failure(error))
        return
    _say(replies, {"ready": True})
    for line in items:
        item = json.loads(line)
        _limit_cpu(item.pop("cpu_s"))
        try:
            reply: dict[str, Any] = {"parts": score(item)}
        except Exception as error:  # noqa: BLE001  one item's surprise must not end the others' scoring
            reply = _failure(error)
        _say(replies, reply)


def _failure(error: Exception) -> dict[str, Any]:
    """The error in one line and with its traceback, both as text that every encoder takes."""
    texts = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}
    return {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}


def load(spec: str) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """The function that a specification names, as one that takes an item and returns named parts.

    `file.py:function` or the name of an entry point of the group mars.rewards; either behind
    `trl:` has the signature of TRL's reward functions.

    Raises:
        SpecError: there is no such file, function or entry point.
    """
    if spec.startswith(TRL):
        return _as_trl(_find(spec.removeprefix(TRL)))
    return _as_ours(_find(spec))


def _find(spec: str) -> Reward:
    if ":" not in spec:
        return _entry_point(spec)
    path, _, name = spec.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise SpecError(f"no file {file}; expected file.py:function")
    sys.path.insert(0, str(file.resolve().parent))
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    if module_spec is None or module_spec.loader is None:
        raise SpecError(f"{file} is no Python file; expected file.py:function")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    module_spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise SpecError(f"{file} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _entry_point(name: str) -> Reward:
    known = {point.name: point for point in importlib.metadata.entry_points(group=REWARD_ENTRY_POINTS)}
    if name not in known:
        raise SpecError(
            f"no entry point {name!r} in the group {REWARD_ENTRY_POINTS}; there are: {', '.join(sorted(known)) or 'none'}"
        )
    return known[name].load()  # type: ignore[no-any-return]


def _as_ours(reward: Reward) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """reward(completion, truth, question=...) -> a number, or named parts that sum to the reward."""

    def score(item: Mapping[str, Any]) -> dict[str, float]:
        return _parts(_result(reward(item["completion"], item["truth"], question=item["question"])), reward)

    return score


def _as_trl(reward: Reward) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """TRL's convention: lists of one item each, the truth under the usual column names."""

    def score(item: Mapping[str, Any]) -> dict[str, float]:
        truth = item["truth"]
        columns = {name: [truth] for name in ("answer", "solution", "ground_truth")}
        values = _result(reward(prompts=[item["question"]], completions=[item["completion"]], **columns))
        if not isinstance(values, list | tuple) or len(values) != 1:
            raise TypeError(f"{_name(reward)} returned {values!r}; expected a list with one number")
        return _parts(values[0], reward)

    return score


RUNNER = asyncio.Runner()
"""One event loop for all items: clients that a module keeps hold connections of their loop."""


def _result(value: Any) -> Any:
    return RUNNER.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    return await value


def _parts(value: Any, reward: Reward) -> dict[str, float]:
    named = value if isinstance(value, Mapping) else {_name(reward): value}
    if not named:
        raise ValueError(f"{_name(reward)} returned no parts; expected a number or named parts")
    return {str(name): float(part) for name, part in named.items()}


def _name(reward: Reward) -> str:
    return str(getattr(reward, "__name__", "reward"))


def _limit_cpu(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds), hard))


def _own_pipes() -> tuple[TextIO, TextIO]:
    """The real stdin and stdout, for items and replies; the function reads nothing and prints to stderr."""
    items, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return items, replies


def _end_with_parent(parent: int) -> None:
    """End this process, and what the function started, when the service is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os.killpg(0, signal.SIGKILL)


def _say(replies: TextIO, content: Mapping[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
