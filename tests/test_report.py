"""After a run: the table, the pictures and summary.json, from the run's own files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from builders import image_bytes, make_group, make_prompt, make_score, make_scored, sampling
from mars_shared.blobs import BlobStore
from mars_shared.contracts import BoxesTruth, Purpose, ScoredGroup
from mars_shared.errors import ConfigError
from mars_shared.settings import load_recipe
from mars_shared.telemetry import EventLog
from mars_trainer.evaluate import Evaluation
from mars_trainer.group_log import GroupLog
from mars_trainer.report import report, summarise_run
from mars_trainer.timeline import STAGES

RECIPE = """
[run]
name = "told"
dir = "{dir}"
seed = 5
[model]
path = "{dir}"
max_model_len = 64
[data]
dataset = "scene"
[rollout]
num_generations = 1
max_completion_length = 8
[train]
steps = 2
prompts_per_step = 1
learning_rate = 1e-3
"""
BEFORE = Evaluation(
    samples=4,
    multi=0.25,
    mono={"visible": 0.5, "infrared": 0.25},
    union=0.75,
    parsed=1.0,
    correct=0.25,
    intervals=dict.fromkeys(("multi", "mono/visible", "mono/infrared", "union", "multi_minus_union"), (0.0, 0.5)),
)
AFTER = replace(BEFORE, multi=0.75, intervals=BEFORE.intervals | {"multi": (0.625, 0.875)})
STEP = {"metrics": {"reward": 1.0, "gain": 0.5, "conflict_rate": 0.25, "no_signal_rate": 0.0}, "steps": 2}
SECONDS = dict(zip(STAGES, (2.0, 0.25, 4.0, 0.5, 1.25), strict=True))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of two steps."""
    (tmp_path / "recipe.toml").write_text(RECIPE.format(dir=tmp_path))
    log = EventLog(tmp_path / "events.jsonl")
    log.write("evaluation", step=0, **BEFORE.as_dict(), seconds=1.0)
    for step in (1, 2):
        log.write("step", step=step, seconds=SECONDS, window=(0.0, 8.0), **STEP)
    log.write("evaluation", step=2, **AFTER.as_dict(), seconds=1.0)
    log.write("finished", step=2, weights="f" * 64)
    log.write("work", cpu_s=12.0, wall_s=8.0, cores=2, efficiency=0.75)
    GroupLog(tmp_path / "groups").evaluation(2, [evaluated(BlobStore(tmp_path / "blobs"))])
    return tmp_path


def evaluated(blobs: BlobStore) -> ScoredGroup:
    """An evaluation group about two real images, answered with a box."""
    prompt = make_prompt(purpose=Purpose.EVAL, spec=sampling(1, 1, greedy=True))
    stored = blobs.put(image_bytes((56, 56)))
    sources = tuple(source.model_copy(update={"blob": stored}) for source in prompt.sources)
    truth = BoxesTruth(boxes=((5, 5, 30, 50),), width_px=56, height_px=56)
    group = make_group(prompt.model_copy(update={"sources": sources, "truth": truth}))
    boxed = tuple(
        c.model_copy(update={"text": '<answer>[{"bbox_2d": [4, 4, 30, 50]}] costs 5$</answer>'}) for c in group.completions
    )
    return make_scored(group.model_copy(update={"completions": boxed}), [make_score(0.5)] * 3)


def test_the_summary_says_what_was_before_and_after_and_where_the_time_went(run: Path) -> None:
    said = io.StringIO()
    report(load_recipe(run / "recipe.toml"), Console(file=said, width=120))
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["seed"], summary["steps"], summary["efficiency"]) == (5, 2, 0.75)
    assert (summary["before"]["multi"], summary["after"]["multi"]) == (0.25, 0.75)
    assert summary["after"]["mono"] == {"visible": 0.5, "infrared": 0.25} and summary["after"]["union"] == 0.75
    assert summary["seconds"] == {stage: 2 * seconds for stage, seconds in SECONDS.items()}
    rows = [line.split("│")[1:-1] for line in said.getvalue().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["Multi", "0.250", "0.750", "0.625 to 0.875", "+0.500"] in cells
    assert ["Multi - Union", "-0.500", "0.000", "0.000 to 0.500", "+0.500"] in cells
    assert ["generation", "8.0", "50%"] in cells and ["1-1", "1.000", "0.500", "0.250", "0.000"] in cells


def test_the_pictures_can_be_opened(run: Path) -> None:
    report(load_recipe(run / "recipe.toml"), Console(file=io.StringIO()))
    for name in ("curves.png", "groups.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10


def test_records_of_held_out_samples_that_cannot_be_read_are_named(run: Path) -> None:
    for segment in (run / "groups").glob("*.jsonl"):
        segment.write_text("{torn\n")
    with pytest.raises(ConfigError, match="no record of a held-out sample can be read"):
        report(load_recipe(run / "recipe.toml"), Console(file=io.StringIO()))


def test_a_run_that_has_not_finished_is_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(dir=tmp_path))
    EventLog(tmp_path / "events.jsonl").write("evaluation", step=0, **BEFORE.as_dict(), seconds=1.0)
    command = [sys.executable, "-m", "mars_trainer.report", "--recipe", str(tmp_path / "recipe.toml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "1 evaluations and 0 steps in the run's events; expected a finished run" in done.stderr


@pytest.mark.parametrize("events", [[], [{"event": "evaluation", "step": 0}]])
def test_a_summary_needs_two_evaluations_and_a_step(events: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="expected a finished run"):
        summarise_run(events, seed=0)
