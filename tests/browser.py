"""A real headless Chromium, and the page of a run for it to look at."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tools import chromium_path

MARS = Path(sys.executable).with_name("mars")
ROOT = Path(__file__).resolve().parent.parent
ARTEFACTS = ROOT / "runs" / "test-pictures"
"""Screenshots of the last run of the tests."""
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser that Playwright drives."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), headless=True, args=OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served_page(run_dir: Path, port: int, environment: dict[str, str]) -> Iterator[str]:
    """The address of `mars ui` of a run."""
    command = [MARS, "ui", run_dir, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def keep(page: Any, name: str) -> Path:
    """Keep a picture of the whole page for people to look at."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    path = ARTEFACTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path
