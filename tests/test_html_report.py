"""`mars report`: the conflict atlas by hand, what a report shows of whole and of broken runs, and what hostile text does to it."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from builders import image_bytes
from command_line import CommandLine, command_line
from mars_shared.blobs import BlobStore
from mars_shared.contracts import Purpose, Source
from mars_shared.contracts.prompt import BoxesTruth
from mars_shared.errors import ConfigError
from mars_shared.records.groups import GroupRecord
from mars_shared.records.segments import Line
from mars_shared.report.atlas import Share, evaluation_atlas, training_atlas, worst
from mars_shared.report.atlas_view import SHOWN_GROUPS
from mars_shared.report.charts import Series, line_chart, padded, stacked_chart, ticks
from mars_shared.report.history import ALIVE_S, Groups, read_history
from mars_shared.report.markup import SHOWN_CHARACTERS, VOID, said, tag
from mars_shared.report.numbers import duration
from mars_shared.report.pictures import data_uri
from mars_shared.report.write import render, write_report
from run_folders import RunFolder

__all__ = ["command_line"]

REWARDS = {
    # step: multi, multi, visible, infrared -> gain over visible, over infrared
    1: (0.0, 0.0, 1.0, 0.0),  # -1, 0
    2: (0.0, 0.0, 1.0, 0.5),  # -1, -0.5
    3: (1.0, 1.0, 0.0, 0.0),  # +1, +1
    4: (0.5, 0.5, 0.5, 0.5),  # 0, 0
    5: (0.25, 0.25, 0.0, 1.0),  # +0.25, -0.75
    6: (1.0, 0.0, 1.0, 0.0),  # -0.5, +0.5
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Six steps of one group each, and an evaluation of one sample before and after them."""
    run = RunFolder(tmp_path)
    run.start()
    run.evaluation(0, 0.25, run.group(90, (0.0, 1.0, 0.0), purpose=Purpose.EVAL))
    for step, rewards in REWARDS.items():
        run.step(step, run.group(step, rewards), gain=float(step))
    run.evaluation(6, 0.5, run.group(90, (1.0, 0.0, 0.0), purpose=Purpose.EVAL))
    return run


def html_of(run: RunFolder) -> str:
    return write_report(run.folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page's elements and text; refuses what is not nested."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def names(self) -> set[str]:
        return {name for name, _ in self.elements}

    def links(self) -> list[str]:
        """Everything that a browser could follow or load."""
        loading = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "xlink:href", "style"}
        return [value for _, attributes in self.elements for name, value in attributes.items() if name in loading]


def test_the_atlas_counts_what_a_hand_counts(run: RunFolder) -> None:
    facts = [line.facts for line in Groups(run.folder / "groups").lines]
    visible, infrared = training_atlas(facts)
    assert (visible.dataset, visible.source, infrared.source) == ("digits", "visible", "infrared")
    # Steps 1, 2 and 6 lose to visible, by 1, 1 and 0.5; the first third is steps 1 and 2, the last 5 and 6.
    assert visible.all == Share(groups=6, losing=3, deficit=pytest.approx(2.5 / 3))
    assert (visible.first, visible.last) == (Share(2, 2, 1.0), Share(2, 1, 0.5))
    assert visible.all.rate == 0.5 and visible.change == -0.5
    # Steps 2 and 5 lose to infrared, by 0.5 and 0.75.
    assert infrared.all == Share(6, 2, 0.625)
    assert (infrared.first, infrared.last, infrared.change) == (Share(2, 1, 0.5), Share(2, 1, 0.75), 0.0)


def test_the_atlas_of_evaluations_sets_the_first_against_the_last(run: RunFolder) -> None:
    visible, infrared = evaluation_atlas([line.facts for line in Groups(run.folder / "groups").lines])
    assert (visible.all, visible.first, visible.last) == (Share(2, 1, 1.0), Share(1, 1, 1.0), Share(1, 0, None))
    assert (infrared.all, infrared.change) == (Share(2, 0, None), 0.0)


def test_the_worst_groups_are_those_of_the_last_third_first_then_by_deficit(run: RunFolder) -> None:
    lines = Groups(run.folder / "groups").lines
    # Step 6 is late, though it loses by 0.5 alone; 1 and 2 lose by 1 each.
    assert [line.facts["step"] for line in worst(lines, "visible", 9)] == [6, 1, 2]
    assert [line.facts["step"] for line in worst(lines, "infrared", 1)] == [5]


