"""What W&B keeps offline, as it would send it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from mars_trainer.trackers import tracking
from mars_trainer.trackers.wandb import run_id
from tracker_builders import RunFolder
from wandb_files import history

TRACK = 'trackers = ["wandb"]\nsamples_every = 1'


@pytest.fixture(autouse=True)
def offline(clean_environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, nothing of whoever runs the tests, no process left behind."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB__DISABLE_STATS": "true"}.items():
        clean_environment.setenv(name, value)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        clean_environment.setenv(name, str(tmp_path / "home"))
    yield
    assert [child.name() for child in psutil.Process().children() if "wandb" in child.name()] == []


def track(run: RunFolder) -> None:
    with tracking(run.recipe):
        pass


def files(run: RunFolder) -> list[Path]:
    """Those of all starts, in their order."""
    return sorted((run.path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def curve(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def test_numbers_tables_and_pictures_are_kept_by_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, TRACK)
    run.evaluation(0, 0.25, texts=("the answer \x00 <b>", "x" * 5000))
    run.step(1, 0.5)
    run.step(2, 0.75)
    track(run)
    (file,) = files(run)
    rows = history(file)
    assert curve(rows, "reward") == [(1, 0.5), (2, 0.75)] and curve(rows, "seconds/training") == [(1, 2.0), (2, 2.0)]
    assert curve(rows, "eval/multi") == [(0, 0.25)] == curve(rows, "eval/digits/multi")
    assert curve(rows, "eval/mono/infrared") == [(0, 1.0)]
    (picture,) = (file.parent / "files/media/images/samples/evaluation").iterdir()
    assert Image.open(picture).size == (864, 522)
    (table,) = (file.parent / "files/media/table/samples/evaluation").iterdir()
    found = json.loads(table.read_text())
    answers = [row[found["columns"].index("answer")] for row in found["data"]]
    # What is answered from each source alone is 7.
    assert answers == ["the answer \\x00 <b>", "7", "7", "x" * 1000 + " ... (4,000 more characters)", "7", "7"]


def test_all_starts_of_a_run_are_one_run_of_wandbs_and_no_step_is_there_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, TRACK)
    for step in (1, 2, 3):
        run.step(step, step / 4)
    track(run)
    run.resumed(1)
    for step in (2, 3, 4):
        run.step(step, float(step))
    track(run)
    name = f"run-{run_id(tmp_path / 'wandb')}.wandb"
    assert [file.name for file in files(run)] == [name, name]
    rows = [row for file in files(run) for row in history(file)]
    # W&B takes nothing back: steps 2 and 3 are what they were the first time.
    assert curve(rows, "reward") == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 4.0)]


def test_a_run_is_named_by_the_recipe_and_tells_its_settings_without_a_url_that_may_hold_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARS_WEIGHTS__URL", "s3://user:secret@bucket/run")
    run = RunFolder(tmp_path, TRACK + '\nproject = "fusion"')
    run.step(1, 0.5)
    track(run)
    (file,) = files(run)
    content = file.read_bytes()
    assert b"tracked" in content and b"fusion" in content and b"prompts_per_step" in content
    assert b"secret" not in content
