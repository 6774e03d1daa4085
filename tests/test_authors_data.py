"""The authors' evaluation files are read whole, and every question of them can be scored without its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import image_bytes
from conftest import Tables
from mars_reward.registry import score
from mars_shared.contracts import BoxesTruth, BoxFrame, FrameKind, Score, ScoreItem, TextTruth
from mars_shared.errors import InputError
from mars_trainer.data import main
from mars_trainer.datasets.formats import read_records
from mars_trainer.datasets.records import NamedPath, Record
from reference_data import FOLDER, needs_reference_data

LLVIP_SIZE_PX = (1280, 1024)
THOUGHT = "<think>I look at both.</think>"


def row(images: int = 2, text: str = "Which?", truth: Any = "Yes", **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": f"data/{index}.jpg"} for index in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}], "ground_truth": truth, **more}


def read(folder: Path, *rows: Any, names: tuple[str, ...] | None = None) -> list[Record]:
    (folder / "questions.json").write_text(json.dumps(rows))
    return list(read_records(folder / "questions.json", "authors", names))


def test_rows_become_records_with_any_number_of_images(tmp_path: Path) -> None:
    one, six = read(tmp_path, row(1, truth="two or 2"), row(6, truth="D", extra_info={"sample_id": "scene-7"}))
    assert one.images == (NamedPath("image-1", Path("data/0.jpg")),) and one.answer == "two or 2"
    assert [image.name for image in six.images] == [f"image-{n}" for n in range(1, 7)]
    assert (one.record_id, six.record_id, six.question) == ("0", "scene-7", "Which?")


def test_sources_take_the_names_that_are_given(tmp_path: Path) -> None:
    pair, single = read(tmp_path, row(2), row(1), names=("visible", "infrared"))
    assert [image.name for image in pair.images] == ["visible", "infrared"]
    assert [image.name for image in single.images] == ["visible"]


def test_boxes_become_a_truth_with_the_size_of_the_image(tmp_path: Path) -> None:
    (record,) = read(tmp_path, row(truth=[[1, 2, 30, 40], [5, 6, 7, 8]]))
    truth = record.truth((30, 40))
    assert isinstance(truth, BoxesTruth) and truth.boxes == ((1, 2, 30, 40), (5, 6, 7, 8))
    with pytest.raises(
        InputError, match=r"row 0: answer: box 0 is \(1, 2, 30, 40\); expected .* inside the image of 29 x 40 pixels"
    ):
        record.truth((29, 40))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("text", "row 1: "),
        (row(truth=""), "row 1: ground_truth"),
        (row(truth=[]), "row 1: ground_truth"),
        (row(truth=[[1, 2, 3]]), "row 1: ground_truth"),
        (row(truth=7), "row 1: ground_truth"),
        ({"content": row()["content"]}, "row 1: ground_truth: Field required"),
        (row() | {"content": [{"type": "video", "video": "a"}]}, "row 1: content.0"),
        (row() | {"content": [{"type": "image"}]}, "row 1: content.0.image.image: Field required"),
        (row(0), "row 1: content: no image"),
        (row(text=" "), "row 1: content: no text"),
        (row(text="<image>"), "row 1: content: no text"),
        (row(truth=" "), "row 1: ground_truth: .*not blank"),
        (row(truth=[[1, 2, float("nan"), 4]]), "row 1: ground_truth: .*box 0 is .* expected four finite numbers"),
    ],
)
def test_a_wrong_row_is_named_by_file_row_and_field(tmp_path: Path, wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"questions.json {message}"):
        read(tmp_path, row(), wrong)


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("{}", "holds a dict; expected a list of rows")])
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(InputError, match=message):
        list(read_records(tmp_path / "questions.json", "authors"))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_records(tmp_path / "nothing.json", "authors"))


def test_too_few_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 0: 3 images, but only 2 source names were given: visible, infrared"):
        read(tmp_path, row(3), names=("visible", "infrared"))


IMAGE = {"type": "image", "image": "a.jpg"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("content", "question", "images"),
    [
        ([IMAGE, IMAGE, said("Which cover?")], "Which cover?", 2),
        ([said("Which?"), IMAGE, IMAGE], "Which?", 2),
        ([said("Front:"), IMAGE, said("back:"), IMAGE, said("which?")], "Front:\nback:\nwhich?", 2),
        ([*[IMAGE] * 6, said("<image>" * 6 + "\nHow many cars?")], "How many cars?", 6),
        ([IMAGE, IMAGE, said("<image> and <image>\nare covers. Which?")], "and\nare covers. Which?", 2),
        ([IMAGE, said(" "), said("Who wrote it? ")], "Who wrote it?", 1),
    ],
)
def test_text_stands_anywhere_and_marks_are_taken_out(tmp_path: Path, content: Any, question: str, images: int) -> None:
    (record,) = read(tmp_path, row() | {"content": content})
    assert (record.question, len(record.images)) == (question, images)


@pytest.mark.parametrize(
    ("extra_info", "record_id"),
    [
        ({"sample_id": "scene-7"}, "scene-7"),
        ({"sample_id": 7}, "7"),
        ({"sample_id": 0}, "0"),
        ({"sample_id": None}, "1"),
        ({"sample_id": ""}, "1"),
        ({"sample_id": ["a"]}, "1"),
        ({}, "1"),
        (None, "1"),
        (["anything"], "1"),
        ("nuScenes", "1"),
    ],
)
def test_extra_info_holds_anything_and_may_name_the_sample(tmp_path: Path, extra_info: Any, record_id: str) -> None:
    _, record = read(tmp_path, row(extra_info={"sample_id": "first"}), row(extra_info=extra_info))
    assert record.record_id == record_id


def test_questions_about_one_sample_share_its_id_and_are_told_apart_by_their_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for index in range(2):
        (tmp_path / "data" / f"{index}.jpg").write_bytes(image_bytes((60, 40), format="JPEG"))
    rows = [row(extra_info={"sample_id": name}) for name in ("7", "7", "8", 7)]
    assert [record.record_id for record in read(tmp_path, *rows)] == ["7", "7#1", "8", "7#3"]
    assert main(["check", str(tmp_path / "questions.json")]) == 0
    assert "4 rows of format authors, 4 without a fault" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("truth", "right", "wrong"),
    [
        ("D", ["D", "D. cat", "(d)", "The answer is D."], ["cat", "A", "A or D", ""]),
        ("two or 2", ["two", "2", "Two.", "2 or two"], ["3", "12", "two or 3", ""]),
        (
            "orange and white or white and orange",
            ["white and orange", "Orange and white."],
            ["white", "orange", "black and white"],
        ),
    ],
)
def test_answers_of_all_files_are_right_where_they_are_right(
    tmp_path: Path, truth: str, right: list[str], wrong: list[str]
) -> None:
    (record,) = read(tmp_path, row(6, truth=truth))
    for answers, accuracy in ((right, 1.0), (wrong, 0.0)):
        for answer in answers:
            assert scored(record, f"{THOUGHT}<answer>{answer}</answer>", "paper").parts["accuracy"] == accuracy, answer


def completions(record: Record) -> dict[str, str]:
    """A perfect, a wrong and an empty answer."""
    if isinstance(record.answer, str):
        other = {"Yes": "No", "No": "Yes", "D": "C"}.get(record.answer, "D" if len(record.answer) == 1 else "zzz")
        return {
            "perfect": f"{THOUGHT}<answer>{record.answer}</answer>",
            "wrong": f"{THOUGHT}<answer>{other}</answer>",
            "empty": "",
        }
    far = [[x1 + 5000, y1 + 5000, x2 + 5000, y2 + 5000] for x1, y1, x2, y2 in record.answer]
    return {"perfect": boxes_answer(record.answer), "wrong": boxes_answer(far), "empty": ""}


def boxes_answer(boxes: Any) -> str:
    entries = json.dumps([{"bbox_2d": [int(value) for value in box], "label": "person"} for box in boxes])
    return f"{THOUGHT}<answer>```json\n{entries}\n```</answer>"


def scored(record: Record, completion: str, recipe: str) -> Score:
    truth = record.truth(LLVIP_SIZE_PX)
    width, height = LLVIP_SIZE_PX
    frame = None if isinstance(truth, TextTruth) else BoxFrame(kind=FrameKind.ORIGINAL, width=width, height=height)
    return score(ScoreItem(completion=completion, truth=truth, frame=frame), recipe, what=record.where)


QUESTIONS = {"llvip_eval": 3463, "spatialqa_eval": 80}
"""Of the files that the reference data always hold; more of the authors' files may lie beside them."""


