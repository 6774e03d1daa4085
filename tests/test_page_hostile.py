"""Hostile text in completions, questions and reasons: the page shows it as text, and it hurts nothing."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from browser import chromium, keep, served_page
from builders import image_bytes, make_completion, make_group, make_prompt, make_score, make_scored, sampling
from mars_shared.blobs import BlobStore
from mars_shared.contracts import Kind, Source
from mars_shared.telemetry import EventLog
from mars_trainer.algorithm.advantages import mars_advantages
from mars_trainer.batch import Batch, Judged
from mars_trainer.credit import Credit
from mars_trainer.group_log import GroupLog

PORT = 18795
SCRIPT = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'><svg onload='window.hurt = 3'><b>bold</b>"
ESCAPES = '"><a href="javascript:window.hurt=4">go</a>${window.hurt=5}{{7*7}}</p></article><style>body{display:none}</style>'
HIDDEN = "nul\x00 bell\x07 escape\x1b[31m right-to-left\u202egnp.exe\u202c zero\u200bwidth isolate\u2066x\u2069"
UNSEEN = "line\u2028paragraph\u2029selector\ufe0f\U000e0101tag\U000e0041"
UNSEEN_SHOWN = r"line\u2028paragraph\u2029selector\ufe0f\u{e0101}tag\u{e0041}"
PROMPT = f"data\u202eset\ufe00/{UNSEEN}"
PROMPT_SHOWN = rf"data\u202eset\ufe00/{UNSEEN_SHOWN}"
LONG = "<think>" + "A" * 500_000 + "</think>" + "ج" * 500_000
TEXTS = (SCRIPT, ESCAPES, HIDDEN + UNSEEN, LONG)
NAME = "train-00000000"
HIDING = {"Cc", "Cf", "Zl", "Zp"}
"""Unicode's control characters, format characters, line and paragraph separators."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One group whose four multi-source answers are the hostile texts, and a death with a hostile reason."""
    folder = tmp_path_factory.mktemp("hostile")
    blobs, events = BlobStore(folder / "blobs"), EventLog(folder / "events.jsonl")
    made = make_prompt(0, sources=("visible", "infrared"), spec=sampling(len(TEXTS), 1))
    sources = tuple(
        Source(name=name, blob=blobs.put(image_bytes((28, 28))), media_type="image/png") for name in ("visible", "infrared")
    )
    group = make_group(made.model_copy(update={"sources": sources, "question": SCRIPT, "prompt_id": PROMPT}))
    members = list(group.completions)
    for index, text in enumerate(TEXTS):
        members[index] = make_completion(made.task_id, Kind.MULTI, None, index).model_copy(update={"text": text})
    group = group.model_copy(update={"completions": tuple(members)})
    scores = [
        make_score(float(index)).model_copy(update={"parts": {f"part\u202e{UNSEEN}": 1.0}}) for index in range(len(members))
    ]
    scored = make_scored(group, scores)
    found = mars_advantages(
        scored.rewards(Kind.MULTI), {name: scored.rewards(Kind.MONO, name) for name in ("visible", "infrared")}
    )
    credit = Credit(found, (True,) * len(TEXTS), (0.0,) * len(TEXTS), signal=True)
    log = GroupLog(folder / "groups")
    log.step(1, Batch(1, (Judged(cast(Any, SimpleNamespace(scored=scored)), credit),), ()))
    events.write("step", step=1, steps=1, metrics={"reward": 1.0, f"gain/{SCRIPT}{UNSEEN}": 1.0}, seconds={"training": 1.0})
    results = {"multi": 0.5, "mono": {f"source\u202e{UNSEEN}": 0.5}, "union": 0.5, "multi_minus_union": 0.0, "samples": 1}
    events.write("evaluation", step=1, **results)
    events.write("dead", task_id=SCRIPT, prompt_id=HIDDEN, reason=ESCAPES)
    return folder


@pytest.fixture(scope="module")
def tab(run_dir: Path) -> Iterator[Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MARS_")}
    with served_page(run_dir, PORT, environment) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, base_url=url)
        page.set_default_timeout(120_000)
        page.on("dialog", lambda dialog: pytest.fail(f"a dialog opened: {dialog.message}"))
        yield page


def show(tab: Any, address: str, wait_for: str) -> None:
    tab.goto(f"/#{address}")
    tab.wait_for_selector(wait_for)


def nothing_ran(tab: Any) -> bool:
    return bool(tab.evaluate("() => window.hurt === undefined && getComputedStyle(document.body).display !== 'none'"))


