"""Trackers get everything once, over restarts, and nothing that happens in one reaches training."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from tensorboard.plugin_util import markdown_to_safe_html

from mars_shared.errors import ConfigError
from mars_shared.settings import load_recipe
from mars_shared.stack import Ports, check_start
from mars_shared.trackers import check_trackers
from mars_trainer.dry_run import main as dry_run
from mars_trainer.readable import readable
from mars_trainer.trackers import tracking
from mars_trainer.trackers.feed import Feed
from mars_trainer.trackers.runner import TrackerRunner
from mars_trainer.trackers.samples import Samples
from mars_trainer.trackers.table import Row, markdown
from tracker_builders import NotingTracker, RunFolder

pytestmark = pytest.mark.usefixtures("clean_environment")

NO_SAMPLES = "samples = 0"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Without tables and pictures."""
    return RunFolder(tmp_path, NO_SAMPLES)


def feed_of(run: RunFolder, tracker: NotingTracker, lost: list[Exception] | None = None) -> Feed:
    on_lost: Callable[[Exception], None] = [].append if lost is None else lost.append
    return Feed(tracker, run.path, run.path / "point.json", Samples(run.path, run.recipe.track), on_lost)


def runner_of(run: RunFolder, tracker: NotingTracker, name: str) -> TrackerRunner:
    return TrackerRunner(name, tracker.open, run.recipe, Samples(run.path, run.recipe.track), retry_s=0.001)


def failures(name: str) -> float:
    return REGISTRY.get_sample_value("mars_tracker_failures_total", {"tracker": name}) or 0.0


def test_steps_and_evaluations_come_in_order_and_once(run: RunFolder) -> None:
    tracker = NotingTracker(can_rewind=True)
    feed = feed_of(run, tracker)
    run.evaluation(0, 0.25)
    run.step(1, 0.5)
    feed.bring()
    run.step(2, 0.75)
    feed.bring()
    feed.bring()
    assert tracker.notes == [("eval/multi", 0, 0.25), ("reward", 1, 0.5), ("reward", 2, 0.75)]


def test_a_tracker_opened_again_gets_what_it_lacks_and_forgets_what_it_may_have_got_twice(run: RunFolder) -> None:
    run.step(1, 0.5)
    feed_of(run, NotingTracker(can_rewind=True)).bring()
    run.step(2, 0.75)
    again = NotingTracker(can_rewind=True)
    feed_of(run, again).bring()
    assert again.notes == [("rewind", 1, None), ("reward", 2, 0.75)]