def test_a_source_that_no_group_was_asked_from_has_no_rate() -> None:
    assert training_atlas([]) == [] and Share(0, 0, None).rate is None


def test_a_report_has_all_its_parts_and_loads_nothing(run: RunFolder) -> None:
    run.events.write("finished", step=6, weights="ab" * 32)
    page = Page(html_of(run))
    assert "script" not in page.names() and "link" not in page.names() and "iframe" not in page.names()
    assert all(link.startswith(("#", "data:image/")) for link in page.links()) and page.links()
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"}
    assert [attributes for name, attributes in page.elements if name == "meta"][1] == policy
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert targets == {"evaluations", "curves", "conflict-atlas", "time", "incidents", "recipe", "versions"}
    assert targets == {link[1:] for link in page.links() if link.startswith("#")}
    assert "finished at step 6 of 6" in page.text and "version 1.6" in page.text
    for said_somewhere in ("gain over visible −1.000", "train", "0.001", "torch", "2.9.1", "A CPU", "0 throughout: kl."):
        assert said_somewhere in page.text


def test_the_style_refers_to_nothing_outside_of_the_page(run: RunFolder) -> None:
    style = html_of(run).partition("<style>")[2].partition("</style>")[0]
    assert style and not re.search(r"url\(|@import|https?:|<", style)


def test_every_handler_and_attribute_of_a_report_is_one_of_ours(run: RunFolder) -> None:
    names = {name for _, attributes in Page(html_of(run)).elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]


HOSTILE = (
    "</span><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"
    "\x00\x1b[31m\u202egnp.exe\u2066 &lt;b&gt; <!-- <style>*{display:none}</style> '\" javascript:alert(1)"
)


def test_hostile_text_is_shown_as_text_wherever_it_comes_from(run: RunFolder) -> None:
    run.step(7, run.group(7, REWARDS[1], text="A" * 3_000))
    run.events.write("dead", reason="ImageError", prompt_id="sample", task_id="train-0")
    harmless = Page(html_of(run))
    run.step(7, run.group(7, REWARDS[1], text=HOSTILE + "A" * 1_000_000, question=HOSTILE))
    run.events.write("dead", reason=f"ImageError: {HOSTILE}", prompt_id=HOSTILE, task_id="train-1")
    page = Page(html_of(run))
    assert page.names() == harmless.names() and "script" not in page.names()
    assert all(link.startswith(("#", "data:image/")) for link in page.links())
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    shown = (
        HOSTILE.replace("\x00", r"\u0000").replace("\x1b", r"\u001b").replace("\u202e", r"\u202e").replace("\u2066", r"\u2066")
    )
    # The question, three answers (two with all sources, one from visible alone), the reason and the prompt of the dead letter.
    assert page.text.count(shown) == 6
    assert f"the first 2,000 of {len(HOSTILE) + 1_000_000:,} characters" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", html_of(run))


def test_a_huge_answer_leaves_a_report_small(run: RunFolder) -> None:
    before = len(html_of(run))
    run.step(7, run.group(7, REWARDS[1], text="B" * 1_000_000))
    assert len(html_of(run)) - before < 20 * SHOWN_CHARACTERS


def test_text_is_kept_apart_from_the_direction_of_what_is_around_it() -> None:
    assert said("a <b>\u202e") == r"<span><bdi>a &lt;b&gt;\u202e</bdi></span>"
    assert said("\u2028\u2029\ufe0f\U000e0041\U000e0101") == r"<span><bdi>\u2028\u2029\ufe0f\u{e0041}\u{e0101}</bdi></span>"
    assert said("abcdef", limit=3) == '<span><bdi>abc</bdi><span class="cut"> … the first 3 of 6 characters</span></span>'
    assert (
        tag("th", "<", title='"\x00', colspan=2, hidden=True, id=None) == '<th title="&quot;\\u0000" colspan="2" hidden>&lt;</th>'
    )


def test_half_a_surrogate_pair_in_an_event_is_shown_by_its_code(run: RunFolder) -> None:
    with run.events.path.open("a") as file:
        file.write(json.dumps({"time": 1.0, "event": "dead", "reason": "broken \ud83d name"}) + "\n")
    assert r"broken \ud83d name" in Page(html_of(run)).text