def test_markup_and_script_in_answers_are_text(tab: Any) -> None:
    show(tab, f"/group?name={NAME}", "article.answer")
    said = [node.inner_text() for node in tab.locator("article[data-kind=multi] .said").all()]
    assert said[0] == SCRIPT and said[1] == ESCAPES
    assert tab.inner_text(".question") == SCRIPT
    assert tab.locator("main script, main style, main b, main a[href^=javascript], main img[src=x]").count() == 0
    assert nothing_ran(tab)
    keep(tab, "hostile")


def test_what_hides_or_reorders_text_is_shown_by_its_code(tab: Any) -> None:
    show(tab, f"/group?name={NAME}", "article.answer")
    said = tab.locator("article[data-kind=multi] .said").nth(2).inner_text()
    assert said == (
        r"nul\u0000 bell\u0007 escape\u001b[31m right-to-left\u202egnp.exe\u202c zero\u200bwidth isolate\u2066x\u2069"
        + UNSEEN_SHOWN
    )


@pytest.mark.parametrize(
    ("address", "ready", "shown"),
    [
        ("/", ".chart figcaption", f"gain/{SCRIPT}{UNSEEN_SHOWN}"),
        ("/", ".chart figcaption", rf"Mono source\u202e{UNSEEN_SHOWN}"),
        ("/groups", "tr[data-name]", PROMPT_SHOWN),
        (f"/group?name={NAME}", "article.answer", PROMPT_SHOWN),
        (f"/group?name={NAME}", "article.answer", rf"part\u202e{UNSEEN_SHOWN} 1.00"),
        ("/services", 'table[data-table="Given up"]', r"zero\u200bwidth"),
    ],
)
def test_names_show_what_they_hide_too_and_nothing_on_the_page_hides_anything(
    tab: Any, address: str, ready: str, shown: str
) -> None:
    show(tab, address, ready)
    assert shown in tab.locator("main").inner_text()
    said = tab.evaluate(
        """() => document.documentElement.innerText + [...document.querySelectorAll("[alt], [title], [aria-label], option")]
            .map((node) => ["alt", "title", "aria-label"].map((name) => node.getAttribute(name)).join() + node.textContent).join()"""
    )
    assert [hex(ord(mark)) for mark in said if unicodedata.category(mark) in HIDING and mark not in "\n\t"] == []
    assert not set(said) & {chr(code) for code in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))}


def test_a_dataset_whose_name_hides_something_can_be_chosen(tab: Any) -> None:
    show(tab, "/groups", "tr[data-name]")
    assert [node.inner_text() for node in tab.locator("select[name=dataset] option").all()] == ["any", r"data\u202eset\ufe00"]
    tab.select_option("select[name=dataset]", index=1)
    tab.wait_for_function(
        "() => location.hash.includes('dataset=') && document.querySelector('.count')?.innerText.includes('of 1 ')"
    )


def test_a_megabyte_is_shown_in_part_and_more_of_it_on_demand(tab: Any) -> None:
    show(tab, f"/group?name={NAME}", "article.answer")
    card = tab.locator("article[data-kind=multi]").nth(3)
    thought, said = card.locator(".think"), card.locator(".said")
    assert len(said.inner_text()) < 5000 and len(thought.inner_text()) < 5000
    assert "496,000 more characters" in said.inner_text()
    said.locator("button").click()
    said.locator("button", has_text="476,000 more characters").wait_for()
    assert said.inner_text().count("ج") == 24_000
    assert tab.evaluate("() => document.documentElement.scrollWidth") <= 1280


def test_lists_and_curves_show_hostile_names_as_text(tab: Any) -> None:
    show(tab, "/services", "h1")
    tab.wait_for_selector('table[data-table="Given up"]')
    row = tab.locator('table[data-table="Given up"] tbody tr').first.inner_text()
    assert SCRIPT in row and ESCAPES in row and r"\u202e" in row
    show(tab, "/groups", "tr[data-name]")
    show(tab, "/", ".chart figcaption")
    assert nothing_ran(tab)


def test_a_hostile_address_is_told_as_text(tab: Any) -> None:
    tab.goto("/#/group?name=%3Cimg%20src%3Dx%20onerror%3D%22window.hurt%3D6%22%3E")
    tab.wait_for_function("() => document.getElementById('said').innerText.includes('no group')")
    assert tab.locator("#said img").count() == 0 and nothing_ran(tab)
