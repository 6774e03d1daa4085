"""Install the programs that some tests need and pip has not: Chromium for the page, Prometheus for the metrics.

Debian's packages, where there is apt-get and it is root who asks; elsewhere it says what to install. Idempotent;
only the standard library. Each program may also be named by a variable, such as MARS_PROMTOOL=/opt/prometheus/promtool.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SYSTEMD = Path("/run/systemd/system")
"""Is there where systemd runs."""


@dataclass(frozen=True)
class Tool:
    """A program: its names on PATH, Debian's package of it, and the variable that names another place."""

    commands: tuple[str, ...]
    package: str
    variable: str

    def find(self) -> str | None:
        """Its path, or None if it is not here.

        Raises:
            FileNotFoundError: the variable names something that is no program.
        """
        named = os.environ.get(self.variable)
        if named and shutil.which(named) is None:
            raise FileNotFoundError(f"{self.variable} is {named!r}; expected the path of a program, or leave it unset")
        return next(filter(None, map(shutil.which, [named] if named else self.commands)), None)


TOOLS = {
    "chromium": Tool(("chromium", "chromium-browser", "google-chrome"), "chromium", "MARS_CHROMIUM"),
    "prometheus": Tool(("prometheus",), "prometheus", "MARS_PROMETHEUS"),
    "promtool": Tool(("promtool",), "prometheus", "MARS_PROMTOOL"),
}


def main() -> int:
    try:
        return install_missing()
    except FileNotFoundError as error:
        return fail(str(error))


def install_missing() -> int:
    """Exit code: 0 if every tool is there in the end."""
    if packages := sorted({tool.package for tool in missing()}):
        if not can_install():
            return fail(advice())
        say(f"installing {' and '.join(packages)}")
        apt("update")
        for package in packages:  # one by one: what one system lacks shall not keep the others away
            apt("install", "--yes", "--no-install-recommends", package)
        if "prometheus" in packages and SYSTEMD.is_dir():
            # The tests start their own; nobody asked for one that serves.
            subprocess.run(["systemctl", "disable", "--now", "prometheus"])
    return fail(advice()) if missing() else 0


def missing() -> list[Tool]:
    return [tool for tool in TOOLS.values() if tool.find() is None]


def can_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt(*arguments: str) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-qq", *arguments], env=environment, stdout=subprocess.DEVNULL)


def advice() -> str:
    packages = " ".join(sorted({tool.package for tool in missing()}))
    variables = ", ".join(tool.variable for tool in missing())
    return (
        f"not here: {packages}. Install them (on Debian as root: apt-get install {packages}), or say where they are: {variables}"
    )


def say(text: str) -> None:
    print(f"mars tools: {text}", flush=True)


def fail(text: str) -> int:
    print(f"mars tools: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
