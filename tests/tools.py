"""Programs that some tests need and pip has not; without them those tests are skipped."""

from __future__ import annotations

import pytest

from setup_tools import TOOLS


def chromium_path() -> str:
    return _path_of("chromium")


def prometheus_path() -> str:
    return _path_of("prometheus")


def promtool_path() -> str:
    return _path_of("promtool")


def _path_of(name: str) -> str:
    """Skips the test if the program is not here; a variable that names none fails it."""
    tool = TOOLS[name]
    path = tool.find()
    if path is None:
        pytest.skip(f"{name} is not here; `make tools` installs it, or {tool.variable} says where it is")
    return path