@pytest.mark.parametrize("content", [b"", b"\xff{", b'{"events": 1', b'{"events": -1, "step": 0}', b'{"events": "many"}'])
def test_a_damaged_place_is_told_and_the_tracker_gets_everything_once_more(
    run: RunFolder, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run.evaluation(0, 0.25)
    run.step(1, 0.5)
    (run.path / "point.json").write_bytes(content)
    tracker = NotingTracker(can_rewind=True)
    feed_of(run, tracker).bring()
    assert tracker.notes == [("rewind", -1, None), ("eval/multi", 0, 0.25), ("reward", 1, 0.5)]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "point.json is damaged" in record.getMessage()
    again = NotingTracker(can_rewind=True)
    feed_of(run, again).bring()
    assert again.notes == [("rewind", 1, None)]


def repeated(run: RunFolder) -> None:
    """Steps 1 to 3 and the evaluation at 3, then from the checkpoint of step 1 once more; an evaluation is not repeated."""
    for step in (1, 2, 3):
        run.step(step, step / 4)
    run.evaluation(3, 0.5)
    run.resumed(1)
    run.step(2, 2.0)
    run.step(3, 3.0)


def test_steps_that_a_restart_repeats_count_as_done_last_and_evaluations_stay(run: RunFolder) -> None:
    tracker = NotingTracker(can_rewind=True)
    repeated(run)
    feed_of(run, tracker).bring()
    assert tracker.notes[:4] == [("reward", 1, 0.25), ("reward", 2, 0.5), ("reward", 3, 0.75), ("eval/multi", 3, 0.5)]
    assert tracker.notes[4:] == [("rewind", 1, None), ("eval/multi", 3, 0.5), ("reward", 2, 2.0), ("reward", 3, 3.0)]


def test_the_evaluation_after_the_checkpoint_also_outlives_a_tracker_that_begins_behind_it(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.step(step, step / 4)
    run.evaluation(3, 0.5)
    feed_of(run, NotingTracker(can_rewind=True)).bring()
    run.resumed(1)
    run.step(2, 2.0)
    again = NotingTracker(can_rewind=True)
    feed_of(run, again).bring()
    assert again.notes == [("rewind", 3, None), ("rewind", 1, None), ("eval/multi", 3, 0.5), ("reward", 2, 2.0)]


def test_a_tracker_that_takes_nothing_back_keeps_the_first_of_repeated_steps(run: RunFolder) -> None:
    tracker = NotingTracker(can_rewind=False)
    repeated(run)
    run.step(4, 4.0)
    feed_of(run, tracker).bring()
    assert tracker.notes == [
        ("reward", 1, 0.25),
        ("reward", 2, 0.5),
        ("reward", 3, 0.75),
        ("eval/multi", 3, 0.5),
        ("reward", 4, 4.0),
    ]


def test_every_evaluation_shows_the_same_samples_and_steps_show_theirs_at_intervals(tmp_path: Path) -> None:
    run, tracker = RunFolder(tmp_path, "samples = 2"), NotingTracker(can_rewind=True)
    run.evaluation(0, 0.25, texts=("a", "b", "c"))
    run.evaluation(3, 0.5, texts=("d", "e", "f"))
    feed_of(run, tracker).bring()
    shown = [note for note in tracker.notes if note[0] == "groups of evaluation"]
    assert shown == [("groups of evaluation", step, ["sample-0", "sample-1"]) for step in (0, 3)]
    samples = Samples(run.path, run.recipe.track)
    assert samples._is_due(("step", 50)) and not samples._is_due(("step", 51))


def test_samples_whose_images_are_gone_are_shown_without_a_picture(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.evaluation(0, 0.25)
    for blob in (run.path / "blobs").rglob("*"):
        if blob.is_file():
            blob.unlink()
    shown = Samples(run.path, run.recipe.track).of("evaluation", 0)
    assert shown is not None and shown.picture is None and [group.prompt_id for group in shown.groups] == ["sample-0"]


def test_samples_that_a_tracker_cannot_take_are_left_out_and_told_and_numbers_go_on(tmp_path: Path) -> None:
    run, lost = RunFolder(tmp_path), list[Exception]()
    tracker = NotingTracker(can_rewind=True, faults={"groups": [ValueError("too large")]})
    run.evaluation(0, 0.25)
    run.step(1, 0.5)
    run.evaluation(1, 0.75)
    feed_of(run, tracker, lost).bring()
    assert [str(error) for error in lost] == ["too large"]
    numbers = [("eval/multi", 0, 0.25), ("reward", 1, 0.5), ("eval/multi", 1, 0.75)]
    assert tracker.notes == [*numbers, ("groups of evaluation", 1, ["sample-0"])]


def test_what_fails_is_told_once_counted_and_tried_again_until_it_works(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    faults: dict[str, list[Exception]] = {
        "open": [OSError("no network")] * 2,
        "scalars": [OSError("no network")],
        "flush": [OSError("disk full")],
    }
    tracker = NotingTracker(can_rewind=False, faults=faults)
    run.step(1, 0.5)
    runner = runner_of(run, tracker, "flaky")
    with caplog.at_level(logging.WARNING):
        runner.start()
        while tracker.opened < 5 or len(tracker.notes) < 2:
            run.path.stat()  # the thread comes to it in its time
        runner.ask_to_end()
        assert runner.wait(60)
    # Twice it does not open, then scalars fail, then flush does, after which the step comes once more; then all is well.
    assert (failures("flaky"), tracker.opened, tracker.closed) == (4, 5, 3)
    assert tracker.notes == [("reward", 1, 0.5)] * 2
    assert [record.message.partition("on: ")[2] for record in caplog.records] == ["OSError: no network", "OSError: disk full"]


def test_nobody_waits_for_a_tracker_that_hangs(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    tracker = NotingTracker(can_rewind=True)
    tracker.hangs = threading.Event()
    run.step(1, 0.5)
    runner = runner_of(run, tracker, "hanging")
    runner.start()
    runner.ask_to_end()
    assert not runner.wait(0.01)
    assert "tracker hanging did not catch up" in caplog.text
    tracker.hangs.set()
    assert runner.wait(60) and tracker.notes == [("reward", 1, 0.5)]


HANGING = """
import atexit, sys, threading
from mars_trainer.trackers.runner import exit_despite_trackers
atexit.register(threading.Event().wait)
threading.Thread(target=threading.Event().wait, name="tracker hanging", daemon=True).start()
def main():
    {end}
exit_despite_trackers(main)
"""


@pytest.mark.parametrize(("end", "code"), [("return 3", 3), ("raise ValueError('surprise')", 1)])
def test_a_process_ends_with_its_exit_code_though_a_tracker_waits_at_the_exit_for_ever(end: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", HANGING.format(end=end)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code and ("surprise" in done.stderr) == (code == 1)


@pytest.mark.parametrize("track", ["trackers = []", 'trackers = ["wandb", "tensorboard"]'])
def test_any_number_of_trackers_can_be_chosen(tmp_path: Path, track: str) -> None:
    assert list(RunFolder(tmp_path, track).recipe.track.trackers) == ([] if "[]" in track else ["wandb", "tensorboard"])


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "trackers = []")
    before = set(tmp_path.iterdir())
    with tracking(run.recipe):
        assert not any(thread.name.startswith("tracker") for thread in threading.enumerate())
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ('trackers = ["wandb", "wandb"]', "a tracker is named twice"),
        ('trackers = ["aim"]', "'tensorboard' or 'wandb'"),
        ("samples_every = 0", "track.samples_every = 0"),
    ],
)
def test_wrong_settings_of_trackers_are_refused(tmp_path: Path, track: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunFolder(tmp_path, track)


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_starts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", cast(Any, None))  # as importlib sees what cannot be imported
    monkeypatch.setenv("MARS_TRACK__TRACKERS", '["tensorboard", "wandb"]')
    monkeypatch.setenv("MARS_RUN__DIR", str(tmp_path / "run"))
    recipe = load_recipe(root / "recipes/digits.toml")
    with pytest.raises(ConfigError, match="names 'wandb', whose package is not installed"):
        check_start(recipe, Ports(28100))
    with pytest.raises(ConfigError), tracking(recipe):
        pytest.fail("it began")
    assert dry_run(["--recipe", str(root / "recipes/digits.toml")]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_named_as_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foldertracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="names 'foldertracker', whose package is not installed"):
        check_trackers(cast(Any, ("foldertracker",)))


class Cells(HTMLParser):
    """What stands in a page's cells, and every tag there is."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        elif tag == "br":
            self.cells[-1] += "\n"

    def handle_data(self, data: str) -> None:
        if data.strip("\n"):
            self.cells[-1] += data.replace("\n", " ")  # as a browser shows it


@given(st.text(st.characters(blacklist_categories=())), st.text("|<>&`*_[]()#!\\-~ \n\tax1.:$"))
def test_a_table_shows_any_text_as_it_stands(answer: str, question: str) -> None:
    asked, said = readable(question, 100).strip(), readable(answer, 100).strip()
    found = Cells(markdown_to_safe_html(markdown([Row("p", asked, "7", "all sources", said, 1.5, True, None)])))
    assert found.tags <= {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert found.cells == [*Row._fields, "p", asked, "7", "all sources", said, "1.500", "True", ""]


def test_long_texts_are_cut_and_say_so_and_what_is_invisible_is_escaped() -> None:
    assert readable("x" * 1_000_000, 3) == "xxx ... (999,997 more characters)"
    assert readable("a\x00b\x1b[31m\u202ec\ud800\nd\té", 100) == "a\\x00b\\x1b[31m\\u202ec\\ud800\nd\\té"
