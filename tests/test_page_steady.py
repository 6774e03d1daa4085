"""The page while nothing changes, while something does, and when part of a run's files cannot be read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import uvicorn

from browser import chromium
from mars_shared.http import bind
from mars_shared.settings import Deployment
from mars_shared.ui.app import build_app
from run_folders import RunFolder

VIEWS = {
    "/": ".chart figcaption",
    "/groups": "tr[data-name]",
    "/services": 'table[data-table="Replicas"] tbody td',
}
"""What each view has that can be looked at, by its address."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two steps of a group each, an evaluation, and what the trainer saw."""
    run = RunFolder(tmp_path)
    for step in (1, 2):
        run.step(step, run.group(step, (1.0, 0.0, 0.5, 0.0)))
    run.evaluation(2, 0.5)
    see_services(run)
    return run


@pytest.fixture
def tab(run: RunFolder, browser: Any) -> Iterator[Any]:
    with bind("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(run.folder, Deployment()), log_level="warning"))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        page = browser.new_page(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        page.set_default_timeout(60_000)
        yield page
        page.close()
        server.should_exit = True
        thread.join()


def see_services(run: RunFolder, *, ago_s: float = 0.0, **changed: Any) -> None:
    """Write a state down, as `ago_s` seconds ago; every service was heard of 2 s before it."""
    about = {"seen_s": 2.0, "started": 1.0, "starts": 1, "in_hand": 3}
    services = [{"service": service, "name": f"{service}-0", **about} for service in ("rollout", "reward")]
    state = {"state": "training", "step": 2, "steps": 9, "version": "1.2", "redis": True, "services": services, **changed}
    with run.events.path.open("a") as file:
        file.write(json.dumps({"time": time.time() - ago_s, "event": "state", **state}) + "\n")


def show(tab: Any, address: str, wait_for: str) -> None:
    tab.goto(f"/#{address}")
    tab.wait_for_selector(wait_for)


def wait_for_answers(tab: Any, times: int = 3) -> None:
    """Until the page has asked so often again: what all answers but the last one brought is on it."""
    for _ in range(times):
        with tab.expect_response(lambda answer: "/v1/status" in answer.url):
            pass


@pytest.mark.parametrize(("address", "wait_for"), VIEWS.items())
def test_while_nothing_changes_no_part_is_replaced_and_selected_text_stays_so(tab: Any, address: str, wait_for: str) -> None:
    show(tab, address, wait_for)
    tab.evaluate(
        """wait_for => {
        window.held = [...document.querySelectorAll("main *")];
        getSelection().selectAllChildren(document.querySelector(wait_for));
    }""",
        wait_for,
    )
    selected = tab.evaluate("() => getSelection().toString()")
    wait_for_answers(tab)
    assert selected and tab.evaluate("() => getSelection().toString()") == selected
    assert tab.evaluate("() => held.length > 9 && held.every((node) => node.isConnected)")


def test_ages_of_services_grow_where_they_stand(tab: Any) -> None:
    show(tab, "/services", "td.aged")
    cell = tab.locator('table[data-table="Replicas"] td.aged').element_handle()
    before = cell.inner_text()
    tab.wait_for_function("([cell, before]) => cell.isConnected && cell.innerText !== before", arg=[cell, before])
    assert before.endswith(" s ago") and cell.inner_text().endswith(" s ago")


def test_the_age_of_what_the_trainer_saw_adds_to_the_age_of_a_heartbeat(run: RunFolder, tab: Any) -> None:
    run.events.path.write_text("")
    see_services(run, ago_s=3 * 3600)
    show(tab, "/services", "td.aged")
    # Heard of 2 s before what was written down 3 h ago.
    assert [cell.inner_text() for cell in tab.locator("td.aged").all()] == ["3 h ago", "3 h ago"]
    assert "silent for 3 h" in tab.inner_text("h1") and "as the trainer saw it 3 h ago" in tab.inner_text(".count")


def test_the_focus_stays_on_a_link_while_groups_come_before_it(run: RunFolder, tab: Any) -> None:
    show(tab, "/groups", "tr[data-name]")
    tab.locator("tr[data-name] a").first.focus()
    address = tab.evaluate("() => (window.held = document.activeElement).getAttribute('href')")
    run.step(3, run.group(3, (1.0, 0.0, 0.5, 0.0)))
    tab.wait_for_selector('tr[data-name="train-00000003"]')
    assert tab.evaluate("() => !held.isConnected && document.activeElement.getAttribute('href')") == address
    assert tab.locator("tr[data-name] a").first.get_attribute("href") != address


def test_what_is_typed_stays_while_the_choices_change(run: RunFolder, tab: Any) -> None:
    show(tab, "/groups", "tr[data-name]")
    field = tab.locator("input[name=min_reward]")
    field.focus()
    tab.keyboard.type("0.2")
    again = run.group(4, (1.0, 0.0, 0.5, 0.0))
    prompt = again.group.prompt.model_copy(update={"prompt_id": "another/1"})
    run.step(4, again.model_copy(update={"group": again.group.model_copy(update={"prompt": prompt})}))
    tab.wait_for_selector("option[value=another]", state="attached")
    tab.keyboard.type("5")
    assert field.input_value() == "0.25"


def test_the_focus_stays_on_a_filter_that_was_just_chosen(tab: Any) -> None:
    show(tab, "/groups", "tr[data-name]")
    tab.locator("select[name=outcome]").focus()
    tab.select_option("select[name=outcome]", "promotion")
    tab.wait_for_function("() => location.hash.includes('promotion') && document.activeElement.name === 'outcome'")
    assert tab.locator("select[name=outcome]").input_value() == "promotion"


def test_records_that_cannot_be_read_are_counted_above_the_others(run: RunFolder, tab: Any) -> None:
    show(tab, "/groups", "tr[data-name]")
    assert "could not be read" not in tab.inner_text("main")
    segment = run.folder / "groups/000001.jsonl"
    for damaged, sentence in ((1, "1 record of groups could not be read"), (2, "3 records of groups could not be read")):
        with segment.open("a") as file:
            file.write('{"schema_version": 2}\n' * damaged)
        tab.wait_for_selector(f"text={sentence}")
    assert tab.locator("tr[data-name]").count() == 2
    show(tab, "/", ".chart figcaption")


def test_a_state_of_another_version_is_left_out_with_the_reason(run: RunFolder, tab: Any) -> None:
    see_services(run, version=7)
    show(tab, "/services", "text=Replicas and queues cannot be shown")
    assert "version: Input should be a valid string" in tab.inner_text(".conflict") and tab.locator("table").count() == 0
    assert tab.inner_text("#run").endswith(": at work")
    show(tab, "/", ".chart figcaption")
