"""The format part of a reward."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars_reward.rewards.format import blocks, score_format

FENCED = "```json\n[]\n```"
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "```json", "```", " ", "x", "\n"]


@pytest.mark.parametrize(
    ("completion", "think", "answer", "fenced_json"),
    [
        ("", 0, 0, 0),
        ("<think>r</think>", 0.25, 0, 0),
        ("<answer>7</answer>", 0, 0.25, 0),
        (f"<think>r</think><answer>{FENCED}</answer>", 0.25, 0.25, 0.25),
        (f"before <think>r</think> between <answer> boxes: {FENCED} </answer> after", 0.25, 0.25, 0.25),
        ("<think> \n </think><answer></answer>", 0, 0, 0),
        ("<think>a</think><think>b</think><answer>7</answer>", 0, 0.25, 0),
        (f"<think>a</think><answer>{FENCED}</answer><answer>{FENCED}</answer>", 0.25, 0, 0),
        (f"<think>a</think><answer>{FENCED}{FENCED}</answer>", 0.25, 0.25, 0),
        (f"<think>a</think><answer>{FENCED}", 0.25, 0, 0),
        (f"<think>{FENCED}</think><answer>x</answer>", 0.25, 0.25, 0),
        ("</think>r<think></answer>7<answer>", 0, 0, 0),
    ],
)
def test_each_rule_gives_a_quarter_on_its_own(completion: str, think: float, answer: float, fenced_json: float) -> None:
    score = score_format(completion, expect_json=True)
    assert (score.think, score.answer, score.fenced_json) == (think, answer, fenced_json)
    assert score.total == think + answer + fenced_json


def test_a_fenced_block_earns_nothing_where_no_json_is_expected() -> None:
    assert score_format(f"<think>r</think><answer>{FENCED}</answer>", expect_json=False).total == 0.5


@given(st.lists(st.sampled_from(TAGS), max_size=40).map("".join))
def test_blocks_are_those_of_a_non_greedy_search(text: str) -> None:
    expected, rest = [], text
    while "<think>" in rest and "</think>" in rest.split("<think>", 1)[1]:
        content, rest = rest.split("<think>", 1)[1].split("</think>", 1)
        expected.append(content)
    assert blocks(text, "<think>", "</think>") == expected


@given(st.lists(st.sampled_from(TAGS), max_size=40).map("".join))
def test_the_total_is_a_number_of_quarters_within_its_bounds(text: str) -> None:
    assert score_format(text, expect_json=True).total in (0, 0.25, 0.5, 0.75)
    assert score_format(text, expect_json=False).total in (0, 0.25, 0.5)


@pytest.mark.parametrize("piece", ["<think>", "</answer>", "<answer>", "```json", "<think></think>", "<answer>```json```"])
def test_a_megabyte_of_tags_is_scored_without_a_quadratic_search(piece: str) -> None:
    # A quadratic search would need about 10**10 steps here, far beyond the suite's patience.
    assert score_format(piece * (2**20 // len(piece)), expect_json=True).total == 0


@pytest.mark.skipif(
    "MARS_REFERENCE_DATA" not in os.environ, reason="MARS_REFERENCE_DATA names no folder with golden_rewards.json"
)
@pytest.mark.parametrize(("task", "expect_json", "rows"), [("grounding", True, 400), ("vqa", False, 200)])
def test_the_format_part_equals_the_golden_values(task: str, expect_json: bool, rows: int) -> None:
    golden = json.loads((Path(os.environ["MARS_REFERENCE_DATA"]) / "golden_rewards.json").read_text())[task]
    assert len(golden) == rows
    for row in golden:
        assert score_format(row["completion"], expect_json=expect_json).total == row["format"], row["completion"]
