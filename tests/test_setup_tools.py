"""`make tools` installs what is missing, says what it cannot, and is done at once where all is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import setup_tools
from setup_tools import TOOLS, main

PROGRAMS = ("chromium", "prometheus", "promtool")


class Machine:
    """A PATH of its own, with an apt-get that writes down how it is called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(setup_tools, "SYSTEMD", folder / "none")
        for tool in TOOLS.values():
            monkeypatch.delenv(tool.variable, raising=False)

    def add(self, name: str, script: str = "") -> Path:
        program = self.folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return program

    def add_apt(self, *packages: str) -> None:
        """One that has these packages; that of Prometheus has promtool too."""
        brought = {"chromium": ("chromium",), "prometheus": ("prometheus", "promtool")}
        cases = [
            f"*' {package}') for name in {' '.join(brought[package])}; do printf '' > {self.folder}/$name; "
            f"/bin/chmod 755 {self.folder}/$name; done;;"
            for package in packages
        ]
        self.add("apt-get", f'echo "$@" >> {self.folder}/calls\ncase "$*" in {" ".join(cases)} *) exit 100;; esac')

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return Machine(tmp_path, monkeypatch)


def test_nothing_is_done_where_everything_is_there(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    for name in PROGRAMS:
        machine.add(name)
    machine.add_apt()
    assert main() == 0
    assert machine.calls() == [] and capsys.readouterr() == ("", "")


def test_what_is_missing_is_installed_without_what_it_recommends(machine: Machine) -> None:
    machine.add("chromium")
    machine.add_apt("chromium", "prometheus")
    assert main() == 0
    assert machine.calls() == ["-qq update", "-qq install --yes --no-install-recommends prometheus"]


def test_a_package_that_the_system_lacks_keeps_no_other_away(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.add_apt("prometheus")
    assert main() == 1
    assert machine.calls()[1:] == [f"-qq install --yes --no-install-recommends {name}" for name in ("chromium", "prometheus")]
    assert "not here: chromium." in capsys.readouterr().err


def test_who_may_not_install_is_told_what_to_install(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.add_apt("chromium", "prometheus")
    assert main() == 1
    assert machine.calls() == []
    told = capsys.readouterr().err
    assert "apt-get install chromium prometheus" in told and "MARS_CHROMIUM, MARS_PROMETHEUS, MARS_PROMTOOL" in told


def test_a_variable_names_a_program_elsewhere(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("promtool")
    monkeypatch.setenv("MARS_PROMTOOL", str(machine.add("another")))
    assert TOOLS["promtool"].find() == str(machine.folder / "another")


def test_a_variable_that_names_no_program_is_refused_and_not_passed_over(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.add("promtool")
    monkeypatch.setenv("MARS_PROMTOOL", "/gone/promtool")
    assert main() == 1
    assert "MARS_PROMTOOL is '/gone/promtool'; expected the path of a program" in capsys.readouterr().err


def test_a_prometheus_that_serves_is_not_left_behind(machine: Machine) -> None:
    # Debian's package starts one where systemd runs.
    machine.add_apt("chromium", "prometheus")
    machine.add("systemctl", f'echo "$@" >> {machine.folder}/calls')
    setup_tools.SYSTEMD.mkdir()
    assert main() == 0
    assert machine.calls()[-1] == "disable --now prometheus"
