"""Takes the pictures of docs/pictures from a run that exists: python docs/make_screenshots.py runs/demo

It starts `mars ui` and a headless Chromium; `make screenshots` trains the run first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

PORT = 8499
OUT = Path(__file__).parent / "pictures"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with a conflict among its groups")
    run = parser.parse_args().run
    OUT.mkdir(exist_ok=True)
    with served(run) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=OPTIONS)
        take(browser.new_page(viewport={"width": 1280, "height": 860}), url)
        browser.close()
    print(*sorted(str(path) for path in OUT.glob("*.png")), sep="\n")
    return 0


def take(page: Any, url: str) -> None:
    """Curves, the conflicts, the first of them, and the same on a telephone in the dark."""
    page.goto(f"{url}/#/")
    page.wait_for_selector("path.line", state="attached")
    page.screenshot(path=OUT / "curves.png")
    page.goto(f"{url}/#/groups?outcome=conflict&occasion=step")
    page.wait_for_selector("tr[data-name]")
    page.screenshot(path=OUT / "conflicts.png")
    page.locator("tr[data-name] a").first.click()
    page.wait_for_selector("figure.source img")
    page.wait_for_function("() => [...document.images].every(image => image.complete)")
    page.screenshot(path=OUT / "group.png")
    page.set_viewport_size({"width": 400, "height": 860})
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=OUT / "group-dark.png")


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of the run's page."""
    environment = {name: value for name, value in os.environ.items() if name != "MARS_API_KEY"}
    process = subprocess.Popen([sys.executable, "-m", "mars_shared.cli", "ui", run, "--port", str(PORT)], env=environment)
    url = f"http://127.0.0.1:{PORT}"
    try:
        while not answers(url):
            if process.poll() is not None:
                raise SystemExit(f"mars ui {run} ended; its message is above")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/healthz", timeout=5):
            return True
    except (URLError, OSError):
        return False


def chromium() -> str:
    found = os.environ.get("MARS_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("no Chromium here; install one (on Debian and Ubuntu: make tools)")
    return found


if __name__ == "__main__":
    sys.exit(main())
