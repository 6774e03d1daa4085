"""A replica's own folder: alone in it, and nothing is left of replicas that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mars_rollout.scratch import scratch_folder
from mars_shared.errors import ConfigError
from mars_shared.settings import Recipe
from test_publish import make_recipe

HOLD = """
import sys, time
from pathlib import Path
from mars_rollout.scratch import scratch_folder
from test_publish import make_recipe
with scratch_folder(make_recipe(Path(sys.argv[1]), scratch=Path(sys.argv[1]) / "scratch"), sys.argv[2]) as folder:
    (folder / "weights").write_text("large")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def recipe(tmp_path: Path, clean_environment: pytest.MonkeyPatch) -> Recipe:
    return make_recipe(tmp_path, scratch=tmp_path / "scratch")


def holder(folder: Path, replica: str) -> tuple[subprocess.Popen[str], Path]:
    """Another process that holds a replica's folder."""
    command = [sys.executable, "-c", HOLD, str(folder), replica]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_is_empty_private_and_gone_afterwards(recipe: Recipe) -> None:
    with scratch_folder(recipe, "rollout-0") as folder:
        assert list(folder.iterdir()) == []
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "weights").write_text("large")
    assert not folder.exists()


def test_two_replicas_of_one_name_do_not_share_it(recipe: Recipe) -> None:
    with (
        scratch_folder(recipe, "rollout-0"),
        scratch_folder(recipe, "rollout-1"),
        pytest.raises(ConfigError, match="another replica 'rollout-0' of run 'r' is at work here"),
        scratch_folder(recipe, "rollout-0"),
    ):
        pass


def test_what_a_killed_replica_left_goes_when_another_begins(recipe: Recipe, tmp_path: Path) -> None:
    killed, left = holder(tmp_path, "killed")
    living, kept = holder(tmp_path, "living")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "weights").exists()
        with scratch_folder(recipe, "rollout-0"):
            assert not left.exists()
            assert (kept / "weights").exists()
    finally:
        living.kill()
        living.wait()
