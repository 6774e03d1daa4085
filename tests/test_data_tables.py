"""Hugging Face datasets on disk and verl's Parquet become records, with images that stand in the table itself."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from blake3 import blake3

from builders import image_bytes
from mars_shared.errors import InputError
from mars_trainer.data import main
from mars_trainer.datasets import tables
from mars_trainer.datasets.formats import format_of, read_records
from mars_trainer.datasets.images import image_bytes as read_image
from mars_trainer.datasets.records import Record
from table_builders import BLUE, RED, chat, parquet, saved, trl_row, verl_row


def bytes_of(record: Record, folder: Path) -> list[bytes]:
    return [read_image(record, image, folder) for image in record.images]


def records(path: Path, names: list[str] | None = None, split: str | None = None) -> list[Record]:
    return list(read_records(path, format_of(path), names, split))


def test_a_saved_dataset_keeps_its_images_original_bytes(tmp_path: Path) -> None:
    boxes = [[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 7.0, 8.0]]
    path = saved(tmp_path / "set", trl_row(0, answer=boxes), trl_row(1, answer=boxes[:1]))
    assert format_of(path) == "huggingface"
    first, second = records(path, ["visible", "infrared"])
    assert (first.record_id, first.question, first.answer) == ("q0", "Which?", ((1, 2, 30, 40), (5, 6, 7, 8)))
    assert second.answer == ((1, 2, 30, 40),) and second.where == f"{path} row 1"
    assert [image.name for image in first.images] == ["visible", "infrared"]
    assert bytes_of(second, tmp_path) == [RED, BLUE]


def test_splits_of_a_dataset_dict_are_read_by_name_and_one_must_be_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "set", train=[trl_row(0), trl_row(1)], test=[trl_row(2)])
    assert [record.record_id for record in records(path, split="train")] == ["q0", "q1"]
    (only,) = records(path, split="test")
    assert only.where == f"{path}/test row 0" and bytes_of(only, tmp_path) == [RED, BLUE]
    with pytest.raises(InputError, match="no split was named; expected one of train, test"):
        records(path)
    with pytest.raises(InputError, match="no split '../test'; expected one of train, test"):
        records(path, split="../test")
    with pytest.raises(InputError, match="split 'train' was asked for, but it has no splits"):
        records(path / "train", split="train")


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Which?", "Which?"),
        ("<image>\n<image> Which?", "Which?"),
        ("<image 1>\n<image 2>\nIs it in <image 2>?", "Is it in ?"),
        (chat("Which?"), "Which?"),
        (chat("First:", None, "second:", None, "which?"), "First:\nsecond:\nwhich?"),
        (chat(None, None, "Which?", system="Be brief."), "Be brief.\nWhich?"),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image><image>Which?"}], "Be brief.\nWhich?"),
    ],
)
def test_a_prompt_is_a_text_or_a_conversation(tmp_path: Path, prompt: Any, question: str) -> None:
    (record,) = records(parquet(tmp_path / "a.parquet", trl_row(prompt=prompt)))
    assert record.question == question and len(record.images) == 2


def test_a_json_feature_may_mix_text_and_parts_and_boxes(tmp_path: Path) -> None:
    mixed = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Which?"}]}]
    rows = [{"prompt": mixed, "image": "a.png", "answer": answer} for answer in ("Yes", [[1, 2, 3, 4]])]
    features = {"prompt": datasets.List(datasets.Json()), "image": datasets.Value("string"), "answer": datasets.Json()}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "set")
    text, boxes = records(tmp_path / "set")
    assert (text.question, text.answer, boxes.answer) == ("Be brief.\nWhich?", "Yes", ((1, 2, 3, 4),))


@pytest.mark.parametrize(
    ("images", "embedded"),
    [
        (["a.png", "b.png"], [None, None]),
        ([{"image": "a.png"}, {"image": "b.png"}], [None, None]),
        ([{"bytes": None, "path": "a.png"}, {"bytes": BLUE, "path": "b.png"}], [None, BLUE]),
        ([{"bytes": RED}, {"bytes": BLUE}], [RED, BLUE]),
        ([RED, BLUE], [RED, BLUE]),
        (["data:image/png;base64," + base64.b64encode(RED).decode(), "b.png"], [RED, None]),
    ],
)
def test_images_are_bytes_or_paths(tmp_path: Path, images: Any, embedded: list[bytes | None]) -> None:
    (tmp_path / "a.png").write_bytes(b"file a")
    (tmp_path / "b.png").write_bytes(b"file b")
    (record,) = records(parquet(tmp_path / "a.parquet", trl_row(images=images)))
    files = [b"file a", b"file b"]
    assert bytes_of(record, tmp_path) == [data or file for data, file in zip(embedded, files, strict=True)]
    assert [image.embedded is None for image in record.images] == [data is None for data in embedded]


@pytest.mark.parametrize("image", ["a.png", {"bytes": RED, "path": None}, [{"bytes": RED, "path": None}]])
def test_a_single_image_may_stand_in_a_column_of_its_own(tmp_path: Path, image: Any) -> None:
    row = {"prompt": "<image>Which?", "image": image, "answer": "7"}
    (record,) = records(parquet(tmp_path / "a.parquet", row), ["visible"])
    assert [image.name for image in record.images] == ["visible"] and record.record_id == "0"


def test_a_table_may_name_its_sources(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", trl_row(0, sources=["rgb", "depth"]), trl_row(1, sources=None))
    named, plain = records(path)
    assert [image.name for image in named.images] == ["rgb", "depth"]
    assert [image.name for image in plain.images] == ["image-1", "image-2"]
    with pytest.raises(InputError, match="row 0: source names were given, but the column sources names them"):
        records(path, ["a", "b"])
    for wrong, message in ((["rgb"], "2 images, but only 1"), (["a", "b", "c"], "3 names for 2"), (["a", "a"], "each once")):
        with pytest.raises(InputError, match=message):
            records(parquet(tmp_path / "wrong.parquet", trl_row(sources=wrong)))


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("two or 2", "two or 2"),
        (" D\n", "D"),
        ("[[1, 2, 30, 40], [5,6,7,8]]", ((1, 2, 30, 40), (5, 6, 7, 8))),
        ("[ [1.5, 2, 30, 40] ]", ((1.5, 2, 30, 40),)),
        ([[1, 2, 30, 40]], ((1, 2, 30, 40),)),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_verl_truths_are_text_or_boxes_or_boxes_as_json(tmp_path: Path, truth: Any, answer: Any) -> None:
    path = parquet(tmp_path / "train.parquet", verl_row(7, truth))
    assert format_of(path) == "verl"
    (record,) = records(path)
    assert (record.record_id, record.question, record.answer) == ("llvip/train/7", "Which?", answer)
    assert bytes_of(record, tmp_path) == [RED, BLUE]


def test_a_chain_of_thought_stands_in_the_answer_or_in_a_column(tmp_path: Path) -> None:
    reasoned = "<think>They are close.</think><answer>[[1, 2, 3, 4]]</answer>"
    (verl,) = records(parquet(tmp_path / "verl.parquet", verl_row(truth=reasoned)))
    (inside,) = records(parquet(tmp_path / "inside.parquet", trl_row(answer=reasoned)))
    (beside,) = records(parquet(tmp_path / "beside.parquet", trl_row(answer="[[1, 2, 3, 4]]", think="They are close.")))
    for record in (verl, inside, beside):
        assert (record.thought, record.answer) == ("They are close.", ((1, 2, 3, 4),))


def test_verl_ids_come_from_what_the_row_has_and_are_made_distinct(tmp_path: Path) -> None:
    rows = [verl_row(3), verl_row(3), verl_row(extra_info={"sample_id": "s"}), verl_row(extra_info=None)]
    found = [record.record_id for record in records(parquet(tmp_path / "a.parquet", *rows))]
    assert found == ["llvip/train/3", "llvip/train/3#1", "llvip/s", "llvip/3"]


def test_a_parquet_file_is_held_a_few_row_groups_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [verl_row(n, images=[{"bytes": image_bytes((8, 8), color=(n, 0, 0)), "path": None}] * 2) for n in range(12)]
    path = parquet(tmp_path / "a.parquet", *rows, group=2)
    table = tables.open_table(path, None)
    assert list(table.lengths) == [2] * 6
    found = records(path)
    for number in (11, 0, 5):
        assert bytes_of(found[number], tmp_path) == [image_bytes((8, 8), color=(number, 0, 0))] * 2
    for number in range(6):
        table.piece(number)
    assert table.piece.cache_info().currsize == tables.KEPT_PIECES < 6  # type: ignore[attr-defined]


WRONG_TRL = [
    ({"prompt": "<image>Which?"}, "prompt: 1 <image> marks for 2 images; expected one each"),
    ({"prompt": chat(None, "Which?")}, "prompt: 1 <image> marks for 2 images"),
    ({"prompt": " <image><image> "}, "prompt: no text"),
    ({"prompt": chat(None, None, "Which?") * 2}, "prompt: messages of user, user; expected system messages, if any, and one"),
    ({"prompt": []}, "prompt: messages of nobody"),
    ({"prompt": None}, "prompt"),
    ({"images": []}, "images: none; expected at least one"),
    ({"images": [{"bytes": None, "path": None}]}, "images: an image is neither bytes nor a path"),
    ({"answer": " "}, "answer: expected a text that is not blank, or boxes"),
    ({"answer": None}, "answer: expected a text"),
    ({"answer": "[[1, 2, 3]]"}, "answer: box 0 is .1, 2, 3.; expected four finite numbers"),
    ({"answer": "[[1, 2, NaN, 4]]"}, "answer: box 0 is .1, 2, nan, 4.; expected four finite"),
    ({"answer": "[[1, 2, 3, 4"}, "answer: looks like boxes, but is no JSON"),
    ({"answer": "[1, 2, 3, 4]"}, r"answer: \[1, 2, 3, 4\] looks like a single box; expected a list of boxes"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_TRL)
def test_a_wrong_row_of_a_table_is_named_by_file_row_and_field(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    path = parquet(tmp_path / "data.parquet", trl_row(0) | wrong)
    with pytest.raises(InputError, match=rf"data.parquet row 0: {message}"):
        records(path)


def test_verl_faults_are_all_reported_with_file_row_and_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = {"bytes": RED, "path": None}
    rows = [
        verl_row(0),
        verl_row(1, prompt=[{"role": "user", "content": "<image>Which?"}]),
        verl_row(2, truth=""),
        verl_row(3, truth="[[10, 10, Infinity, 20]]"),
        verl_row(4, truth="[[10, 10, 5, 20]]"),
        verl_row(5, truth="[[10, 10, 61, 20]]"),
        verl_row(6, images=[mark, {"bytes": RED[:60], "path": None}]),
        verl_row(7, images=[mark, {"bytes": b"no image", "path": None}]),
        verl_row(8, images=[mark, {"bytes": None, "path": "gone.png"}]),
        verl_row(9, prompt=[{"role": "assistant", "content": "<image><image>Which?"}]),
        verl_row(10, images=[]),
        verl_row(11, reward_model=None),
    ]
    assert main(["check", str(parquet(tmp_path / "data.parquet", *rows, group=3))]) == 3
    said = capsys.readouterr().out.splitlines()
    expected = {
        1: "prompt: 1 <image> marks for 2 images",
        2: "reward_model.ground_truth: expected a text that is not blank",
        3: "reward_model.ground_truth: box 0 is .* expected four finite",
        4: r"answer: box 0 is \(10, 10, 5, 20\)",
        5: "inside the image of 60 x 40 pixels",
        6: "source 'image-2': cannot be decoded",
        7: "source 'image-2': not an image we read",
        8: "source 'image-2': .*gone.png cannot be read",
        9: "prompt: messages of assistant",
        10: "images: none",
        11: "reward_model: ",
    }
    for (number, message), fault in zip(expected.items(), said, strict=False):
        assert re.search(f"data.parquet row {number}: .*{message}", fault), fault
    assert said[11].endswith("12 rows of format verl, 1 without a fault")


def test_an_id_that_stands_twice_in_a_column_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "set", trl_row(1), trl_row(2), trl_row(1))
    assert main(["check", str(path)]) == 3
    assert f"{path} row 2: id 'q1' is that of {path} row 0 too" in capsys.readouterr().out


def test_a_table_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="a.parquet: cannot be read .*expected Parquet"):
        format_of(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="the format is not recognised"):
        format_of(parquet(tmp_path / "b.parquet", {"question": "Which?"}))
    with pytest.raises(InputError, match="b.parquet: no column prompt, answer; its columns are question"):
        list(read_records(tmp_path / "b.parquet", "huggingface"))
    path = saved(tmp_path / "set", trl_row())
    (path / "data-00000-of-00001.arrow").write_bytes(b"xx")
    with pytest.raises(InputError, match="set: cannot be read"):
        records(path)


def test_converting_writes_embedded_images_once_and_the_result_passes_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "set", train=[trl_row(0), trl_row(1)])
    out = tmp_path / "elsewhere" / "ours.jsonl"
    out.parent.mkdir()
    assert main(["convert", str(source), str(out), "--split", "train", "--sources", "visible,infrared"]) == 0
    assert "2 questions; image paths are below its own folder" in capsys.readouterr().out
    red, blue = blake3(RED).hexdigest(), blake3(BLUE).hexdigest()
    assert json.loads(out.read_text().splitlines()[0])["sources"] == [
        {"name": "visible", "image": f"ours-images/{red}.png", "blake3": red},
        {"name": "infrared", "image": f"ours-images/{blue}.jpg", "blake3": blue},
    ]
    assert sorted(file.name for file in (out.parent / "ours-images").iterdir()) == sorted([f"{red}.png", f"{blue}.jpg"])
    assert [bytes_of(record, out.parent) for record in records(out)] == [[RED, BLUE], [RED, BLUE]]
    assert main(["check", str(out)]) == 0
    (out.parent / "ours-images" / f"{red}.png").write_bytes(BLUE)
    assert main(["check", str(out)]) == 3


def test_a_converted_file_says_where_its_images_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    (data / "a.png").write_bytes(RED)
    source = parquet(data / "a.parquet", {"prompt": "Which?", "image": "a.png", "answer": "7"})
    above, elsewhere = tmp_path / "above.jsonl", out / "elsewhere.jsonl"
    assert main(["convert", str(source), str(above)]) == 0
    assert json.loads(above.read_text())["sources"][0]["image"] == "data/a.png"
    assert main(["check", str(above)]) == 0
    assert main(["convert", str(source), str(elsewhere)]) == 0
    assert f"image paths are below {data.resolve()}: name that as --images" in capsys.readouterr().out
    assert main(["check", str(elsewhere), "--images", str(data)]) == 0


def test_images_of_both_kinds_are_converted_only_where_one_folder_holds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(RED)
    rows = [trl_row(0, images=[{"bytes": None, "path": "a.png"}] * 2), trl_row(1)]
    source = parquet(tmp_path / "data" / "a.parquet", *rows)
    assert main(["convert", str(source), str(tmp_path / "out" / "a.jsonl")]) == 3
    assert "row 1: some images stand in the dataset, others are files below" in capsys.readouterr().err
    assert not (tmp_path / "out" / "a.jsonl").exists()
    assert main(["convert", str(source), str(tmp_path / "a.jsonl")]) == main(["check", str(tmp_path / "a.jsonl")]) == 0
