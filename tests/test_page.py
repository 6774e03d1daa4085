"""The page of a real run in a real browser: curves move, groups show every source with its boxes, filters find what they say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from browser import chromium, keep, served_page
from live_run import KEY, STEPS, LiveRun

pytestmark = pytest.mark.engine

PORT = 18790


@dataclass
class Page:
    """A tab of the browser that has given the key."""

    tab: Any
    url: str
    problems: list[str]

    def show(self, address: str, wait_for: str) -> None:
        self.tab.goto(f"{self.url}/#{address}")
        self.tab.wait_for_selector(wait_for)

    def points(self, metric: str) -> int:
        """Of a metric's curve."""
        return int(self.tab.locator(f'path[data-name="{metric}"]').first.get_attribute("data-points"))

    def listed(self) -> list[str]:
        """Names of all groups that pass the filter, page by page."""
        names: list[str] = []
        while True:
            names += [row.get_attribute("data-name") for row in self.tab.locator("tr[data-name]").all()]
            older = self.tab.locator("a", has_text="older")
            if not older.count():
                return names
            count = self.tab.locator(".count").inner_text()
            older.click()
            self.tab.wait_for_function("said => document.querySelector('.count')?.innerText !== said", arg=count)


@pytest.fixture(scope="module")
def page(live_run: LiveRun) -> Iterator[Page]:
    live_run.wait("events", lambda: (live_run.folder / "events.jsonl").exists())
    with served_page(live_run.folder, PORT, live_run.environment) as url, chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)
        problems: list[str] = []
        tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(url)
        tab.fill("#key", "a wrong one")
        tab.click("button")
        tab.wait_for_selector("[role=alert]:has-text('not the key')")
        tab.fill("#key", KEY)
        tab.click("button")
        tab.wait_for_selector("h1")
        problems.clear()  # a browser reports the two refusals
        yield Page(tab, url, problems)


def logged(live_run: LiveRun) -> list[dict[str, Any]]:
    """All groups as they stand in the files, read without the project's own reader."""
    lines = [
        line for path in sorted((live_run.folder / "groups").glob("0*.jsonl")) if "index" not in path.name for line in path.open()
    ]
    return [json.loads(line) for line in lines]


def name_of(group: dict[str, Any]) -> str:
    return group["task_id"] if group["occasion"] == "step" else f"eval-{group['step']}-{group['prompt_id']}"


def gain_of(group: dict[str, Any]) -> float:
    multi = [answer["reward"] for answer in group["answers"] if answer["kind"] == "multi"]
    mono = [answer["reward"] for answer in group["answers"] if answer["kind"] == "mono"]
    return fmean(multi) - fmean(mono)


def test_curves_move_while_the_run_goes_on(live_run: LiveRun, page: Page) -> None:
    live_run.wait("a first step", lambda: live_run.events("step"))
    page.show("/", 'path[data-name="reward"]')
    seen = page.points("reward")
    live_run.wait("a later step", lambda: len(live_run.events("step")) > seen)
    page.tab.wait_for_function(
        "seen => Number(document.querySelector('path[data-name=\"reward\"]').dataset.points) > seen", arg=seen
    )
    assert seen < page.points("reward") <= STEPS
    assert f"of {STEPS}" in page.tab.inner_text("#run")
    keep(page.tab, "curves-live")


def test_replicas_workers_and_queues_are_told_of(live_run: LiveRun, page: Page) -> None:
    page.show("/services", 'table[data-table="Replicas"]')
    replica = page.tab.locator('table[data-table="Replicas"] tbody tr').first
    replica.get_by_text("rollout-0").wait_for()
    assert page.tab.locator('table[data-table="Reward workers"] tbody tr').count() == 1
    streams = [cell.inner_text() for cell in page.tab.locator('table[data-table="Queues"] tbody th').all()]
    assert streams == ["prompts", "rollouts", "scored:train", "scored:eval", "retries", "dead"]
    keep(page.tab, "services")
    live_run.until_finished()
    # The last look of the finished run: the one replica serves the last version and is not behind.
    page.tab.wait_for_function("steps => document.querySelector('main').innerText.includes(`.${steps}\\t0`)", arg=STEPS)
    assert "finished" in page.tab.inner_text("#run")


def test_a_group_shows_every_source_with_its_boxes_at_their_pixels(live_run: LiveRun, page: Page) -> None:
    live_run.until_finished()
    boxes_seen = 0
    groups = logged(live_run)
    most = sorted(groups, key=lambda group: -sum(len(answer["boxes"]) for answer in group["answers"]))[:3]
    for number, group in enumerate(most):
        page.show(f"/group?name={name_of(group)}", f'h1:has-text("{group["prompt_id"]}")')
        figures = page.tab.locator("figure.source")
        assert figures.count() == len(group["sources"]) == 2
        for figure, source in zip(figures.all(), group["sources"], strict=True):
            assert figure.get_attribute("data-source") == source["name"]
            boxes_seen += check_boxes(page, figure, group, source["name"])
        keep(page.tab, f"group-{number}")
    assert boxes_seen > 6, "some answers had boxes"