def test_boxes_are_drawn_in_original_pixels_over_the_scaled_image(run: RunFolder) -> None:
    truth = BoxesTruth(boxes=((10, 20, 40, 80),), width_px=112, height_px=100)
    run.step(7, run.group(7, (0.0, 0.0, 1.0, 0.0), truth=truth, boxes=[(1, 2, 30, 40)]))
    html = html_of(run)
    assert html.count('viewBox="0 0 112 100"') == 2  # one for each source
    assert html.count('<rect x="10.0" y="20.0" width="30.0" height="60.0" class="truth"') == 2
    # Two multi-source answers in each image, the mono-source one in that of its source alone.
    assert html.count('<rect x="1.0" y="2.0" width="29.0" height="38.0" class="multi"') == 4
    assert html.count('<rect x="1.0" y="2.0" width="29.0" height="38.0" class="mono"') == 2


def test_an_image_that_is_gone_is_said_to_be_missing(run: RunFolder) -> None:
    whole = html_of(run)
    for blob in (run.folder / "blobs/kept").glob("*/*"):
        blob.unlink()
    page = Page(html_of(run))
    assert "The image is missing." not in whole and whole.count("data:image/png") > 0
    assert page.text.count("The image is missing.") == whole.count("data:image/png") and "img" not in page.names()


def test_an_image_with_other_bytes_than_its_name_says_is_missing_too(run: RunFolder) -> None:
    (blob,) = (run.folder / "blobs/kept").glob("*/*")
    blob.write_bytes(b"torn")
    assert "The image is missing." in Page(html_of(run)).text


def test_only_the_groups_that_are_shown_are_read_whole(run: RunFolder) -> None:
    for step in range(7, 30):
        run.step(step, run.group(step, REWARDS[2], text="loses to both"))
    asked: list[Line] = []

    class Counted(Groups):
        def record(self, line: Line) -> GroupRecord:
            asked.append(line)
            return super().record(line)

    render(read_history(run.folder), Counted(run.folder / "groups"), run.blobs)
    assert len(asked) == 2 * SHOWN_GROUPS


def test_an_index_of_another_version_is_left_aside_for_its_segment(run: RunFolder) -> None:
    atlas = html_of(run).partition("Conflict atlas</h2>")[2].partition("Time</h2>")[0]
    size = (run.folder / "groups/000001.jsonl").stat().st_size
    row = {"offset": 0, "size": size - 1, "facts": {"name": "a", "step": 1}}
    (run.folder / "groups/000001.index.jsonl").write_text(json.dumps(row) + "\n")
    assert atlas and atlas in html_of(run)


def test_records_that_cannot_be_read_are_left_out_and_their_number_is_said(run: RunFolder) -> None:
    assert "0 records of groups could not be read" in Page(html_of(run)).text
    segment = run.folder / "groups/000001.jsonl"
    first, second, *others = segment.read_bytes().splitlines(keepends=True)
    newer = second.replace(b'"schema_version": 1', b'"schema_version": 2')
    assert newer != second
    segment.write_bytes(b"".join([first[:100] + b"\n", newer, b"\xff\x00\n", *others]))
    assert len(Groups(run.folder / "groups").lines) == len(others)
    assert "3 records of groups could not be read" in Page(html_of(run)).text


def test_a_run_that_died_half_way_is_reported_with_its_torn_last_line_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.start()
    run.evaluation(0, 0.25)
    for step in (1, 2, 3):
        run.step(step, run.group(step, REWARDS[step]))
    for incarnation in (2, 3):
        run.start(incarnation=incarnation)
    run.events.write("resumed", step=2, incarnation=3)
    run.step(3, run.group(3, REWARDS[3]))
    old = [json.loads(line) | {"time": 1000.0 + number} for number, line in enumerate(run.events.path.read_text().splitlines())]
    run.events.path.write_text("".join(json.dumps(event) + "\n" for event in old) + '{"time": 2000.0, "event": "st')
    history = read_history(tmp_path)
    assert (history.state, history.step, history.planned_steps, len(history.steps)) == ("stopped", 3, 6, 3)
    text = Page(html_of(run)).text
    assert "stopped at step 3 of 6" in text and "version 3.3" in text
    assert "2 restarts of the trainer" in text and "restarts of the trainer2" in text
    assert "from the beginning as incarnation 2" in text and "from step 2 as incarnation 3" in text


