"""Recipe `released` equals the released code: by hand, and on rows that the released code scored."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Tables
from mars_reward.offline import main
from mars_reward.rewards.released import released_grounding, released_vqa
from mars_reward.rewards.released_eval import released_correct, released_miou, written_boxes
from reference_data import needs_reference_data, reference

ONE = ((0.0, 0.0, 10.0, 10.0),)
TWO = ((0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0))


def answer(boxes: Any, *, think: bool = True) -> str:
    entries = json.dumps([{"bbox_2d": box} for box in boxes])
    return f"{'<think>r</think>' if think else ''}<answer>```json\n{entries}\n```</answer>"


@pytest.mark.parametrize(
    ("boxes", "objects", "iou"),
    [
        # One for one: the IoU itself, 0 unless above 0.3. (0, 0, 10, 5) covers half; (0, 0, 10, 3) covers 0.3 exactly.
        ([(0, 0, 10, 10)], ONE, 1.0),
        ([(0, 0, 10, 5)], ONE, 0.5),
        ([(0, 0, 10, 3)], ONE, 0.0),
        # Two found of two: 1 * (1 + 0.3 ln 2).
        ([(0, 0, 10, 10), (20, 0, 30, 10)], TWO, 1 + 0.3 * math.log(2)),
        # One found of two: 1/2 * (1 + 0.3 ln 2); no penalty for too few.
        ([(20, 0, 30, 10)], TWO, 0.5 * (1 + 0.3 * math.log(2))),
        # One surplus entry for one object: 1 - 0.5; two: 1 - 1; three: still at most 1 off.
        ([(0, 0, 10, 10), (50, 50, 60, 60)], ONE, 0.5),
        ([(0, 0, 10, 10)] * 3, ONE, 0.0),
        ([(0, 0, 10, 10)] * 9, ONE, 0.0),
        # One surplus of two objects costs a quarter.
        ([(0, 0, 10, 10), (20, 0, 30, 10), (50, 0, 60, 10)], TWO, 1 + 0.3 * math.log(2) - 0.25),
        ([], TWO, 0.0),
        # Half and full: (0.5 + 1) / 2 * (1 + 0.3 ln 2).
        ([(0, 0, 10, 5), (20, 0, 30, 10)], TWO, 0.75 * (1 + 0.3 * math.log(2))),
    ],
)
def test_the_iou_part_by_hand(boxes: Any, objects: Any, iou: float) -> None:
    assert released_grounding(answer(boxes), objects).iou == pytest.approx(iou, abs=1e-6)


def test_iou_is_rounded_to_float32() -> None:
    assert released_grounding(answer([(0, 0, 10, 10)]), ((0.0, 0.0, 10.0, 30.0),)).iou == float.fromhex("0x1.5555560000000p-2")


def test_coordinates_are_scaled_to_the_pixels_of_the_truth() -> None:
    assert released_grounding(answer([(0, 0, 5, 20)]), ONE, scale=(2.0, 0.5)).iou == 1.0


@pytest.mark.parametrize(
    ("completion", "truth", "expected"),
    [
        ("<answer>B</answer>", "D", (0.25, 0.0)),
        ("<think>r</think><answer> YES. </answer>", "Yes", (0.5, 1.0)),
        ("<think>r</think><answer>a</answer>", "Yes, a cat", (0.5, 1.0)),
        ("<think>r</think><answer>not white</answer>", "white", (0.5, 1.0)),
        # The released code raises without an answer: accuracy 0, format as defined.
        ("<think>r</think>suv", "suv", (0.25, 0.0)),
        ("", "suv", (0.0, 0.0)),
    ],
)
def test_vqa_by_hand(completion: str, truth: str, expected: tuple[float, float]) -> None:
    score = released_vqa(completion, truth)
    assert (score.format, score.accuracy) == expected


@given(st.text(alphabet=st.sampled_from('<think>/answer`json\n[]{}"bbox_2d:0123456789-.,eEN aIf'), max_size=300), st.booleans())
def test_rubbish_is_scored_and_never_an_error(rubbish: str, wrapped: bool) -> None:
    completion = f"<answer>```json{rubbish}```</answer>" if wrapped else rubbish
    score = released_grounding(completion, TWO)
    assert math.isfinite(score.iou) and 0 <= score.iou <= 1 + 0.3 * math.log(2)
    mean = released_miou(completion, TWO)
    assert mean is None or 0 <= mean <= 1


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "true", '"7"', "null", "[1]"])
def test_strange_numbers_earn_nothing(number: str) -> None:
    completion = f'<answer>```json\n[{{"bbox_2d": [0, 0, 10, {number}]}}]\n```</answer>'
    assert released_grounding(completion, ONE).iou == 0.0


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("(1,2),(3,4) and (5, 6), (7, 8)", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("[1.5, 2.5, 3.5, 4.5]", [(1.5, 2.5, 3.5, 4.5)]),
        ("(1.5,2.5),(3.5,4.5)", [(1.5, 2.5, 3.5, 4.5)]),
        ("(1.5, 2.5, 3.5, 4.5)", [(1.5, 2.5, 3.5, 4.5)]),
        ("[1, 2, 3, 4] [5,6,7,8]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("<box>1 2 3 4</box>", [(1, 2, 3, 4)]),
        # The first way that occurs counts, whatever else stands there.
        ("[1, 2, 3, 4] [1.5, 2.5, 3.5, 4.5]", [(1.5, 2.5, 3.5, 4.5)]),
        ("[-1, 2, 3, 4]", []),
        ("nothing", []),
    ],
)
def test_the_evaluation_reads_boxes_in_six_ways(text: str, boxes: list[tuple[float, ...]]) -> None:
    assert written_boxes(text) == boxes


@pytest.mark.parametrize(
    ("completion", "objects", "expected"),
    [
        (answer([(0, 0, 10, 5)]), TWO, 0.25),
        (answer([]), TWO, 0.0),
        (answer([]), (), 1.0),
        (answer([(0, 0, 10, 5)]), (), 0.0),
        ("<answer>[0, 0, 10, 5]</answer>", TWO, None),
        ("```json\n[0, 0, 10, 5]\n```", TWO, None),
    ],
)
def test_the_evaluation_of_a_sample_by_hand(completion: str, objects: Any, expected: float | None) -> None:
    assert released_miou(completion, objects) == expected


@pytest.mark.parametrize(
    ("completion", "truth", "expected"),
    [
        ("The answer is: B.", "B", True),
        ("<answer>yes</answer>", "Yes", True),
        ("absolutely", "a", False),
        ("no", "no or not", True),
        ("black-and-white", "black and white", True),
        ("two", "two or 2", True),
        ("three", "two or 2", False),
    ],
)
def test_the_evaluation_of_an_answer_by_hand(completion: str, truth: str, expected: bool) -> None:
    assert released_correct(completion, truth) is expected


@needs_reference_data
def test_golden_rows(tables: Tables) -> None:
    """Every row that the released code scored: format and score within 1e-9, its evaluation too."""
    golden = reference("golden_rewards.json")
    assert (len(golden["grounding"]), len(golden["vqa"])) == (400, 200)
    worst = {"grounding": 0.0, "vqa": 0.0, "evaluation": 0.0}
    for row in golden["grounding"]:
        score = released_grounding(row["completion"], row["ground_truth"])
        worst["grounding"] = max(worst["grounding"], abs(score.format - row["format"]), abs(score.iou - row["iou"]))
        mean = released_miou(row["completion"], row["ground_truth"])
        assert (mean is None) == (row["eval_miou"] is None), row
        worst["evaluation"] = max(worst["evaluation"], abs((mean or 0) - (row["eval_miou"] or 0)))
    for row in golden["vqa"]:
        answered = released_vqa(row["completion"], row["ground_truth"])
        accuracy = 0.0 if row["accuracy"] is None else row["accuracy"]
        worst["vqa"] = max(worst["vqa"], abs(answered.format - row["format"]), abs(answered.accuracy - accuracy))
    for name, rows in (("grounding", 400), ("vqa", 200), ("evaluation", 400)):
        tables.add("golden rows of the released code", rows=name, count=str(rows), difference=f"{worst[name]:.1e}")
    assert max(worst.values()) < 1e-9, worst


def score_file(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mars_shared.cli", "score", *arguments, str(path)]
    return subprocess.run(command, capture_output=True, text=True)


@needs_reference_data
def test_mars_score_gives_the_golden_rows_in_order(tmp_path: Path) -> None:
    golden = reference("golden_rewards.json")
    rows = [{"task": task, "id": index, **row} for task in ("grounding", "vqa") for index, row in enumerate(golden[task])]
    file = tmp_path / "rows.jsonl"
    kept = ("task", "id", "completion", "ground_truth")
    file.write_text("".join(json.dumps({key: row[key] for key in kept}) + "\n" for row in rows))
    done = score_file(file, "--recipe", "released", "--released-eval")
    assert done.returncode == 0, done.stderr
    for row, line in zip(rows, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert {key: found[key] for key in kept} == {key: row[key] for key in kept}
        expected = row["format"] if row["score"] is None else row["score"]
        assert found["score"] == pytest.approx(expected, abs=1e-9)
        if row["task"] == "grounding":
            assert found["iou"] == pytest.approx(row["iou"], abs=1e-9)
            assert found["eval_miou"] == (None if row["eval_miou"] is None else pytest.approx(row["eval_miou"], abs=1e-9))


def test_mars_score_by_the_paper(tmp_path: Path) -> None:
    rows = [
        {"task": "grounding", "completion": answer([(0, 0, 10, 5)]), "ground_truth": TWO, "note": "kept"},
        {"task": "vqa", "completion": "<think>r</think><answer>a</answer>", "ground_truth": "Yes, a cat"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    done = score_file(file)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    # 0.75 for the format, 0.5 of one object of two.
    assert (first["format"], first["iou"], first["score"], first["note"]) == (0.75, 0.25, 1.0, "kept")
    assert (second["format"], second["accuracy"], second["score"]) == (0.5, 0.0, 0.5)
    assert "eval_miou" not in first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", r"line 2: \[1\]; expected an object"),
        ('{"task": "vqa", "completion": "a"}', "line 2: ground_truth is missing"),
        ('{"task": "ocr", "completion": "a", "ground_truth": "b"}', "line 2: task is 'ocr'; expected one of grounding, vqa"),
        ('{"task": "vqa", "completion": 7, "ground_truth": "b"}', "line 2: completion is 7; expected a str"),
        ('{"task": "vqa", "completion": "a", "ground_truth": ""}', "line 2: ground_truth: "),
        ('{"task": "grounding", "completion": "a", "ground_truth": "b"}', "line 2: ground_truth is 'b'; expected a list"),
        ('{"task": "grounding", "completion": "a", "ground_truth": [[4, 0, 1, 2]]}', "line 2: ground_truth: .*x1 < x2"),
        ('{"task": "grounding", "completion": "a", "ground_truth": []}', "line 2: ground_truth: "),
    ],
)
def test_a_wrong_row_is_named_by_file_line_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"task": "vqa", "completion": "<answer>b</answer>", "ground_truth": "b"}\n' + line + "\n")
    assert main([str(file)]) == 3
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert str(file) in said.err and re.search(message, said.err), said.err


def test_unknown_recipes_and_missing_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "rows.jsonl")
    assert main([file, "--recipe", "mine"]) == 2
    assert "expected one of paper, released" in capsys.readouterr().err
    assert main([file]) == 3
    assert "rows.jsonl: cannot be read" in capsys.readouterr().err