def check_boxes(page: Page, figure: Any, group: dict[str, Any], source: str) -> int:
    """Where each rectangle stands on the screen, by the sizes of image and box; returns how many were looked at."""
    image, truth = figure.locator("img"), group["truth"]
    page.tab.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    size = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [truth["width_px"], truth["height_px"]]
    shown = image.bounding_box()
    scale = shown["width"] / truth["width_px"]
    answers = [answer for answer in group["answers"] if answer["source"] in (None, source)]
    expected = [("truth", box) for box in truth["boxes"]]
    expected += [
        (answer["kind"], box)
        for kind in ("multi", "mono")
        for answer in answers
        if answer["kind"] == kind
        for box in answer["boxes"]
    ]
    rectangles = figure.locator("rect").all()
    assert [rectangle.get_attribute("class") for rectangle in rectangles] == [kind for kind, _ in expected]
    for rectangle, (_, (left, top, right, bottom)) in zip(rectangles, expected, strict=True):
        found = rectangle.evaluate(
            "node => { const box = node.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; }"
        )
        origin = image.evaluate("node => { const box = node.getBoundingClientRect(); return [box.left, box.top]; }")
        wanted = [origin[0] + left * scale, origin[1] + top * scale, origin[0] + right * scale, origin[1] + bottom * scale]
        assert found == pytest.approx(wanted, abs=1)
    check_colour(figure, truth, scale)
    return len(expected)


def check_colour(figure: Any, truth: dict[str, Any], scale: float) -> None:
    """Just outside a true box the screen itself is green: its border is broad, and those of answers are drawn over its middle."""
    picture = Image.open(io.BytesIO(figure.locator(".frame").screenshot())).convert("RGB")
    for left, top, right, bottom in truth["boxes"]:
        y = round((top + bottom) / 2 * scale) + 5
        for x in (round(left * scale) - 2, round(right * scale) + 2):
            if 0 <= x < picture.width - 1:
                red, green, blue = picture.getpixel((x, y))  # type: ignore[misc]
                assert green > 120 and green > red + 40 and green > blue + 40, (truth, (x, y), (red, green, blue))


def test_the_filter_for_conflicts_finds_exactly_those_that_the_rewards_say(live_run: LiveRun, page: Page) -> None:
    live_run.until_finished()
    groups = logged(live_run)
    conflicts = {name_of(group) for group in groups if gain_of(group) < 0}
    promotions = {name_of(group) for group in groups if gain_of(group) > 0}
    assert conflicts and promotions
    for outcome, expected in (("conflict", conflicts), ("promotion", promotions)):
        page.show("/groups", "select[name=outcome]")
        page.tab.select_option("select[name=outcome]", outcome)
        page.tab.wait_for_function(
            f"() => location.hash.includes('{outcome}') && document.querySelector('.count')?.innerText.includes('of {len(expected)} ')"
        )
        found = page.listed()
        assert len(found) == len(set(found)) and set(found) == expected
    keep(page.tab, "promotions")


def test_the_keyboard_goes_through_the_filtered_groups_and_the_address_leads_back(live_run: LiveRun, page: Page) -> None:
    live_run.until_finished()
    page.show("/groups?outcome=conflict", "tr[data-name]")
    first, second = page.listed()[:2]
    page.show(f"/group?outcome=conflict&name={first}", "figure.source")
    page.tab.keyboard.press("ArrowRight")
    page.tab.wait_for_function("name => decodeURIComponent(location.hash).includes(name)", arg=second)
    page.tab.reload()
    page.tab.wait_for_selector("figure.source")
    assert second in unquote(page.tab.url)
    page.tab.keyboard.press("k")
    page.tab.wait_for_function("name => decodeURIComponent(location.hash).includes(name)", arg=first)


def test_it_can_be_used_on_a_telephone_and_in_the_dark(live_run: LiveRun, page: Page) -> None:
    live_run.until_finished()
    group = name_of(logged(live_run)[-1])
    page.tab.set_viewport_size({"width": 400, "height": 800})
    page.tab.emulate_media(color_scheme="dark")
    for name, address, ready in (
        ("curves", "/", "path.line"),
        ("groups", "/groups", "tr[data-name]"),
        ("group", f"/group?name={group}", "figure.source"),
        ("services", "/services", "table[data-table]"),
    ):
        page.show(address, ready)
        assert page.tab.evaluate("() => document.documentElement.scrollWidth") <= 400, f"{name} is wider than the screen"
        keep(page.tab, f"{name}-400-dark")
    assert page.tab.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    page.tab.set_viewport_size({"width": 1280, "height": 900})
    page.tab.emulate_media(color_scheme="light")
    assert page.tab.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_everything_that_is_drawn_has_words_too(live_run: LiveRun, page: Page) -> None:
    live_run.until_finished()
    for address, ready in (("/", "path.line"), (f"/group?name={name_of(logged(live_run)[-1])}", "figure.source img")):
        page.show(address, ready)
        silent = page.tab.evaluate(
            "() => [...document.querySelectorAll('img:not([alt]), svg:not([aria-label]), input:not([id]):not([name]), button:empty')].length"
        )
        assert silent == 0, address


def test_the_browser_had_nothing_to_complain_of(page: Page) -> None:
    assert page.problems == []


def test_pictures_of_the_page_were_kept() -> None:
    from browser import ARTEFACTS

    assert {path.stem for path in ARTEFACTS.glob("*.png")} >= {
        "curves-live",
        "services",
        "group-0",
        "promotions",
        "group-400-dark",
    }
