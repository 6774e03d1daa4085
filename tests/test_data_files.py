"""Dataset files of several formats become records, and `mars data check` finds every fault at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from builders import image_bytes
from mars_shared.errors import InputError
from mars_trainer.data import main
from mars_trainer.datasets.formats import count_rows, format_of, read_records, read_rows
from mars_trainer.datasets.images import image_bytes as read_image
from mars_trainer.datasets.jsonl import jsonl_line
from mars_trainer.datasets.records import NamedPath, Record


def line(number: int = 0, answer: Any = "7", sources: Any = None, **more: Any) -> dict[str, Any]:
    pair = [{"name": name, "image": f"{name}.png"} for name in ("visible", "infrared")]
    return {"id": str(number), "question": "Which digit?", "answer": answer, "sources": sources or pair} | more


def write_lines(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in lines))
    for name in ("visible", "infrared"):
        (folder / f"{name}.png").write_bytes(image_bytes((60, 40)))
    return path


def conversation(images: Any, question: str, answer: str = "B", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": images, "conversations": turns} | more


def only(path: Path, format: str, names: list[str] | None = None) -> Record:
    (record,) = read_records(path, format, names)
    return record


def test_our_own_lines_name_their_sources(tmp_path: Path) -> None:
    record = only(write_lines(tmp_path, line(answer=[[1, 2, 30, 40]])), "jsonl")
    assert [(image.name, str(image.path)) for image in record.images] == [
        ("visible", "visible.png"),
        ("infrared", "infrared.png"),
    ]
    assert record.answer == ((1, 2, 30, 40),)
    assert json.loads(jsonl_line(record)) == line(answer=[[1, 2, 30, 40]])


def test_a_chain_of_thought_stands_beside_the_answer(tmp_path: Path) -> None:
    record = only(write_lines(tmp_path, line(think="visible is clear")), "jsonl")
    assert (record.thought, record.answer) == ("visible is clear", "7")
    assert json.loads(jsonl_line(record)) == line(think="visible is clear")
    with pytest.raises(InputError, match=r"questions.jsonl line 1: think"):
        only(write_lines(tmp_path, line(think=" ")), "jsonl")
    path = tmp_path / "m4.json"
    path.write_text(json.dumps([conversation("a.jpg", "<image> Which?", "<think>A cup.</think><answer>B</answer>")]))
    reasoned = only(path, "conversations")
    assert (reasoned.thought, reasoned.answer) == ("A cup.", "B")


def test_conversations_have_any_number_of_images(tmp_path: Path) -> None:
    path = tmp_path / "m4.json"
    views = [f"view{n}.jpg" for n in range(6)]
    rows = [conversation(views, "<image>" * 6 + "\nHow many cars?", "two", id="nu-1"), conversation("cover.jpg", "<image> Who?")]
    path.write_text(json.dumps(rows))
    six, one = read_records(path, "conversations")
    assert (six.record_id, six.question, six.answer, len(six.images)) == ("nu-1", "How many cars?", "two", 6)
    assert (one.record_id, one.question, [image.name for image in one.images]) == ("1", "Who?", ["image-1"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conversation(["a.jpg", "b.jpg"], "<image> Which?"), r"conversations.0.value: 1 <image> marks for 2 images"),
        (conversation("a.jpg", "<image>"), "conversations.0.value: no text"),
        (conversation("a.jpg", "<image> Which?", " "), "conversations.1.value: no text"),
        (conversation("a.jpg", "<image> Which?") | {"image": []}, "image"),
        ({"image": "a.jpg", "conversations": []}, "conversations"),
        ({"image": "a.jpg", "conversations": [{"from": "gpt", "value": "a"}] * 2}, "begins with 'gpt' and 'gpt'"),
    ],
)
def test_a_wrong_conversation_is_named_by_file_row_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "m4.json"
    path.write_text(json.dumps([conversation("a.jpg", "<image> Which?"), row]))
    with pytest.raises(InputError, match=f"m4.json row 1: .*{message}"):
        list(read_records(path, "conversations"))


VOC = "<annotation><object><name>person</name><bndbox>{}</bndbox></object></annotation>"
CORNERS = "<xmin>10</xmin><ymin>5</ymin><xmax>30</xmax><ymax>35.5</ymax>"


def llvip(folder: Path, annotation: str = VOC.format(CORNERS), *, split: str = "test", stem: str = "190001") -> Path:
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{stem}.xml").write_text(annotation)
    for kind in ("visible", "infrared"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
        (folder / kind / split / f"{stem}.jpg").write_bytes(image_bytes((60, 40), format="JPEG"))
    return folder


def test_llvip_is_read_as_it_is_published(tmp_path: Path) -> None:
    record = only(llvip(tmp_path), format_of(tmp_path))
    assert (record.record_id, record.answer) == ("test/190001", ((10, 5, 30, 35.5),))
    assert [image.name for image in record.images] == ["visible", "infrared"]
    assert main(["check", str(tmp_path)]) == 0


@pytest.mark.parametrize(("size", "code"), [("60 40", 0), ("1280 1024", 3), ("wide tall", 3)])
def test_the_size_that_an_annotation_states_is_that_of_its_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, code: int
) -> None:
    width, height = size.split()
    stated = f"<size><width>{width}</width><height>{height}</height></size>"
    llvip(tmp_path, VOC.format(CORNERS).replace("<annotation>", f"<annotation>{stated}"))
    assert main(["check", str(tmp_path)]) == code
    said = capsys.readouterr().out
    assert ("190001.xml: states 1280 x 1024 pixels; the image has 60 x 40" in said) == (width == "1280")
    assert ("190001.xml: size is 'wide' x 'tall'; expected whole numbers" in said) == (width == "wide")


def test_llvip_splits_are_told_apart_by_the_image_folders(tmp_path: Path) -> None:
    llvip(llvip(tmp_path, split="train", stem="190002"))
    assert [record.record_id for record in read_records(tmp_path, "llvip", split="train")] == ["train/190002"]
    assert [record.record_id for record in read_records(tmp_path, "llvip", split="test")] == ["test/190001"]
    assert len(list(read_records(tmp_path, "llvip"))) == 2
    with pytest.raises(InputError, match="no split 'val'; expected one of train, test"):
        list(read_records(tmp_path, "llvip", split="val"))


def test_a_split_of_a_format_without_splits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(write_lines(tmp_path, line())), "--split", "train"]) == 3
    assert "split 'train' was asked for, but files of this format have no splits" in capsys.readouterr().err


def test_embedded_bytes_are_read_in_place_of_a_file_and_their_hash_is_compared(tmp_path: Path) -> None:
    data = image_bytes((60, 40))
    (tmp_path / "a.png").write_bytes(b"another")
    good = NamedPath("visible", Path("a.png"), blake3(data).hexdigest(), embedded=lambda: data)
    wrong = NamedPath("visible", Path("a.png"), "0" * 64, embedded=lambda: data)
    record = Record("data.parquet row 3", "3", "Which?", (good, wrong), "7")
    assert read_image(record, good, tmp_path) == data
    with pytest.raises(InputError, match="data.parquet row 3: source 'visible': a.png has blake3 .* expected 0000"):
        read_image(record, wrong, tmp_path)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("<annotation>", "190001.xml: not XML"),
        ("<annotation/>", "190001.xml: no object"),
        (VOC.format(CORNERS.replace("xmax", "xmost")), "object 0: bndbox/xmax is missing"),
        (VOC.format(CORNERS.replace("35.5", "low")), "object 0: bndbox/ymax is 'low'; expected a number"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, annotation: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        only(llvip(tmp_path, annotation), "llvip")


def test_ten_planted_faults_are_all_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visible = {"name": "visible", "image": "visible.png"}
    (tmp_path / "cut.png").write_bytes(image_bytes((60, 40))[:60])
    (tmp_path / "note.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(image_bytes((300, 300)))
    lines = [
        line(1),
        "{",  # 2: no JSON
        {key: value for key, value in line(3).items() if key != "question"},  # 3: a field is missing
        line(4, answer=""),  # 4: no answer
        line(5, sources=[visible, {"name": "infrared", "image": "gone.png"}]),  # 5: no such file
        line(6, sources=[{"name": "visible", "image": "cut.png"}]),  # 6: a truncated image
        line(7, sources=[{"name": "visible", "image": "note.png"}]),  # 7: no image at all
        line(8, sources=[{"name": "visible", "image": "large.png"}]),  # 8: too many pixels
        line(9, answer=[[10, 10, 5, 20]]),  # 9: a box inside out
        line(10, answer=[[10, 10, 61, 20]]),  # 10: a box outside its image
        line(11, sources=[visible | {"blake3": "0" * 64}]),  # 11: another hash
        line(12, sources=[visible | {"blake3": blake3(image_bytes((60, 40))).hexdigest()}]),
    ]
    sheet = tmp_path / "sheet.png"
    assert main(["check", str(write_lines(tmp_path, *lines)), "--max-pixels", "80000", "--sheet", str(sheet)]) == 3
    said = capsys.readouterr().out.splitlines()
    expected = {
        2: "Invalid JSON",
        3: "question: Field required",
        4: "answer",
        5: "source 'infrared': .*gone.png cannot be read",
        6: "source 'visible': cannot be decoded",
        7: "source 'visible': not an image we read",
        8: "source 'visible': 300 x 300 pixels; expected at most 80000",
        9: r"answer: box 0 is \(10, 10, 5, 20\)",
        10: r"box 0 is \(10, 10, 61, 20\); .* inside the image of 60 x 40 pixels",
        11: "expected 0000",
    }
    import re

    for (number, message), fault in zip(expected.items(), said, strict=False):
        assert re.search(f"questions.jsonl line {number}: .*{message}", fault), fault
    assert said[10].endswith("12 rows of format jsonl, 2 without a fault")
    assert any("images a question: 2 (1), 1 (1)" in text for text in said)
    assert sheet.stat().st_size > 1000


def test_an_id_that_occurs_twice_and_a_path_out_of_the_folder_are_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = [{"name": "visible", "image": "../../etc/passwd"}]
    assert main(["check", str(write_lines(tmp_path, line(1), line(1), line(3, sources=outside)))]) == 3
    said = capsys.readouterr().out
    assert "line 2: id '1' is that of" in said and "lies outside the image folder" in said


def test_what_is_converted_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path, line())
    source, out = tmp_path / "m4.json", tmp_path / "ours.jsonl"
    source.write_text(json.dumps([conversation(["visible.png", "infrared.png"], "<image><image> Which?", "7")]))
    assert main(["convert", str(source), str(out), "--sources", "visible,infrared"]) == 0
    assert json.loads(out.read_text()) == line(question="Which?")
    assert main(["check", str(out)]) == 0
    assert "1 rows of format jsonl, 1 without a fault" in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["<answer>7</answer>", "7</answer>", "<think>r</think> 7"])
def test_an_answer_that_no_completion_can_match_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str
) -> None:
    assert main(["check", str(write_lines(tmp_path, line(1, answer="x < y > z"), line(2, answer=answer)))]) == 3
    said = capsys.readouterr().out.splitlines()
    assert "line 2: answer: contains '<" in said[0] and said[1].endswith("2 rows of format jsonl, 1 without a fault")


def test_a_dataset_is_not_converted_onto_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path, line())
    before = path.read_bytes()
    for source, out in ((path, path), (tmp_path, path), (path, tmp_path / "elsewhere" / ".." / "questions.jsonl")):
        assert main(["convert", str(source), str(out)]) == 2
        assert "questions.jsonl is the file that is read; name another one" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_converting_stops_at_the_first_faulty_row_and_opens_no_image_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_lines(tmp_path, line(1), line(2, answer=""), line(3, answer="")), tmp_path / "ours.jsonl"
    assert main(["convert", str(path), str(out)]) == 3
    said = capsys.readouterr().err
    assert "line 2: answer" in said and "line 3" not in said and not out.exists()
    write_lines(tmp_path, line(1))
    (tmp_path / "visible.png").write_text("no image")
    assert main(["convert", str(path), str(out)]) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.csv",
            "a,b",
            "the format is not recognised; name one of authors, conversations, huggingface, jsonl, llvip, spatialqa, verl",
        ),
        ("data.json", "[]", "the format is not recognised"),
        ("data.json", "[", "not JSON"),
        ("gone.jsonl", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["check", str(tmp_path / name)]) == 3
    assert message in capsys.readouterr().err


def test_check_finds_what_training_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes((60, 40)))
    good = {"id": "0", "question": "Which?\u2028Say.", "answer": "7", "sources": [{"name": "visible", "image": "a.png"}]}
    faulty = [
        good | {"id": "1", "question": " "},
        good | {"id": "2", "question": "<image><image>Which?"},
        good | {"id": "3", "answer": "[[1, 2, 3]]"},
        good | {"id": "4", "sources": [{"name": "visible", "image": "a\u0000.png"}]},
        good | {"id": "5", "answer": "[[30, 2, 20, 40]]"},
    ]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in (good, *faulty)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["check", str(tmp_path)]) == 3
    said = capsys.readouterr().out
    for number, field in enumerate(
        ("question", "question: 2 <image> marks", "answer: box 0", "source 'visible'", "answer: box 0"), 2
    ):
        assert f"questions.jsonl line {number}: {field}" in said
    assert "6 rows of format jsonl, 1 without a fault" in said


def test_a_check_tells_rows_faults_and_statistics_as_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path, line(1), line(1), line(3), "torn")
    assert main(["check", str(path), "--json", "--sheet", str(tmp_path / "sheet.png")]) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["format"], said["rows"], said["good"]) == (str(path), "jsonl", 4, 2)
    assert ["line 2: id '1' is that of" in said["faults"][0], "line 4" in said["faults"][1]] == [True, True]
    assert said["statistics"]["image width"] == "60 to 60, median 60" and (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(("format", "rows"), [("jsonl", 3), ("conversations", 2)])
def test_rows_are_counted_before_they_are_read(tmp_path: Path, format: str, rows: int) -> None:
    path = write_lines(tmp_path, line(1), "", line(2), "torn")
    if format != "jsonl":
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([conversation("a.png", "Which?"), conversation("b.png", "Which?")]))
    assert count_rows(path, format) == rows == len(list(read_rows(path, format)))
