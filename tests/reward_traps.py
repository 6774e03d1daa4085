"""A custom reward that does what its completion says; anything but a trap is worth 1."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from typing import Any

SPEC = f"{__file__}:trap"


def loop() -> None:
    while True:
        pass


def close() -> None:
    """Leave the pipe to the service, and stay."""
    os.closerange(3, 256)
    time.sleep(600)


async def never() -> None:
    await asyncio.Event().wait()


def fail() -> None:
    raise KeyError("no such thing")


def surrogate() -> None:
    raise ValueError("a text that no encoder takes: \ud800")


TRAPS: dict[str, Callable[[], Any]] = {
    "loop": loop,
    "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "exit": lambda: os._exit(0),
    "sleep": lambda: time.sleep(600),
    "never": never,
    "close": close,
    "raise": fail,
    "surrogate": surrogate,
    "nan": lambda: float("nan"),
    "inf": lambda: {"large": float("inf")},
    "sum": lambda: {"a": 1e308, "b": 1e308},
    "text": lambda: "good",
    "none": lambda: None,
    "empty": dict,
}


def trap(completion: str, truth: Any, *, question: str | None) -> Any:
    return TRAPS.get(completion, lambda: 1.0)()
