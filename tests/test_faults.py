"""Fault points: every one is in the code, strikes once a run, and does nothing unless it is asked for."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mars_shared.errors import ConfigError
from mars_shared.faults import POINTS, arm, fault

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "import sys; from pathlib import Path; from mars_shared.faults import arm, fault; arm(Path(sys.argv[1]))\n"


def passing(run_dir: Path, points: str, *, times: int = 1, point: str = "trainer.after_step") -> subprocess.CompletedProcess[str]:
    """A process that passes a point so many times and then says so."""
    script = SCRIPT + f"for _ in range({times}): fault({point!r})\nprint('survived')"
    environment = {"MARS_FAULT": points, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run([sys.executable, "-c", script, run_dir], capture_output=True, text=True, env=environment)


def test_every_point_stands_in_the_code_of_its_service_and_every_point_of_the_code_in_the_list() -> None:
    files = [file for folder in ("services", "shared") for file in (ROOT / folder).rglob("*.py") if file.name != "faults.py"]
    found = [point for file in files for point in re.findall(r'\bfault\("([a-z_.]+)"\)', file.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(POINTS), "each exactly once"


def test_an_armed_point_kills_its_process_once_a_run(tmp_path: Path) -> None:
    assert passing(tmp_path, "trainer.after_step").returncode == -signal.SIGKILL
    assert passing(tmp_path, "trainer.after_step").stdout == "survived\n"
    assert [path.name for path in (tmp_path / "faults").iterdir()] == ["trainer.after_step"]


def test_a_point_may_strike_at_a_later_pass(tmp_path: Path) -> None:
    assert passing(tmp_path, "trainer.after_step@3", times=2).stdout == "survived\n"
    assert passing(tmp_path, "trainer.after_step@3", times=3).returncode == -signal.SIGKILL


def test_other_points_are_not_struck(tmp_path: Path) -> None:
    assert passing(tmp_path, "trainer.before_step,reward.after_claim@2").stdout == "survived\n"


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARS_FAULT", "trainer.before_commit:full")
    arm(tmp_path)
    try:
        with pytest.raises(OSError) as raised:
            fault("trainer.before_commit")
        assert raised.value.errno == errno.ENOSPC
        fault("trainer.before_commit")
    finally:
        monkeypatch.delenv("MARS_FAULT")
        arm(tmp_path)


@pytest.mark.parametrize("wrong", ["trainer.after_lunch", "trainer.after_step@0", "trainer.after_step:empty", "boom"])
def test_what_names_no_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("MARS_FAULT", wrong)
    with pytest.raises(ConfigError, match="MARS_FAULT: .* is no fault; expected POINT"):
        arm(tmp_path)