@needs_reference_data
def test_every_question_of_the_authors_is_scored(tables: Tables) -> None:
    assert FOLDER is not None
    files = sorted((Path(FOLDER) / "mars_eval").glob("*.json"))
    assert {file.stem for file in files} >= QUESTIONS.keys()
    for file in files:
        records = list(read_records(file, "authors"))
        assert len(records) == QUESTIONS.get(file.stem, len(records)) > 0
        for record in records:
            check_answers(record)
        images = "/".join(map(str, sorted({len(record.images) for record in records})))
        tables.add("the authors' evaluation questions", file=file.name, images=images, scored=str(len(records)))


def check_answers(record: Record) -> None:
    """A perfect answer is right, a wrong and an empty one are not, by both recipes."""
    part, full_format = ("accuracy", 0.5) if isinstance(record.answer, str) else ("iou", 0.75)
    texts = completions(record)
    found = {kind: scored(record, text, "paper") for kind, text in texts.items()}
    assert {kind: value.parts[part] for kind, value in found.items()} == {"perfect": 1.0, "wrong": 0.0, "empty": 0.0}, record
    assert [value.parts["format"] for value in found.values()] == [full_format, full_format, 0.0]
    released = {kind: scored(record, text, "released").parts[part] for kind, text in texts.items()}
    assert released["perfect"] >= 1.0 and released["wrong"] == released["empty"] == 0.0, record
