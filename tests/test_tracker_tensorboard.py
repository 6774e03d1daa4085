"""What TensorBoard itself reads from our event files."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from loop_doubles import Pupil, Replies, Shelf, make_run
from mars_trainer.datasets import RunData
from mars_trainer.trackers import tracking
from tracker_builders import RunFolder

pytestmark = pytest.mark.usefixtures("clean_environment")


class Shown:
    """What TensorBoard's own reader of a folder shows; it keeps everything as tensors."""

    def __init__(self, run_dir: Path) -> None:
        everything = {"scalars": 0, "images": 0, "tensors": 0}
        self._found = EventAccumulator(
            str(run_dir / "tensorboard"), size_guidance=everything, tensor_size_guidance={"scalars": 0, "images": 0, "text": 0}
        )
        self._found.Reload()

    def names(self) -> set[str]:
        """Of all curves."""
        return set(self._found.PluginTagToContent("scalars"))

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(point.step, make_ndarray(point.tensor_proto).item()) for point in self._found.Tensors(name)]

    def tables(self, occasion: str) -> list[tuple[int, str]]:
        points = self._found.Tensors(f"samples/{occasion}/text_summary")
        return [(point.step, point.tensor_proto.string_val[0].decode()) for point in points]

    def pictures(self, occasion: str) -> list[tuple[int, Image.Image]]:
        """A picture stands behind its width and height."""
        points = self._found.Tensors(f"samples/{occasion}")
        return [(point.step, Image.open(io.BytesIO(point.tensor_proto.string_val[2]))) for point in points]


def track(run: RunFolder) -> None:
    with tracking(run.recipe):
        pass


def test_curves_have_the_slash_names_and_the_runs_values(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.evaluation(0, 0.25)
    run.step(1, 0.5, gain=-0.25)
    run.step(2, 0.75)
    track(run)
    found = Shown(tmp_path)
    evaluation = {"multi": 0.25, "union": 1.0, "multi_minus_union": -0.75, "correct": 0.25, "parsed": 0.75}
    evaluation |= {"mono/visible": 0.5, "mono/infrared": 1.0}
    expected = {f"{prefix}/{name}": [(0, value)] for prefix in ("eval", "eval/digits") for name, value in evaluation.items()}
    expected |= {"reward": [(1, 0.5), (2, 0.75)], "gain": [(1, -0.25)]}
    expected |= {"seconds/training": [(1, 2.0), (2, 2.0)], "seconds/generation": [(1, 0.5), (2, 0.5)]}
    assert {name: found.curve(name) for name in found.names()} == expected


def test_samples_are_a_table_with_the_answers_and_a_picture(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.evaluation(3, 0.25, texts=("first answer", "second answer"))
    track(run)
    found = Shown(tmp_path)
    ((step, table),) = found.tables("evaluation")
    # Two samples with one answer from all sources and one from each of two.
    assert step == 3 and len(table.splitlines()) == 2 + 2 * 3
    assert "first answer" in table and "second answer" in table and "| infrared |" in table
    ((step, picture),) = found.pictures("evaluation")
    # Two rows of 2.9 inches, two sources and all of them of 3.2 inches, at 90 dots an inch.
    assert step == 3 and picture.size == (864, 522)


def test_a_hostile_answer_takes_little_room(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.evaluation(0, 0.25, texts=("<script>alert(1)</script>\x00|\n\x1b[2J$\\frac{" * 25_000,))
    track(run)
    ((_, table),) = Shown(tmp_path).tables("evaluation")
    assert len(table) < 10_000 and "more characters" in table and "<script" not in table
    assert len(Shown(tmp_path).pictures("evaluation")) == 1
    assert sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()) < 200_000


def test_a_restarted_run_is_one_curve_with_each_step_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.step(step, step / 4)
    run.evaluation(3, 0.5)
    track(run)
    run.resumed(1)
    for step in (2, 3, 4):
        run.step(step, float(step))
    track(run)
    found = Shown(tmp_path)
    assert found.curve("reward") == [(1, 0.25), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert found.curve("eval/multi") == [(3, 0.5)]
    assert [step for step, _ in found.tables("evaluation")] == [3] == [step for step, _ in found.pictures("evaluation")]


def test_a_second_start_of_a_finished_run_adds_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.step(1, 0.5)
    run.evaluation(1, 0.25)
    track(run)
    track(run)
    found = Shown(tmp_path)
    assert (found.curve("reward"), found.curve("eval/multi")) == ([(1, 0.5)], [(1, 0.25)])


KILLED = """
import sys, time
from pathlib import Path
from mars_shared.settings import load_recipe
from mars_trainer.trackers import tracking
with tracking(load_recipe(Path(sys.argv[1]))):
    time.sleep(600)
"""


def test_a_killed_process_leaves_a_curve_that_the_next_one_makes_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.step(1, 0.25)
    point = tmp_path / "tensorboard" / "point.json"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "recipe.toml")]) as process:
        while not point.exists():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert Shown(tmp_path).curve("reward") == [(1, 0.25)]
    run.step(2, 0.5)
    track(run)
    assert Shown(tmp_path).curve("reward") == [(1, 0.25), (2, 0.5)]


async def test_a_training_run_is_tracked_with_its_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARS_TRACK__SAMPLES_EVERY", "1")
    run = make_run(tmp_path, Replies(telling=range(99)), Pupil(), Shelf(), evaluation=cast(Any, Replies(telling=())))
    run.data = RunData(run.data.train, {"digits": run.data.train[:2]})
    with tracking(run.recipe):
        await run._evaluate()
        for _ in range(3):
            await run._step()
        await run._evaluate()
    found = Shown(tmp_path)
    # One of two multi-source answers a group is rewarded in all three steps; held-out answers are all rewarded.
    assert found.curve("reward") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert found.curve("eval/multi") == [(0, 1.0), (3, 1.0)]
    assert [step for step, _ in found.pictures("step")] == [1, 2, 3]
    # Three prompts a step with two answers from all sources and one from each.
    assert [len(table.splitlines()) for _, table in found.tables("step")] == [2 + 3 * 4] * 3
    assert [step for step, _ in found.tables("evaluation")] == [0, 3]