def state_event(run: RunFolder, step: int, **software: str) -> None:
    services = [{"name": name, "software": {"vllm": version}} for name, version in software.items()]
    run.events.write("state", step=step, services=[*services, {"name": "silent", "software": {}}])


def test_of_events_that_tell_of_a_moment_the_newest_is_kept_and_what_services_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    state_event(run, 0)
    run.start()
    for step in (1, 2, 3):
        state_event(run, step, **{f"rollout-{step % 2}": f"0.{step}"})
        run.events.write("evaluating", step=step, done=1, samples=4)
        run.step(step)
    run.events.write("dead", reason="torn")
    history = read_history(tmp_path)
    assert [event["event"] for event in history.events] == [
        "state",
        "started",
        "step",
        "step",
        "state",
        "evaluating",
        "step",
        "dead",
    ]
    assert [event["step"] for event in history.of("state")] == [0, 3]  # the run's first event tells when it began
    assert history.software == {"rollout-1": {"vllm": "0.3"}, "rollout-0": {"vllm": "0.2"}}
    text = Page(html_of(run)).text
    assert "vllm 0.3" in text and "vllm 0.2" in text and "vllm 0.1" not in text and "cannot be read" not in text


def test_lines_of_the_event_log_that_cannot_be_read_are_counted(run: RunFolder) -> None:
    before = read_history(run.folder).events
    with run.events.path.open("ab") as file:
        file.write(b"\xff\xfe\n7\n")
    assert read_history(run.folder).events == before
    assert "2 lines of the event log that cannot be read" in Page(html_of(run)).text


def test_a_run_lives_while_its_events_are_young_and_ends_with_finished(run: RunFolder) -> None:
    newest = read_history(run.folder).events[-1]["time"]
    young, old = (replace(read_history(run.folder), read_at=newest + age) for age in (ALIVE_S - 1, ALIVE_S + 1))
    assert (young.state, old.state) == ("running", "stopped")
    run.events.write("finished", step=6, weights="ab")
    run.events.write("work", cpu_s=3.0, wall_s=4.0, cores=2, efficiency=0.375)
    assert read_history(run.folder).state == "finished"
    assert "Efficiency 0.38: 3.0 s of CPU time in 4.0 s on 2 cores" in Page(html_of(run)).text
    run.events.write("resumed", step=6, incarnation=2)
    assert read_history(run.folder).state == "running"
    run.events.write("stopped", step=6)
    assert read_history(run.folder).state == "stopped"


def test_a_recipe_that_a_restart_changed_says_so(run: RunFolder) -> None:
    assert "incarnation" not in Page(html_of(run)).text.partition("Recipe")[2]
    run.start(incarnation=2, steps=9)
    text = Page(html_of(run)).text
    assert "incarnation 2 changed train.steps from 6 to 9" in text and "stopped at step 6 of 9" in text.replace(
        "running,", "stopped"
    )


def test_events_without_steps_evaluations_or_a_start_make_a_report_that_says_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "early")
    run.events.write("self_test", step=0, seconds=1.0)
    text = Page(html_of(run)).text
    for sentence in ("No evaluation was made.", "No training step was done.", "No group with mono-source answers is recorded."):
        assert sentence in text
    assert text.count("The run's events have no start with its recipe") == 2 and "early" in text
    run.events.path.write_text("")
    assert "No training step was done." in Page(html_of(run)).text


