"""What several test files need: one real Valkey for the whole session."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from mars_shared.queue import Queue
from mars_shared.server import EmbeddedValkey

pytest_plugins = ["rollout_fixtures", "live_run"]

# A busy machine makes nothing wrong: no test of ours judges by the clock.
settings.register_profile("mars", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mars")

ROOT = Path(__file__).resolve().parent.parent


class Tables:
    """Rows that tests want people to read; printed by title at the end of the run."""

    def __init__(self) -> None:
        self.rows: defaultdict[str, list[dict[str, str]]] = defaultdict(list)

    def add(self, title: str, **row: str) -> None:
        self.rows[title].append(row)


TABLES = Tables()


@pytest.fixture
def tables() -> Tables:
    return TABLES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for title, rows in TABLES.rows.items():
        terminalreporter.section(title)
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
        for row in [{name: name for name in widths}, *rows]:
            terminalreporter.write_line("  ".join(row[name].ljust(width) for name, width in widths.items()))


@pytest.fixture(autouse=True)
def warnings_are_logged() -> None:
    """vLLM raises the root logger's level for the rest of the process."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path_factory.mktemp("session-valkey")) as server:
        yield server


@pytest.fixture
async def patient_queue(valkey: EmbeddedValkey) -> AsyncIterator[Queue]:
    """A queue whose leases outlast any test."""
    queue = Queue(valkey.url, lease_s=600)
    yield queue
    await queue.close()


@pytest.fixture
def run_name(request: pytest.FixtureRequest) -> str:
    """A run, hence streams, of the test's own."""
    return re.sub(r"\W", "_", request.node.name)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No MARS_* variable of whoever runs the tests reaches the test."""
    for name in [name for name in os.environ if name.startswith("MARS_")]:
        monkeypatch.delenv(name)
    return monkeypatch
