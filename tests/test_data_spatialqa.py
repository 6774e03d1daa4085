"""SpatialQA's conversations and SpatialBench's questions become records of rgb and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import image_bytes
from mars_shared.errors import InputError
from mars_trainer.data import main
from mars_trainer.datasets.formats import format_of, read_records
from mars_trainer.datasets.records import Record


def talk(images: Any, asked: str, answered: str = "the cup") -> dict[str, Any]:
    return {"id": 7, "image": images, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]}


def bench(image: Any = "existence/a.b.jpg", answer: Any = "Yes", **more: Any) -> dict[str, Any]:
    return {"image": image, "question": "Is there a person?", "answer": answer} | more


def read(folder: Path, *rows: Any, names: list[str] | None = None) -> list[Record]:
    path = folder / "spatial.json"
    path.write_text(json.dumps(rows))
    return list(read_records(path, format_of(path), names))


def sources(record: Record) -> list[tuple[str, str]]:
    return [(image.name, str(image.path)) for image in record.images]


def test_numbered_marks_are_places_of_rgb_and_depth(tmp_path: Path) -> None:
    pair, single = read(
        tmp_path,
        talk(["a.jpg", "a_d.png"], "<image 1>\n<image 2>\nWhich is closer?"),
        talk("a.jpg", "<image 1>\nWhat is it?"),
    )
    assert (pair.question, pair.answer, sources(pair)) == (
        "Which is closer?",
        "the cup",
        [("rgb", "a.jpg"), ("depth", "a_d.png")],
    )
    assert (single.question, sources(single)) == ("What is it?", [("rgb", "a.jpg")])


def test_a_question_of_spatialbench_gets_the_depth_map_of_its_image(tmp_path: Path) -> None:
    (tmp_path / "existence").mkdir()
    (tmp_path / "existence_d").mkdir()
    (tmp_path / "existence" / "a.b.jpg").write_bytes(image_bytes((60, 40), format="JPEG"))
    (tmp_path / "existence_d" / "a.png").write_bytes(image_bytes((60, 40)))
    plain, named, listed = read(
        tmp_path, bench(), bench(id="existence_3"), bench(["existence/a.b.jpg", "existence_d/a.png"], answer="No")
    )
    expected = [("rgb", "existence/a.b.jpg"), ("depth", "existence_d/a.png")]
    assert sources(plain) == sources(named) == sources(listed) == expected
    assert [record.record_id for record in (plain, named, listed)] == ["0", "existence_3", "2"]
    assert (plain.question, plain.answer, listed.answer) == ("Is there a person?", "Yes", "No")
    assert main(["check", str(tmp_path / "spatial.json")]) == 0


def test_other_names_may_be_given(tmp_path: Path) -> None:
    (record,) = read(tmp_path, bench(), names=["colour", "distance"])
    assert [name for name, _ in sources(record)] == ["colour", "distance"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (bench("a.jpg"), "image: a.jpg stands in no folder"),
        (bench(answer=" "), "answer: .*not blank"),
        (bench(question="<image 1>\n"), "question: no text"),
        (bench([]), "image"),
        ({"image": "existence/a.jpg", "question": "Which?", "answer": None}, "answer"),
        (talk(["a.jpg", "a_d.png"], "<image 1>\nWhich?"), "conversations.0.value: 1 <image> marks for 2 images"),
        (talk(["a.jpg"] * 3, "<image 1><image 2><image 3>Which?"), "3 images, but only 2 source names"),
    ],
)
def test_a_wrong_row_is_named_by_file_row_and_field(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"spatial.json row 1: .*{message}"):
        read(tmp_path, bench(), row)


def test_a_conversation_with_plain_marks_is_no_spatialqa(tmp_path: Path) -> None:
    path = tmp_path / "m4.json"
    path.write_text(json.dumps([talk("a.jpg", "<image>Which?")]))
    assert format_of(path) == "conversations"