def test_the_table_of_evaluations_has_the_first_the_best_and_the_last_with_their_intervals(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step, multi in ((0, 0.25), (2, 0.875), (4, 0.5)):
        run.evaluation(step, multi)
    rows = re.findall(r"<tr><th scope=\"row\">Multi</th>(.*?)</tr>", html_of(run))
    # The change is from the first to the last: 0.5 - 0.25.
    assert [re.findall(r">([^<>]+)<", row) for row in rows] == [
        ["0.250", "0.125 to 0.375", "0.875", "0.750 to 1.000", "0.500", "0.375 to 0.625", "+0.250"]
    ]
    assert re.findall(r"(first|best Multi|last), step (\d)", html_of(run)) == [("first", "0"), ("best Multi", "2"), ("last", "4")]


def test_one_evaluation_alone_shows_no_change(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.evaluation(0, 0.25)
    row = re.search(r"<tr><th scope=\"row\">Multi</th>(.*?)</tr>", html_of(run))
    assert row is not None and re.findall(r">([^<>]+)<", row[1])[-1] == "–"


def test_times_are_summed_by_stage_and_shared_out(run: RunFolder) -> None:
    # Six steps of 2 + 0 + 1 + 0.5 + 0.5 = 4 s; two evaluations of 3 s.
    rows = dict(re.findall(r"<th scope=\"row\">([^<]+)</th><td class=\"value\">([^<]+)</td>", html_of(run)))
    expected = {"training": "12.0 s", "generation": "6.0 s", "waiting": "3.0 s", "6 steps": "24.0 s", "2 evaluations": "6.0 s"}
    assert {name: rows[name] for name in expected} == expected
    assert (duration(3725), duration(125)) == ("1 h 02 min", "2 min 05 s")


def test_a_chart_puts_values_where_they_belong_and_describes_itself() -> None:
    chart = line_chart("Gain", [Series("a < b", [0, 10], [0.0, 1.0], [0.0, 0.5], [0.0, 1.0]), Series("c", [5], [None])])
    drawing = ElementTree.fromstring(re.search(r"<svg viewBox=\"0 0 480.*?</svg>", chart)[0])  # type: ignore[index]
    # Across 52 to 470; up from 194 at 0, and 1 of 1.05 is 194 - 184 / 1.05 = 18.8.
    assert [path.get("d") for path in drawing.iter("path")] == [
        "M52.0 194.0L470.0 18.8L470.0 106.4L52.0 194.0Z",
        "M52.0 194.0L470.0 18.8",
        "",
    ]
    assert drawing.findtext("title") == "Gain" and drawing.findtext("desc") == "Steps 0 to 10; at the end a < b 1.000, c –."
    dashes = [path.get("stroke-dasharray") for path in drawing.iter("path") if path.get("class") == "line"]
    assert len(set(dashes)) == 2


def test_bars_are_stacked_upon_each_other() -> None:
    chart = stacked_chart("Seconds", [Series("x", [1, 2], [1.0, 2.0]), Series("y", [1, 2], [1.0, None])])
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" class="bar (c\d)"', chart)
    # 184 pixels for 2 * 1.05: 87.6 for 1, from 194 upwards.
    assert bars == [("52.00", "106.4", "87.6", "c0"), ("52.00", "18.8", "87.6", "c1"), ("261.00", "18.8", "175.2", "c0")]


def test_a_chart_of_nothing_but_zeros_or_one_value_can_be_drawn() -> None:
    for values in ([0.0], [-1.0], [1e-9], [1e9]):
        assert "<svg" in line_chart("x", [Series("x", [3], values)])
    assert ticks(padded(-1.0, 0.0)) == [-1.0, -0.5, 0.0]


def test_the_command_writes_beside_the_run_or_where_it_is_told(run: RunFolder, tmp_path: Path, command_line: CommandLine) -> None:
    done = command_line("report", str(run.folder))
    assert done.returncode == 0 and done.stdout.strip() == f"report: {run.folder / 'report.html'}"
    assert command_line("report", str(run.folder), "--out", str(tmp_path / "new/x.html")).returncode == 0
    assert (tmp_path / "new/x.html").read_text().startswith("<!doctype html>")


def test_what_is_no_run_is_refused(tmp_path: Path, command_line: CommandLine) -> None:
    done = command_line("report", str(tmp_path))
    assert done.returncode == 2 and "is no run folder: it has no events.jsonl" in done.stderr
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError):
        write_report(tmp_path / "nothing")
    assert command_line("report").returncode == 2


def test_images_are_made_anew_and_no_larger_than_they_need_to_be(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    for size, shown, kind in (((640, 480), (320, 240), "jpeg"), ((28, 20), (28, 20), "png")):
        source = Source(name="a", blob=blobs.put(image_bytes(size)), media_type="image/png")
        head, _, content = data_uri(blobs, source).partition(",")
        assert head == f"data:image/{kind};base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == shown
